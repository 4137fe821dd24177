"""AttentionBufferManager: what each kind's policy does, and that kinds do not mix."""

from __future__ import annotations

import mmap
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from dilated_memory_pool.attention import DEFAULT_POLICIES, AttentionBufferManager, BufferKind, BufferPolicy
from dilated_memory_pool.backends import HostBackend
from dilated_memory_pool.sizes import Geometric

torch = pytest.importorskip("torch")

PAGE = mmap.PAGESIZE
MIB = 2**20
KINDS = list(BufferKind)
EVERYTHING_POOLED = {kind: replace(policy, min_bytes=0) for kind, policy in DEFAULT_POLICIES.items()}

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def make(**options: Any) -> AttentionBufferManager:
    """A manager on the host, whose pools serve tensors of any size."""
    return AttentionBufferManager("host", **{"policies": EVERYTHING_POOLED, **options})


def raw(manager: AttentionBufferManager, nbytes: int, kind: BufferKind | str) -> Any:
    return manager.empty(nbytes, dtype=torch.uint8, kind=kind)


# ---------------------------------------------------------------------------------------------- kinds and policies


def test_there_are_ten_kinds_each_with_a_policy_and_a_reason() -> None:
    manager = AttentionBufferManager("host")
    assert len(KINDS) == 10
    assert set(DEFAULT_POLICIES) == set(manager.reasons) == set(KINDS)
    assert all(DEFAULT_POLICIES[kind].why in reason for kind, reason in manager.reasons.items())


@pytest.mark.parametrize("name", ["query", "QUERY", "Query", BufferKind.QUERY])
def test_a_kind_is_known_by_its_name_in_any_case(name: str) -> None:
    manager = make()
    assert manager.kind_of(raw(manager, PAGE, name)) is BufferKind.QUERY


@pytest.mark.parametrize(
    ("kind", "error"), [("querry", ValueError), (3, TypeError), (None, TypeError), ([], TypeError)]
)
def test_an_unknown_kind_is_refused_with_all_the_names(kind: Any, error: type[Exception]) -> None:
    manager = make()
    for call in (lambda: raw(manager, PAGE, kind), lambda: manager.allocator(kind)):
        with pytest.raises(error, match=r"kind: expected .*'query'.*'cache'"):
            call()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"backend": "gpu"}, ValueError, "backend: expected one of"),
        ({"backend": ()}, ValueError, "backend: expected one or more"),
        ({"mode": "best"}, ValueError, "mode: expected"),
        ({"size_classes": "fine"}, ValueError, "size_classes: expected"),
        ({"min_bytes": -1}, ValueError, "min_bytes: expected at least 0"),
        ({"arena_bytes": "1MiB"}, ValueError, "arena_bytes: expected None"),
        ({"mode": "full", "arena_bytes": "many"}, ValueError, "arena_bytes: expected text like"),
        ({"growth": 1}, ValueError, "growth: expected a finite factor above 1"),
        ({"growth": float("inf")}, ValueError, "growth: expected a finite factor above 1"),
        ({"growth": "double"}, TypeError, "growth: expected a number"),
        ({"shared": True}, ValueError, "min_bytes: expected 0 beside shared=True"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BufferPolicy(**fields)


def test_a_policy_cannot_be_changed_only_replaced() -> None:
    with pytest.raises(FrozenInstanceError):
        DEFAULT_POLICIES[BufferKind.TEMP].mode = "full"  # type: ignore[misc]
    with pytest.raises(TypeError):
        DEFAULT_POLICIES[BufferKind.TEMP] = BufferPolicy()  # type: ignore[index]


def test_policies_of_the_user_must_be_policies_and_one_for_each_kind() -> None:
    with pytest.raises(TypeError, match=r"policies\['query'\]: expected a BufferPolicy, got 'full'"):
        AttentionBufferManager("host", policies={"query": "full"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="query twice"):
        AttentionBufferManager("host", policies={"query": BufferPolicy(), "Query": BufferPolicy()})
    with pytest.raises(ValueError, match="kind: expected one of"):
        AttentionBufferManager("host", policies={"querry": BufferPolicy()})


@pytest.mark.parametrize(
    ("kind", "hits"),
    [("query", 0), ("output", 0), ("temp", 0), ("mask", 0), ("cache", 0), ("scores", 1), ("weights", 1)],
)
def test_scores_and_weights_use_freed_memory_for_other_sizes_and_the_rest_do_not(kind: str, hits: int) -> None:
    manager = make()
    for pages in (8, 4):
        raw(manager, pages * PAGE, kind)
    assert manager.statistics(kind).hits == hits


def test_a_full_kind_takes_no_more_from_the_backend_than_it_needs() -> None:
    manager = make()
    scores = raw(manager, 3 * PAGE, "scores")
    assert manager.statistics("scores").reserved_bytes == scores.nbytes == 3 * PAGE


def test_arena_bytes_of_a_policy_are_taken_at_a_time() -> None:
    policy = BufferPolicy(mode="full", min_bytes=0, arena_bytes="1MiB")
    manager = make(policies={"scores": policy})
    kept = [raw(manager, PAGE, "scores") for _ in range(3)]
    now = manager.statistics("scores")
    assert (now.reserved_bytes, now.misses, now.hits) == (MIB, 1, len(kept) - 1)


def test_queries_of_nearly_one_size_share_a_class_and_scores_waste_nothing() -> None:
    manager = make()
    first = raw(manager, 60 * PAGE, "query").data_ptr()  # of the 8 classes up to 64 pages, 57 and 60 share one
    query = raw(manager, 57 * PAGE, "query")
    scores = raw(manager, 57 * PAGE, "scores")
    assert query.data_ptr() == first
    assert manager.statistics("query").allocated_bytes == 60 * PAGE
    assert manager.statistics("scores").allocated_bytes == scores.nbytes


@pytest.mark.parametrize(
    ("kind", "least"), [("query", MIB), ("scores", MIB), ("temp", 64 * 1024), ("mask", 1), ("cache", MIB)]
)
def test_kinds_begin_to_pool_at_their_own_size(kind: str, least: int) -> None:
    manager = AttentionBufferManager("host")
    kept = [raw(manager, nbytes, kind) for nbytes in (least - 1, least)]
    now = manager.statistics(kind)
    assert (now.bypasses, now.misses) == (1, 1)
    assert [manager.kind_of(tensor) for tensor in kept] == [None, BufferKind(kind)]


def test_a_policy_of_the_user_replaces_one_kind_and_no_other() -> None:
    manager = make(policies={**EVERYTHING_POOLED, "query": replace(EVERYTHING_POOLED[BufferKind.QUERY], mode="full")})
    for kind in ("query", "key"):
        for pages in (8, 4):
            raw(manager, pages * PAGE, kind)
    assert [manager.statistics(kind).hits for kind in ("query", "key")] == [1, 0]


def test_a_backend_of_the_users_serves_the_kinds_that_name_it() -> None:
    huge: Any = HostBackend()
    own: Any = HostBackend(huge_pages=False)
    own.name = "own"
    policies = {**EVERYTHING_POOLED, BufferKind.KEY: replace(EVERYTHING_POOLED[BufferKind.KEY], backend=own)}
    manager = AttentionBufferManager(huge, limit=4 * PAGE, policies=policies)
    kept = [raw(manager, 4 * PAGE, kind) for kind in ("query", "key")]  # each backend has a limit of its own
    assert len(kept) == 2
    assert "own" in manager.reasons[BufferKind.KEY]
    assert "own" not in manager.reasons[BufferKind.QUERY]


STAGED = BufferPolicy(backend=("pinned", "host"), size_classes=Geometric(steps=4))


@without_gpu
def test_a_kind_takes_the_first_backend_there_is_and_says_why() -> None:
    manager = AttentionBufferManager("host", policies={"comm": STAGED})
    comm = raw(manager, MIB, "comm")
    assert manager.kind_of(comm) is BufferKind.COMM
    assert "not pinned: " in manager.reasons[BufferKind.COMM]
    assert not any("not pinned" in reason for kind, reason in manager.reasons.items() if kind != "comm")


@without_gpu
def test_a_policy_that_allows_pinned_memory_alone_raises_where_there_is_none() -> None:
    manager = make(policies={"comm": BufferPolicy(backend="pinned")})
    with pytest.raises((ImportError, RuntimeError)):
        raw(manager, MIB, "comm")


@pytest.mark.gpu
def test_all_kinds_are_on_the_device_and_take_its_name_without_an_index() -> None:
    manager = AttentionBufferManager("torch")
    for kind in BufferKind:
        assert manager.empty((512, 1024), dtype=torch.float32, device="cuda", kind=kind).is_cuda


@pytest.mark.gpu
def test_a_staged_kind_is_pinned_where_there_is_a_gpu_and_copies_to_it_exactly() -> None:
    manager = AttentionBufferManager("torch", policies={"comm": STAGED})
    comm = manager.empty((512, 1024), dtype=torch.float32, kind="comm")
    assert manager.kind_of(comm) is BufferKind.COMM
    assert comm.device.type == "cpu"
    assert comm.is_pinned()
    assert "not pinned" not in manager.reasons[BufferKind.COMM]
    comm.copy_(torch.randn(comm.shape))
    query = manager.empty(comm.shape, dtype=torch.float32, kind="query")
    assert query.device.type == "cuda"
    query.copy_(comm, non_blocking=True)
    assert torch.equal(query.cpu(), comm)


# ---------------------------------------------------------------------------------------------- the manager


def test_pools_are_made_when_a_kind_is_first_used() -> None:
    manager = make()
    assert manager.statistics() == {}
    raw(manager, PAGE, "key")
    assert set(manager.statistics()) == {BufferKind.KEY}


def test_numbers_of_a_kind_are_its_own() -> None:
    manager = make()
    before = manager.statistics("value")
    keys = [raw(manager, PAGE, "key") for _ in range(3)]
    del keys[0]
    raw(manager, PAGE, "key")
    now = manager.statistics("key")
    assert (now.misses, now.hits, now.allocated_bytes, now.hit_rate) == (3, 1, 2 * PAGE, 0.25)
    assert manager.statistics("value") == before


def test_trimming_a_kind_leaves_the_others_alone() -> None:
    manager = make()
    for kind in ("query", "key"):
        raw(manager, PAGE, kind)
    assert manager.trim("Query") == PAGE
    assert [manager.statistics(kind).reserved_bytes for kind in ("query", "key")] == [0, PAGE]
    assert manager.trim("weights") == 0
    assert manager.trim() == PAGE


def test_an_allocator_is_what_dilated_attention_takes() -> None:
    manager = make()
    allocator = manager.allocator("output")
    tensor = allocator.empty((3, 5), dtype=torch.float64, device=torch.device("cpu"))
    assert (tuple(tensor.shape), tensor.dtype) == ((3, 5), torch.float64)
    assert manager.kind_of(tensor) is BufferKind.OUTPUT
    assert manager.kind_of(manager.empty((3, 5), dtype=torch.float64, device=torch.device("cpu"))) is BufferKind.TEMP


def test_memory_from_elsewhere_has_no_kind_and_no_streams_to_record() -> None:
    manager = make()
    assert manager.kind_of(torch.empty(PAGE)) is None
    with pytest.raises(ValueError, match="owner: expected memory of this manager"):
        manager.record_stream(torch.empty(PAGE), 0)
    with pytest.raises(ValueError, match="has none"):
        manager.record_stream(raw(manager, PAGE, "temp"), 0)


def test_the_report_is_a_table_of_the_kinds_in_use() -> None:
    manager = make()
    kept = raw(manager, PAGE, "key")
    for _ in range(2):
        raw(manager, 2 * PAGE, "scores")
    lines = [line.split() for line in manager.report().splitlines()]
    page = f"{PAGE // 1024} KiB".split()
    assert lines == [
        ["kind", "backend", "requests", "reuse", "allocated", "reserved"],
        ["key", "host", "1", "0.0%", *page, *page],
        ["scores", "host", "2", "50.0%", "0", "B", str(2 * PAGE // 1024), "KiB"],
    ]
    assert kept.nbytes == PAGE


def test_a_closed_manager_serves_nothing_and_its_tensors_live_on() -> None:
    with make() as manager:
        kept = raw(manager, PAGE, "key").fill_(7)
        cache = manager.growable((PAGE,), dtype=torch.uint8, capacity=2)
        raw(manager, PAGE, "query")
    assert manager.statistics("query") == manager.statistics()[BufferKind.QUERY]
    assert manager.statistics("query").reserved_bytes == 0
    for call in (
        lambda: raw(manager, PAGE, "key"),
        lambda: raw(manager, 0, "weights"),
        lambda: manager.allocator("key"),
        lambda: manager.shared("key", lambda empty: torch.ones(1)),
        lambda: manager.growable((1,)),
        lambda: cache.append(kept.expand(3, PAGE)),
    ):
        with pytest.raises(RuntimeError, match="the manager is closed"):
            call()
    cache.append(kept.expand(2, PAGE))  # there is room
    manager.close()
    assert torch.equal(cache.view(), torch.full((2, PAGE), 7, dtype=torch.uint8))
    assert torch.equal(kept, torch.full((PAGE,), 7, dtype=torch.uint8))


def test_a_kind_in_use_traces_into_one_graph() -> None:
    manager = make()
    allocator = manager.allocator("scores")

    def doubled(x: Any) -> Any:
        return allocator.empty(x.shape, dtype=x.dtype).copy_(x) + x

    compiled = torch.compile(doubled, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(4)), torch.full((4,), 2.0))


def test_torch_is_not_imported_before_a_tensor_is_asked_for() -> None:
    program = (
        "import sys; from dilated_memory_pool.attention import AttentionBufferManager as M;"
        "M('host').statistics(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
