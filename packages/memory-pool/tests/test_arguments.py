"""Every message that a pool has for wrong arguments: it names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fake_device import FakeBackend, FakeDevice

from dilated_memory_pool import MemoryPool, PoolLimitError

MakePool = Callable[..., MemoryPool]


def ignore(event: object) -> None:
    """An observer."""


class NoSizeClasses:
    """Has no round_up."""


# (arguments, the error, its message from the start)
CONSTRUCTOR: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mode": ({"mode": "fast"}, ValueError, "mode: expected 'lightweight' or 'full', got 'fast'"),
    "mode-none": ({"mode": None}, ValueError, "mode: expected 'lightweight' or 'full', got None"),
    "backend": ({"backend": "gpu"}, ValueError, "backend: expected one of ['auto', 'host', 'pinned', 'cupy', 'torch']"),
    "observers": (
        {"mode": "lightweight", "observers": [ignore]},
        ValueError,
        "observers: expected none in lightweight mode",
    ),
    "arena-bytes": (
        {"mode": "lightweight", "arena_bytes": "1MiB"},
        ValueError,
        "arena_bytes: expected None in lightweight mode",
    ),
    "arena-bytes-negative": (
        {"mode": "full", "arena_bytes": -1},
        ValueError,
        "arena_bytes: expected at least 0, got -1",
    ),
    "arena-bytes-type": (
        {"mode": "full", "arena_bytes": 1.5},
        TypeError,
        "arena_bytes: expected a number of bytes or text such as '2GiB', got 1.5",
    ),
    "streams": ({"strict_streams": True}, ValueError, "strict_streams: expected False, as the host"),
    "device": ({"device": 0}, ValueError, "device: expected None for memory of the host, got 0"),
    "limit-fraction": ({"limit": 1.5}, ValueError, "limit: expected a fraction in (0, 1], got 1.5"),
    "limit-no-fraction": ({"limit": 0.0}, ValueError, "limit: expected a fraction in (0, 1], got 0.0"),
    "limit-negative": ({"limit": -1}, ValueError, "limit: expected at least 0, got -1"),
    "limit-text": ({"limit": "lots"}, ValueError, "limit: expected text like '4096', '64MiB' or '1.5GB', got 'lots'"),
    "limit-unit": ({"limit": "3 parsecs"}, ValueError, "limit: expected text like '4096', '64MiB' or '1.5GB'"),
    "limit-type": ({"limit": [1]}, TypeError, "limit: expected a number of bytes or text such as '2GiB', got [1]"),
    "min-bytes-negative": ({"min_bytes": -1}, ValueError, "min_bytes: expected at least 0, got -1"),
    "min-bytes-bool": ({"min_bytes": True}, TypeError, "min_bytes: expected a number of bytes or text"),
    "min-bytes-none": ({"min_bytes": None}, TypeError, "min_bytes: expected a number of bytes or text"),
    "classes-name": ({"size_classes": "fibonacci"}, ValueError, "size_classes: expected one of ['exact', 'geometric'"),
    "classes-empty": ({"size_classes": []}, ValueError, "size_classes: expected one or more positive sizes, got ()"),
    "classes-zero": ({"size_classes": [0, 4096]}, ValueError, "size_classes: expected one or more positive sizes"),
    "classes-negative": ({"size_classes": [-1]}, ValueError, "size_classes: expected at least 0, got -1"),
    "classes-type": ({"size_classes": [1.5]}, TypeError, "size_classes: expected a number of bytes or text"),
    "classes-object": (
        {"size_classes": NoSizeClasses()},
        TypeError,
        "size_classes: expected a name, bins or an object with round_up",
    ),
}


@pytest.mark.parametrize(("options", "kind", "message"), CONSTRUCTOR.values(), ids=list(CONSTRUCTOR))
def test_the_constructor_says_what_is_wrong(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        MemoryPool(**{"backend": "host"} | options)
    assert str(caught.value).startswith(message)


def test_device_beside_a_backend_object_is_refused() -> None:
    with pytest.raises(ValueError, match="device: expected None beside a backend object, got 0 beside"):
        MemoryPool(FakeBackend(FakeDevice()), device=0)


METHODS: dict[str, tuple[Callable[[MemoryPool], Any], type[Exception], str]] = {
    "allocate-negative": (lambda pool: pool.allocate(-1), ValueError, "nbytes: expected at least 0, got -1"),
    "allocate-float": (lambda pool: pool.allocate(1.5), TypeError, "nbytes: expected a number of bytes or text"),  # type: ignore[arg-type]
    "allocate-text": (lambda pool: pool.allocate("much"), ValueError, "nbytes: expected text like"),
    "reserve-negative": (lambda pool: pool.reserve(-1), ValueError, "nbytes: expected at least 0, got -1"),
    "reserve-text": (lambda pool: pool.reserve("1 GiBB"), ValueError, "nbytes: expected text like"),
    "trim-negative": (lambda pool: pool.trim(-1), ValueError, "keep_bytes: expected at least 0, got -1"),
    "trim-none": (lambda pool: pool.trim(None), TypeError, "keep_bytes: expected a number of bytes or text"),  # type: ignore[arg-type]
    "limit-negative": (lambda pool: pool.set_limit(-1), ValueError, "limit: expected at least 0, got -1"),
    "limit-fraction": (lambda pool: pool.set_limit(2.0), ValueError, "limit: expected a fraction in (0, 1], got 2.0"),
    "owns": (lambda pool: pool.owns("text"), TypeError, "owner: expected a tensor or a block, got str"),  # type: ignore[arg-type]
    "stream": (
        lambda pool: pool.record_stream(pool.allocate(1), 0),
        ValueError,
        "record_stream needs a backend with streams, and host has none",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), METHODS.values(), ids=list(METHODS))
def test_the_methods_say_what_is_wrong(
    make_on_host: MakePool, call: Callable[[MemoryPool], Any], kind: type[Exception], message: str
) -> None:
    pool = make_on_host()
    with pytest.raises(kind) as caught:
        call(pool)
    assert str(caught.value).startswith(message)
    assert pool.statistics().ooms == 0


def test_record_stream_refuses_memory_of_others_and_what_is_no_stream(make_on_host: MakePool) -> None:
    pool = MemoryPool(FakeBackend(FakeDevice()))
    with pytest.raises(ValueError, match="owner: expected memory of this pool, got other"):
        pool.record_stream(make_on_host().allocate(1), 1)
    with pytest.raises(TypeError):
        pool.record_stream(pool.allocate(1), "text")


def test_cupy_is_not_served_from_the_hosts_memory(make_on_host: MakePool) -> None:
    pytest.importorskip("dilated_memory_pool.interop.cupy")
    with pytest.raises((ValueError, ImportError)):
        make_on_host().share_with_cupy()


CLOSED: dict[str, Callable[[MemoryPool], Any]] = {
    "allocate": lambda pool: pool.allocate(1),
    "reserve": lambda pool: pool.reserve(1),
    "empty": lambda pool: pool.empty(1),
    "zeros": lambda pool: pool.zeros(1),
}


@pytest.mark.parametrize("call", CLOSED.values(), ids=list(CLOSED))
def test_a_closed_pool_serves_nobody(make_on_host: MakePool, call: Callable[[MemoryPool], Any]) -> None:
    if call in (CLOSED["empty"], CLOSED["zeros"]):
        pytest.importorskip("torch")
    pool = make_on_host()
    pool.close()
    pool.close()  # twice is as once
    with pytest.raises(RuntimeError, match="the pool is closed"):
        call(pool)
    assert pool.statistics().reserved_bytes == 0
    assert repr(pool).endswith(" closed>")


def test_the_limit_names_all_numbers(make_on_host: MakePool) -> None:
    pool = make_on_host(limit="1MiB")
    kept = pool.allocate("512KiB")
    with pytest.raises(PoolLimitError) as caught:
        pool.allocate("1MiB")
    assert str(caught.value).startswith("the pool's limit is reached: requested 1 MiB, allocated 512 KiB, reserved ")
    assert "limit 1 MiB" in str(caught.value)
    assert (caught.value.requested, caught.value.allocated, caught.value.limit) == (2**20, 2**19, 2**20)
    assert kept.nbytes == 2**19


def test_sizes_may_be_given_as_text(make_on_host: MakePool) -> None:
    pool = make_on_host(limit="1.5 GiB", min_bytes="2kB")
    assert pool.statistics().limit_bytes == 3 * 2**29
    assert pool.min_bytes == 2000
    pool.set_limit(None)
    assert pool.statistics().limit_bytes is None
    pool.set_limit(0.5)
    assert pool.statistics().limit_bytes == pool.backend.total_bytes // 2
    pool.reserve("1MiB")
    assert pool.trim("0") >= 2**20
