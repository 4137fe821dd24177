"""Forks and the end of the interpreter. Each test is a process of its own: a deadlock here must not be one there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import MODES

import dilated_memory_pool

SOURCE = Path(dilated_memory_pool.__file__).parents[1]
PREAMBLE = """
import atexit, gc, os, signal, sys, threading, time, warnings
from dilated_memory_pool import MemoryPool
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
pool = MemoryPool("host", mode={mode!r}, min_bytes=0)

def fork():
    child = os.fork()
    if child == 0:
        signal.alarm({CHILD_SECONDS})  # a child that hangs has failed
    return child
"""
CHILD_SECONDS = 60
WATCHDOG_SECONDS = 120

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def run(program: str, mode: str) -> None:
    """Exit code 0, and not a word on stderr."""
    text = PREAMBLE.format(mode=mode, CHILD_SECONDS=CHILD_SECONDS) + textwrap.dedent(program)
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-W", "error", "-c", text]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WATCHDOG_SECONDS)
    assert (done.returncode, done.stderr) == (0, "")


@forks
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_forked_child_has_memory_of_its_own(mode: str) -> None:
    run(
        """
        block = pool.allocate(10_000)
        view = memoryview(block).cast("B")
        view[:] = b"p" * 10_000
        child = fork()
        if child == 0:
            status = 1
            try:
                assert bytes(view) == b"p" * 10_000
                view[:] = b"c" * 10_000
                other = pool.allocate(10_000)
                assert other.address != block.address
                memoryview(other).cast("B")[:] = b"o" * 10_000
                assert bytes(view) == b"c" * 10_000
                del other, block, view
                assert pool.statistics().allocated_bytes == 0
                pool.trim()
                assert pool.statistics().reserved_bytes == 0
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert bytes(view) == b"p" * 10_000
        assert pool.statistics().allocated_bytes >= 10_000
        """,
        mode,
    )


@forks
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_fork_while_other_threads_allocate_does_not_deadlock(mode: str) -> None:
    run(
        """
        pools = [pool, MemoryPool("host", limit="1MiB")]
        done = False

        def hammer(number):
            turn = 0
            while not done:
                turn += 1
                pools[turn % 2].allocate(5000 * (turn % 5 + number + 1))
                if turn % 50 == 0:
                    pools[turn % 4 // 2].trim()

        threads = [threading.Thread(target=hammer, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(50):
            child = fork()
            if child == 0:
                status = 1
                try:
                    for each in pools:
                        block = each.allocate(70_000)
                        memoryview(block).cast("B")[:] = b"c" * 70_000
                        del block
                        each.trim()
                        snapshot = each.snapshot()
                        assert snapshot.statistics.reserved_bytes == sum(arena.nbytes for arena in snapshot.arenas)
                        thread = threading.Thread(target=each.allocate, args=(100,))
                        thread.start()
                        thread.join()
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
        done = True
        for thread in threads:
            thread.join()
        """,
        mode,
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("torch", [False, True], ids=["blocks", "tensors"])
def test_the_interpreter_ends_quietly_whatever_is_alive(mode: str, torch: bool) -> None:
    run(
        f"""
        tensors = {torch}
        def owner(pool=pool):
            return pool.empty(5000) if tensors else pool.allocate(20_000)

        class Last:
            def __init__(self):
                self.owner, self.me, self.pool = owner(), self, other

            def __del__(self):
                self.pool.allocate(3000)
                self.pool.statistics()

        other, busy = (MemoryPool("host", mode=pool.mode, min_bytes=0) for _ in range(2))
        alive = owner()
        view = alive[100:] if tensors else memoryview(alive)[100:]
        numbers = {{"deep": [owner(), other.allocate(10)]}}
        capsule = owner().__dlpack__()
        cycle = [Last(), owner()]
        cycle.append(cycle)
        garbage, last = Last(), Last()
        del garbage
        sys.somewhere = owner()
        atexit.register(lambda kept=owner(): other.allocate(5000))
        atexit.register(pool.close if tensors else pool.trim)

        def hammer():
            while True:
                busy.allocate(20_000)

        for _ in range(2):
            threading.Thread(target=hammer, daemon=True).start()
        while busy.statistics().hits < 100:
            time.sleep(0.001)
        """,
        mode,
    )


LAST_MINUTE = """
class Last:
    def __init__(self, pool):
        self.me, self.block, self.pool = self, pool.allocate(3000), pool

    def __del__(self):
        memoryview(self.block).cast("B")[:] = b"l" * 3000
        memoryview(self.pool.allocate(3000)).cast("B")[:] = b"n" * 3000
        self.pool.statistics()
        self.pool.snapshot()
        self.pool.trim()
        self.pool.close()
        assert bytes(self.block) == b"l" * 3000
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_interpreter_ends_though_daemons_allocate_from_a_pool_in_use(mode: str) -> None:
    for _ in range(3):
        run(
            LAST_MINUTE
            + """
def hammer():
    while True:
        pool.allocate(20_000)

sys.setswitchinterval(1e-6)
gc.disable()
Last(pool)  # collected when the interpreter ends
for _ in range(4):
    threading.Thread(target=hammer, daemon=True).start()
while pool.statistics().hits < 100:
    time.sleep(0.001)
""",
            mode,
        )


@pytest.mark.parametrize("mode", MODES)
def test_the_interpreter_ends_though_a_stopped_thread_holds_the_lock(mode: str) -> None:
    run(
        LAST_MINUTE
        + """
class Sizes:
    def round_up(self, nbytes):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            time.sleep(1000)
        return nbytes

inside = threading.Event()
stuck = MemoryPool("host", mode=pool.mode, size_classes=Sizes())
gc.disable()
Last(stuck)  # collected when the interpreter ends
threading.Thread(target=stuck.allocate, args=(20_000,), daemon=True).start()
assert inside.wait(60)
""",
        mode,
    )


@forks
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_forked_child_ends_quietly(mode: str) -> None:
    run(
        """
        block = pool.allocate(10_000)
        cycle = [block]
        cycle.append(cycle)
        child = fork()
        if child == 0:
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """,
        mode,
    )
