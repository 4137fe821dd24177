"""Many values made before they are needed, by one thread or by several: the work of ``PatternCache.warm``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

from dilated_pattern_cache.checks import whole
from dilated_pattern_cache.statistics import WarmReport
from dilated_pattern_cache.values import devices

if TYPE_CHECKING:
    from torch import device as Device

    from dilated_pattern_cache.cache import PatternCache

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def warm(
    cache: PatternCache[K, V],
    patterns: Mapping[K, Callable[[], V]] | Iterable[tuple[K, Callable[[], V]]],
    *,
    device: Device | str | None,
    pin: bool,
    workers: int,
    progress: Callable[[int, int, K], object] | None,
) -> WarmReport:
    """See ``PatternCache.warm``."""
    workers = whole("workers", workers)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a callable, got {progress!r}")
    pairs = [(key, create) for key, create in (patterns.items() if isinstance(patterns, Mapping) else patterns)]
    for key, create in pairs:
        cache._check_key(key)
        if not callable(create):
            raise TypeError(f"create: expected a callable, got {create!r} for {key!r}")
    if device is not None:
        device = devices.canonical(device)  # the caller's current one: every thread has its own
    created = []  # appending is whole under any number of threads

    def make(key: K, create: Callable[[], V]) -> K:
        def counted() -> V:
            created.append(key)
            return create()

        cache.get_or_create(key, counted, device=device)
        if pin:
            with suppress(KeyError):  # it could not be kept
                cache.pin(key)
        return key

    masters, started = cache._store.masters, perf_counter()
    rejections, evictions = masters.rejections.value, masters.evictions
    for done, key in enumerate(_results(make, pairs, workers), start=1):
        if progress is not None:
            progress(done, len(pairs), key)
    if device is not None:
        cache._maker.finish(device)
    return WarmReport(
        created=len(created),
        found=len(pairs) - len(created),
        rejected=masters.rejections.value - rejections,
        evicted=masters.evictions - evictions,
        seconds=perf_counter() - started,
    )


def _results(
    make: Callable[[K, Callable[[], V]], K], pairs: list[tuple[K, Callable[[], V]]], workers: int
) -> Iterator[K]:
    """``make`` of all pairs, as they are done."""
    if workers == 1:
        for pair in pairs:
            yield make(*pair)
        return
    executor = ThreadPoolExecutor(workers, thread_name_prefix="warm")
    try:  # no future has a name here: an exception that one holds would hold this frame
        yield from map(Future.result, as_completed([executor.submit(make, *pair) for pair in pairs]))
    finally:
        executor.shutdown(cancel_futures=True)
