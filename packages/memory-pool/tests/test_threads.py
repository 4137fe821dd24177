"""Eight threads and a garbage collector that never rests: owners are handed on, and die where they were not born."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

import pytest
import torch
from conftest import MakePool
from pool_checks import Piece, assert_consistent, assert_drained, in_threads, piece_of
from test_conformance import Cycle
from torch.utils.dlpack import from_dlpack

from dilated_memory_pool import MemoryPool, PoolLimitError

THREADS = 8
TURNS = 150
SIZES = (1, 500, 4096, 4097, 9000, 30_000, 120_000)


@pytest.fixture
def hasty_switches() -> Iterator[None]:
    """Threads take turns every few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def owner_of(pool: MemoryPool, dice: random.Random) -> Any:
    """A new owner, and what is left of it after it was handed on in some way."""
    size = dice.choice(SIZES)
    if dice.random() < 0.5:
        return pool.allocate(size)
    return pool.empty(size, dtype=dice.choice([torch.uint8, torch.int32, torch.float64]))


def rewrapped(owner: Any, dice: random.Random) -> Any:
    ways: list[Callable[[Any], Any]] = [lambda x: x, lambda x: x, Cycle, lambda x: x.__dlpack__(), from_dlpack]
    return dice.choice(ways)(owner)


def trade(pool: MemoryPool, turns: int) -> None:
    """Every thread makes owners and gives them to others, which check them and let them die."""
    markets: list[SimpleQueue[tuple[Any, Piece]]] = [SimpleQueue() for _ in range(THREADS)]
    tags = count(1)

    def work(number: int) -> None:
        dice = random.Random(number)
        for turn in range(turns):
            try:
                owner = owner_of(pool, dice)
            except PoolLimitError:
                continue
            piece = piece_of(owner, next(tags))
            markets[dice.randrange(THREADS)].put((rewrapped(owner, dice), piece))
            del owner
            for _ in range(2):
                try:
                    other, piece = markets[number].get_nowait()
                except Empty:
                    break
                assert piece.intact()
                del other
            if turn % 16 == number:
                pool.trim(100_000)
                assert_consistent(pool, quiet=False)

    in_threads(work, THREADS)
    while any(not market.empty() for market in markets):
        for market in markets:
            if not market.empty():
                owner, piece = market.get()
                assert piece.intact()
                del owner


@pytest.mark.slow
@pytest.mark.usefixtures("eager_gc", "hasty_switches")
@pytest.mark.parametrize("limit", [None, "1MiB"])
def test_no_byte_is_in_two_live_owners_in_any_thread(make: MakePool, limit: str | None) -> None:
    pool = make(limit=limit)
    trade(pool, TURNS)
    assert_drained(pool)


@pytest.mark.fuzz
@pytest.mark.usefixtures("eager_gc", "hasty_switches")
def test_no_byte_is_in_two_live_owners_in_any_thread_for_long(make: MakePool) -> None:
    pool = make(limit="1MiB")
    trade(pool, 30 * TURNS)
    assert_drained(pool)


@pytest.mark.usefixtures("no_gc", "hasty_switches")
def test_counts_are_exact_in_many_threads(make_on_host: MakePool) -> None:
    pool = make_on_host()
    turns = 200

    def work(number: int) -> None:
        for turn in range(turns):
            pool.allocate(4096 * (1 + (turn + number) % 3))

    in_threads(work, THREADS)
    numbers = pool.statistics()
    assert numbers.hits + numbers.misses == THREADS * turns
    assert numbers.bypasses == numbers.ooms == 0
    assert numbers.allocated_bytes == 0


def test_autograd_frees_in_its_own_way_in_many_threads(make_on_host: MakePool) -> None:
    pool = make_on_host()

    def work(number: int) -> None:
        weight = torch.ones(3000, requires_grad=True)
        for turn in range(20):
            (weight * pool.empty(3000).fill_(number + turn)).backward(torch.ones(3000))
        assert torch.equal(weight.grad, torch.full((3000,), sum(number + turn for turn in range(20)) * 1.0))  # type: ignore[arg-type]

    in_threads(work, THREADS)
    assert_drained(pool)


def test_closing_while_others_allocate(make_on_host: MakePool) -> None:
    pool = make_on_host()
    kept: list[Piece] = []
    owners: list[Any] = []

    def work(number: int) -> None:
        if number == 0:
            pool.close()
            return
        for turn in range(1000):
            try:
                owner = pool.allocate(5000)
            except RuntimeError:
                break
            if turn % 10 == 0:
                kept.append(piece_of(owner, number * 1000 + turn))
                owners.append(owner)

    in_threads(work, THREADS)
    assert all(piece.intact() for piece in kept)
    owners.clear()
    assert_drained(pool)
