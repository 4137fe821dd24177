"""Real processes for tests: one for each rank, in a gloo group or outside of any; none outlives its test.

``run_processes`` is what most tests want. ``started`` is for tests that watch processes die.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

T = TypeVar("T")

SECONDS = 300.0  # for processes to start, to compute and to end, on a slow and busy machine
_GRACE = 5.0  # for the peers of a failed rank to fail too, so that the first failure is the one that is told

# Processes are forked off a clean one that has imported what takes seconds.
_PRELOADED = [
    "torch",
    "torch.distributed.device_mesh",
    "torch._inductor.config",  # which torch.use_deterministic_algorithms imports
    "pytest",
    "hypothesis",
    "dilated_core",
    "dilated_ring",
]


class RankFailedError(Exception):
    """The cause of what run_processes raises: which rank failed, and its traceback."""


class Ending(NamedTuple):
    """How a process ended.

    Attributes:
        exitcode: negative if it was killed by that signal; None if it had not ended in time.
        result, error: what its work returned or raised.
        told: the traceback of the error, or the stack at a crash or when time was up.
        at: when its work returned or raised, by the clock that all processes share.
    """

    exitcode: int | None
    result: Any = None
    error: BaseException | None = None
    told: str = ""
    at: float = float("inf")


class Processes:
    """Processes that run, by rank."""

    def __init__(self, processes: list[multiprocessing.process.BaseProcess], folder: Path) -> None:
        self._processes, self._folder = processes, folder

    def pid(self, rank: int) -> int:
        """The process id of a rank."""
        pid = self._processes[rank].pid
        assert pid is not None
        return pid

    def wait(self, *ranks: int, timeout: float = SECONDS + _GRACE) -> list[Ending]:
        """How these ranks ended, or all; waits until they have, or time is up."""
        deadline = time.monotonic() + timeout
        waited_for = ranks or tuple(range(len(self._processes)))
        for rank in waited_for:
            self._processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [self.ending(rank) for rank in waited_for]

    def wait_for_failure(self, timeout: float) -> None:
        """Wait until all processes have ended, or one has failed, or time is up."""
        deadline = time.monotonic() + timeout
        running = {process.sentinel: process for process in self._processes}
        while running and time.monotonic() < deadline:
            for sentinel in wait(list(running), deadline - time.monotonic()):
                process = running.pop(sentinel)  # type: ignore[index]
                process.join()
                if process.exitcode:
                    return

    def ending(self, rank: int) -> Ending:
        """How a rank ended, if it has."""
        exitcode, report = self._processes[rank].exitcode, self._folder / f"{rank}.report"
        if exitcode is not None and report.exists():
            return Ending(exitcode, *pickle.loads(report.read_bytes()))
        stack = self._folder / f"{rank}.stack"
        return Ending(exitcode, told=stack.read_text() if stack.exists() else "")


@contextmanager
def started(
    size: int,
    work: Callable[..., object],
    *args: object,
    tmp_path: Path,
    timeout: float = SECONDS,
    spawned: Collection[int] = (),
) -> Iterator[Processes]:
    """Start ``work(rank, *args)`` in ``size`` processes without a group; kill those that are left when the block ends.

    Args:
        work: a function of a module that can be imported, as pickle wants it; its result and ``args`` are pickled.
        timeout: seconds after which a process that still runs writes its stack down and ends.
        spawned: ranks that end as programs of their own do, with everything Python does at exit, and start as slowly.
    """
    multiprocessing.set_forkserver_preload(_PRELOADED)
    methods = ["spawn" if rank in spawned else "forkserver" for rank in range(size)]
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    processes = [
        multiprocessing.get_context(method).Process(  # type: ignore[attr-defined]
            target=_report, args=(rank, work, args, folder, timeout), name=f"rank {rank}", daemon=True
        )
        for rank, method in enumerate(methods)
    ]
    try:
        for process in processes:
            process.start()
        yield Processes(processes, folder)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
        for process in processes:
            if process.pid is not None:
                process.join()


def run_processes(
    size: int, work: Callable[..., T], *args: object, tmp_path: Path, timeout: float = SECONDS
) -> list[T]:
    """Run ``work(rank, *args)`` in ``size`` processes that form the default group, on gloo.

    Args:
        work: a function of a module that can be imported, as pickle wants it; its result and ``args`` are pickled.
        tmp_path: pytest's, where the processes meet.
        timeout: seconds for all of it; half of it is the group's timeout.

    Returns:
        What the ranks returned, in their order.

    Raises:
        What the first rank to fail raised, with the rank and its traceback as the cause; RankFailedError when a
            process crashed or time was up.
    """
    store = Path(tempfile.mkdtemp(dir=tmp_path)) / "store"
    with started(size, in_group, size, store, timeout / 2, work, args, tmp_path=tmp_path, timeout=timeout) as running:
        running.wait_for_failure(timeout)
        endings = running.wait(timeout=_GRACE)
    # Who crashed did so before the others could raise; who did not end at all comes last.
    failures = [
        (-1.0 if ending.exitcode and ending.error is None else ending.at, rank)
        for rank, ending in enumerate(endings)
        if ending.exitcode != 0
    ]
    if failures:
        _, rank = min(failures)
        exitcode, _, error, told, _ = endings[rank]
        how = f"did not end within {timeout} s" if exitcode is None else f"ended with exit code {exitcode}"
        failure = RankFailedError(f"rank {rank} of {size} {how}\n{told}")
        if error is None:
            raise failure
        raise error from failure
    return [ending.result for ending in endings]


def in_group(rank: int, size: int, store: Path, patience: float, work: Callable[..., T], args: tuple[object, ...]) -> T:
    """Call ``work(rank, *args)`` as one of ``size`` ranks, who wait ``patience`` seconds for each other."""
    distributed.init_process_group("gloo", f"file://{store}", timedelta(seconds=patience), size, rank)
    result = work(rank, *args)
    distributed.barrier()  # so that none closes its connections while another still reads from them
    # Not after an error: its time is noted first, and only then the others find this rank gone.
    distributed.destroy_process_group()
    return result


def _report(rank: int, work: Callable[..., object], args: tuple[object, ...], folder: Path, timeout: float) -> None:
    """What a process does: the work, and then writing down what came of it."""
    torch.set_num_threads(1)
    with (folder / f"{rank}.stack").open("w") as stack:
        faulthandler.enable(stack)
        faulthandler.dump_traceback_later(timeout, exit=True, file=stack)
        result: object = None
        failure: BaseException | None = None
        told = ""
        try:
            result = work(rank, *args)
        except BaseException as error:
            failure, told = error, traceback.format_exc()
        at = time.monotonic()
        try:
            report = pickle.dumps((result, failure, told, at))
        except Exception as error:
            failure = RuntimeError(f"neither result nor error could be pickled: {error}")
            report = pickle.dumps((None, failure, told, at))
        written = folder / f"{rank}.writing"
        written.write_bytes(report)
        written.rename(folder / f"{rank}.report")
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
    if failure is not None:
        raise SystemExit(1)
