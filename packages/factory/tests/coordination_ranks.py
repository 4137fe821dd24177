"""Ranks for tests: threads that share a store, and real processes, none of which outlives its test."""

from __future__ import annotations

import faulthandler
import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed
from torch.distributed import HashStore, Store, TCPStore

from dilated_factory.coordination import PoolCoordinator

SECONDS = 120.0  # for processes to start, work and end, and for threads to end, on a slow and busy machine
MIB = 2**20

_PRELOADED = ["torch", "torch.distributed", "pytest", "hypothesis", "dilated_factory.coordination"]


@contextmanager
def coordinators(size: int, store: Store | None = None, **options: Any) -> Iterator[list[PoolCoordinator]]:
    """One coordinator for each of ``size`` ranks of this process, closed in the end."""
    shared = HashStore() if store is None else store
    options = {"timeout": SECONDS, **options}

    def make(rank: int) -> PoolCoordinator:
        return PoolCoordinator(store=shared, rank=rank, world_size=size, **options)

    with ThreadPoolExecutor(size) as ranks, ExitStack() as stack:
        yield [stack.enter_context(made) for made in ranks.map(make, range(size))]


def at_once(works: list[Callable[[], object]]) -> list[Any]:
    """Run them in a thread each, beginning together; what they return. Fails where one does not end."""
    results: list[Any] = [None] * len(works)
    failures: list[BaseException] = []
    begin = threading.Barrier(len(works))

    def run(place: int) -> None:
        try:
            begin.wait(SECONDS)
            results[place] = works[place]()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(works))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        faulthandler.dump_traceback()
        raise AssertionError(f"threads did not end within {SECONDS} s")
    if failures:
        raise failures[0]
    return results


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it holds before time is up."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def told(error: BaseException) -> BaseException:
    """What the coordinator raised, which a pool's own error has as its cause."""
    return error if error.__cause__ is None or hasattr(error, "reserved_by_rank") else told(error.__cause__)


def run_ranks(size: int, work: Callable[..., Any], *args: Any, gloo: bool, dying: int | None = None) -> list[Any]:
    """Run ``work(rank, store, *args)`` in ``size`` processes; what they return.

    Args:
        work: a function of a module that can be imported.
        gloo: whether they form the default group. Otherwise they only have the store.
        dying: a rank that ends without a word; the others find the key "dead" in the store then.
    """
    server = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=SECONDS), wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_rank, args=(rank, size, server.port, gloo, sender, work, args), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        deadline = time.monotonic() + SECONDS
        if dying is not None:
            processes[dying].join(SECONDS)
            server.set("dead", "1")
        results: list[Any] = []
        for rank, (receiver, _) in enumerate(pipes):
            if rank == dying:
                results.append(None)
                continue
            assert receiver.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} said nothing in {SECONDS} s"
            try:
                error, result = receiver.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} ended without a word") from None
            assert error is None, f"rank {rank}: {error}"
            results.append(result)
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert all(process.exitcode == 0 for rank, process in enumerate(processes) if rank != dying)
        return results
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _rank(
    rank: int, size: int, port: int, gloo: bool, sender: Connection, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """What a process does."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=SECONDS))
    try:
        if gloo:
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
        sender.send((None, work(rank, store, *args)))
        if gloo:
            distributed.barrier()  # so that none closes its connections while another still reads from them
            distributed.destroy_process_group()
    except BaseException:
        sender.send((traceback.format_exc(), None))
    finally:
        faulthandler.cancel_dump_traceback_later()
