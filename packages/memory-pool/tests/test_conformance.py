"""No byte is ever in two live owners: random programs over every backend in both modes, checked at every step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ON_A_GPU, MakePool
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from pool_checks import Piece, assert_disjoint, assert_drained, piece_of
from torch.utils.dlpack import from_dlpack

from dilated_memory_pool import Block, MemoryPool, PoolLimitError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int16, torch.uint8, torch.bool, torch.complex64)
LIMIT = 2**21
INDEX = st.integers(0, 99)
SIZES = st.one_of(st.integers(1, 300), st.integers(4000, 4200), st.integers(1, 40_000))


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self, load: object) -> None:
        self.load, self.me = load, self


class Graph:
    """A product that keeps its factor for the backward pass, though no variable does."""

    def __init__(self, factor: torch.Tensor) -> None:
        self.weight = torch.ones_like(factor, requires_grad=True)
        self.product = self.weight * factor


class Program(RuleBasedStateMachine):
    """Owners of a pool's memory come, are handed on, and go in every way Python and torch have.

    A rule is given a number to pick an owner by: hypothesis keeps what it draws, and must not become an owner itself.
    """

    def __init__(self, pool: MemoryPool) -> None:
        super().__init__()
        self.pool, self.tags = pool, count(1)
        self.owners: list[tuple[Any, Piece]] = []  # several may be of one piece
        self.garbage: list[Piece] = []  # in cycles, until the collector runs
        self.spent: list[Graph] = []

    def teardown(self) -> None:
        self.owners.clear()
        assert_drained(self.pool)

    def adopt(self, make: Callable[[], Any]) -> None:
        """A new owner, where the limit allows one."""
        try:
            owner = make()
        except PoolLimitError:
            owner = None
        if self.pool.statistics().limit_bytes is not None:
            self.collect()  # the pool may have done so already
        if owner is not None:
            self.owners.append((owner, piece_of(owner, next(self.tags))))

    def pick(self, index: int, *kinds: type) -> Iterator[tuple[Any, Piece]]:
        """One owner of these kinds, or none where there is none."""
        fitting = [pair for pair in self.owners if isinstance(pair[0], kinds)]
        if fitting:
            yield fitting[index % len(fitting)]

    # ------------------------------------------------------------------------------------------ birth

    @rule(size=SIZES, dtype=st.sampled_from(DTYPES))
    def tensor(self, size: int, dtype: torch.dtype) -> None:
        self.adopt(lambda: self.pool.empty(size, dtype=dtype))

    @rule(rows=st.integers(1, 50), columns=st.integers(1, 50), dtype=st.sampled_from(DTYPES))
    def like(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        like = torch.empty((columns, rows), dtype=dtype, device=self.pool.device).t()
        self.adopt(lambda: self.pool.empty_like(like))

    @rule(size=SIZES)
    def block(self, size: int) -> None:
        self.adopt(lambda: self.pool.allocate(size))

    @rule(size=SIZES)
    def fails_with_a_tensor_in_its_frame(self, size: int) -> None:
        def fail() -> None:
            local = self.pool.empty(size, dtype=torch.uint8)
            pieces.append(piece_of(local, next(self.tags)))
            raise ArithmeticError("with a traceback that keeps the frame")

        pieces: list[Piece] = []
        with suppress(PoolLimitError):
            try:
                fail()
            except ArithmeticError as error:
                self.owners.append((error, pieces[0]))
        if self.pool.statistics().limit_bytes is not None:
            self.collect()

    # ------------------------------------------------------------------------------------------ handing on

    @rule(index=INDEX, start=st.integers(0, 100), length=st.integers(0, 100))
    def view(self, index: int, start: int, length: int) -> None:
        for tensor, piece in self.pick(index, torch.Tensor):
            self.owners.append((tensor[start : start + length], piece))

    @rule(index=INDEX)
    def capsule(self, index: int) -> None:
        for owner, piece in self.pick(index, torch.Tensor, Block):
            self.owners.append((owner.__dlpack__(), piece))

    @rule(index=INDEX)
    def dlpack(self, index: int) -> None:
        for owner, piece in self.pick(index, torch.Tensor, Block):
            self.owners.append((from_dlpack(owner), piece))

    @rule(index=INDEX)
    @precondition(lambda self: self.pool.device == "cpu")
    def numpy(self, index: int) -> None:
        for tensor, piece in self.pick(index, torch.Tensor):
            if tensor.dtype is not torch.bfloat16:
                self.owners.append((tensor.numpy(), piece))

    @rule(index=INDEX, export=st.sampled_from([memoryview, np.frombuffer, torch.frombuffer]))
    @precondition(lambda self: self.pool.backend.addressable)
    def buffer(self, index: int, export: Callable[..., Any]) -> None:
        for block, piece in self.pick(index, Block):
            options = {"dtype": torch.uint8} if export is torch.frombuffer else {}
            if export is not np.frombuffer or piece.nbytes % np.dtype(float).itemsize == 0:
                self.owners.append((export(block, **options), piece))

    @rule(index=INDEX)
    def graph(self, index: int) -> None:
        for tensor, piece in self.pick(index, torch.Tensor):
            if tensor.is_floating_point():
                self.owners.append((Graph(tensor), piece))

    # ------------------------------------------------------------------------------------------ death

    @rule(index=INDEX)
    def die(self, index: int) -> None:
        for pair in self.pick(index, object):
            self.owners = [other for other in self.owners if other is not pair]

    @rule()
    def all_die(self) -> None:
        self.owners.clear()

    @rule(index=INDEX)
    def die_in_a_cycle(self, index: int) -> None:
        for pair in self.pick(index, object):
            self.owners = [other for other in self.owners if other is not pair]
            Cycle(pair[0])
            self.garbage.append(pair[1])

    @rule(index=INDEX)
    def backward(self, index: int) -> None:
        """The product lives on, and gives up what it kept."""
        for pair in self.pick(index, Graph):
            self.owners = [other for other in self.owners if other is not pair]
            pair[0].product.backward(torch.ones_like(pair[0].product))
            self.spent.append(pair[0])

    # ------------------------------------------------------------------------------------------ the whole pool

    @rule()
    def collect(self) -> None:
        gc.collect()
        self.garbage.clear()

    @rule(keep=st.integers(0, 100_000))
    def trim(self, keep: int) -> None:
        self.pool.trim(keep)

    @rule(size=SIZES)
    def reserve(self, size: int) -> None:
        if self.pool.statistics().limit_bytes is None:
            self.pool.reserve(size)

    @rule(limit=st.sampled_from([None, LIMIT, LIMIT // 4]))
    def set_limit(self, limit: int | None) -> None:
        self.pool.set_limit(limit)

    @invariant()
    def every_owner_has_its_bytes_to_itself(self) -> None:
        pieces = {piece for _, piece in self.owners} | set(self.garbage)
        assert all(piece.intact() for piece in pieces)
        assert_disjoint(self.pool, sorted(pieces))


def run_programs(make: MakePool, how: settings) -> None:
    factory: Any = lambda: Program(make())  # noqa: E731  # takes any callable, and is typed for classes
    run_state_machine_as_test(factory, settings=how)


@pytest.mark.usefixtures("no_gc")
def test_no_byte_is_in_two_live_owners(make: MakePool) -> None:
    is_slow = make().backend.name in ON_A_GPU  # every look at a piece of memory is a copy to the device
    run_programs(make, settings(max_examples=10 if is_slow else 20, stateful_step_count=40))


@pytest.mark.fuzz
@pytest.mark.usefixtures("no_gc")
def test_no_byte_is_in_two_live_owners_for_long(make: MakePool) -> None:
    run_programs(make, settings(settings.get_profile("fuzz"), stateful_step_count=100))
