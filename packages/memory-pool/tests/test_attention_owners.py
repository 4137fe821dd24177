"""Random programs over all kinds at a common limit: no byte has two owners."""

from __future__ import annotations

import mmap
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_memory_pool import PoolLimitError
from dilated_memory_pool.attention import DEFAULT_POLICIES, AttentionBufferManager, BufferKind

torch = pytest.importorskip("torch")

PAGE = mmap.PAGESIZE
KINDS = list(BufferKind)
EVERYTHING_POOLED = {kind: replace(policy, min_bytes=0) for kind, policy in DEFAULT_POLICIES.items()}
PAGES_ALLOWED = 24
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.sampled_from(KINDS), st.integers(1, 5 * PAGE)),
        st.tuples(st.just("keep a view"), st.integers(0, 99), st.none()),
        st.tuples(st.just("drop"), st.integers(0, 99), st.none()),
        st.tuples(st.just("append"), st.integers(0, 1), st.integers(1, PAGE)),
        st.tuples(st.just("share"), st.integers(0, 2), st.integers(1, 2 * PAGE)),
        st.tuples(st.just("trim"), st.sampled_from([None, *KINDS]), st.none()),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(_steps)
def test_random_programs_never_see_a_byte_change_that_is_theirs(steps: list[Any]) -> None:
    manager = AttentionBufferManager("host", limit=PAGES_ALLOWED * PAGE, policies=EVERYTHING_POOLED)
    held: list[tuple[Any, int]] = []  # each tensor and the byte it is full of
    buffers = [manager.growable((), dtype=torch.uint8) for _ in range(2)]
    appended: list[list[Any]] = [[], []]
    refused = 0
    for stamp, (step, what, size) in enumerate(steps, start=1):
        try:
            if step == "take":
                held.append((manager.empty(size, dtype=torch.uint8, kind=what).fill_(stamp), stamp))
            elif step == "share":
                made = torch.full((size,), 200 + what, dtype=torch.uint8)
                held.append((manager.shared(what, lambda empty, made=made: made), 200 + what))  # type: ignore[misc]
            elif step == "append":
                rows = torch.full((size,), stamp, dtype=torch.uint8)
                buffers[what].append(rows)
                appended[what].append(rows)
            elif step == "trim":
                manager.trim(what)
            elif held and step == "keep a view":
                tensor, byte = held.pop(what % len(held))
                held.append((tensor[len(tensor) // 2 :], byte))
                del tensor
            elif held:
                del held[what % len(held)]
        except PoolLimitError:
            refused += 1
        assert sum(now.reserved_bytes for now in manager.statistics().values()) <= PAGES_ALLOWED * PAGE
    assert bool(refused) <= any(now.ooms for now in manager.statistics().values())
    for tensor, byte in held:
        assert torch.equal(tensor, torch.full_like(tensor, byte))
    for buffer, parts in zip(buffers, appended, strict=True):
        assert torch.equal(buffer.view(), torch.cat([torch.empty(0, dtype=torch.uint8), *parts]))
