"""Find the decided modules of a model, and what they share. Reads only: no pool, no cache and no file is made by it.

Imports torch for nn.Module, and the handles and hooks by which modules hold their resources.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from dilated_factory.decision import Decision
from dilated_factory.hooks import FollowCalls
from dilated_factory.reporting.facts import ModuleReport, OwnReport, Report, ResourcesReport
from dilated_factory.resources import SharedResources, shared_resources
from dilated_factory.resources.handles import BuffersByKind, CachedPatterns, KindOfBuffer, PooledAllocator
from dilated_memory_pool import PoolStatistics
from dilated_pattern_cache import CacheInfo

_HANDLES = (PooledAllocator, BuffersByKind, KindOfBuffer, CachedPatterns)
_MODES = ("lightweight", "full")
# The options by which a caller gives something instead of what is shared.
_OPTIONS = ("allocator", "patterns")


def report(model: nn.Module | Iterable[nn.Module]) -> Report:
    """Return the decisions of a model's attentions, and the numbers of the pools and caches they draw from.

    Numbers are those of the shared resources, so of every model that shares them.

    Args:
        model: any module, or several; of several, each one's place is the first part of its modules' names.

    Raises:
        TypeError: ``model`` is neither.

    >>> from dilated_factory import create_dilated_attention
    >>> found = report(create_dilated_attention("improved", [64], [1], sequence_length=4096))
    >>> found.modules[0].decision.pool_mode
    'lightweight'
    """
    title, named = _named(model)
    modules: list[ModuleReport] = []
    resources: list[SharedResources] = []
    own: dict[int, tuple[Any, list[str]]] = {}
    for name, module, parts in _decided(named):
        handed = list(_held(parts))
        for one in handed:
            if isinstance(one, SharedResources) and not any(one is other for other in resources):
                resources.append(one)
        given = list(_given(parts))
        for _, one in given:
            own.setdefault(id(one), (one, []))[1].append(name)
        decision = vars(module).get("decision")
        if isinstance(decision, Decision):
            index = next((place for place, one in enumerate(resources) if any(one is each for each in handed)), None)
            options = tuple(option for option in _OPTIONS if any(option == each for each, _ in given))
            modules.append(ModuleReport(name, type(module).__name__, decision, index, options))
    return Report(
        title,
        tuple(modules),
        tuple(_resources(one) for one in resources),
        tuple(found for one, names in own.values() if (found := _own(one, names)) is not None),
    )


def _named(model: object) -> tuple[str, list[tuple[str, nn.Module]]]:
    """The model's title, and every module in it once, by its dotted name."""
    if isinstance(model, nn.Module):
        return type(model).__name__, list(model.named_modules())
    several: list[Any] = list(model) if isinstance(model, Iterable) else [model]
    seen: set[nn.Module] = set()
    named: list[tuple[str, nn.Module]] = []
    for place, one in enumerate(several):
        if not isinstance(one, nn.Module):
            raise TypeError(f"model: expected an nn.Module or several, got {type(one).__name__}")
        named += one.named_modules(seen, str(place))
    return f"{len(several)} models", named


def _decided(named: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Each module with a decision and all parts that are its own; a module outside of these is a part by itself."""
    parts: dict[str, tuple[nn.Module, list[nn.Module]]] = {}
    for name, module in named:  # parents come before their children
        # Read from the module's own attributes: a wrapper (torch.compile's, say) answers with what it wraps.
        home = name if isinstance(vars(module).get("decision"), Decision) else _home(name, parts)
        parts.setdefault(home, (module, []))[1].append(module)
    yield from ((name, module, each) for name, (module, each) in parts.items())


def _home(name: str, parts: dict[str, tuple[nn.Module, list[nn.Module]]]) -> str:
    """The nearest module above ``name`` that has a decision; ``name`` where there is none."""
    above = name
    while above:
        above = above.rpartition(".")[0]
        if above in parts and isinstance(vars(parts[above][0]).get("decision"), Decision):
            return above
    return name


def _held(parts: list[nn.Module]) -> Iterator[SharedResources]:
    """The shared resources that handles and hooks of these modules lead to."""
    for part in parts:
        for value in list(vars(part).values()):
            if isinstance(value, _HANDLES):
                yield value.resources
        for hook in part._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, FollowCalls) and owner.rules.allocator is not None:
                yield owner.rules.allocator.resources


def _given(parts: list[nn.Module]) -> Iterator[tuple[str, Any]]:
    """What callers gave, by the option."""
    for part in parts:
        for option in _OPTIONS:
            value = vars(part).get(option)
            if value is not None and not isinstance(value, _HANDLES):
                yield option, value


def _resources(one: SharedResources) -> ResourcesReport:
    numbers = one.statistics()
    return ResourcesReport(
        one is shared_resources(),
        one.limit,
        # A device in the statistics has a backend already: none is made by asking for it.
        {device: one.backend(device).limit for device in sorted({device for device, _ in numbers})},
        {place: now for place, now in numbers.items() if place[1] in _MODES},
        {place: now for place, now in numbers.items() if place[1] not in _MODES},
        one.reasons(),
        one.cache_info(),
    )


def _own(one: Any, names: list[str]) -> OwnReport | None:
    """The numbers of what a caller gave; None where it has none of those that are known here."""
    modules = tuple(dict.fromkeys(names))
    if callable(getattr(one, "statistics", None)):
        numbers = one.statistics()
        pools = {"": numbers} if isinstance(numbers, PoolStatistics) else numbers
        if isinstance(pools, dict) and all(isinstance(now, PoolStatistics) for now in pools.values()):
            return OwnReport(
                type(one).__name__, modules, {str(getattr(kind, "value", kind)): now for kind, now in pools.items()}
            )
    if callable(getattr(one, "info", None)):
        info = one.info()
        if isinstance(info, CacheInfo):
            return OwnReport(type(one).__name__, modules, cache=info)
    return None
