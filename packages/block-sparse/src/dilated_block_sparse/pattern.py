"""Pattern: a layout for any length, by name and options; and the layouts that a module has made of one.

Imports dilated_core's checks and protocols, and the layouts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeAlias

from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.patterns import PATTERNS
from dilated_core import PatternStore, checks

# Lengths whose layouts a module keeps: those of training and of evaluation, and some batches padded to other lengths.
KEPT_LENGTHS = 8


@dataclass(frozen=True, init=False, repr=False)
class Pattern:
    """A layout for any length: the name of one of BlockLayout's constructors, and what else it is given.

    ``pattern(seq_len)`` is the layout. Patterns of the same content are equal, hashable and picklable.
    ``first | second`` is the pattern of the blocks that live in either.

    Args:
        name: ``local``, ``dilated``, ``global_``, ``strided``, ``random``, ``bigbird``, ``longnet``, ``hierarchical``,
            ...; with ``sparsity_ratio``, a name that ``BlockLayout.named`` takes.
        options: of the constructor, by keyword: ``window=``, ``seed=``, ``block_size=``, ``heads=``, ...

    Raises:
        TypeError: the name is no str, or the constructor has no such option or needs another; it is named.
        ValueError: there is no such constructor. The values of the options are checked when a layout is made.

    >>> pattern = Pattern("local", window=1, block_size=64) | Pattern("global_", cols=1, rows=0, block_size=64)
    >>> pattern
    Pattern('local', block_size=64, window=1) | Pattern('global_', block_size=64, cols=1, rows=0)
    >>> pattern(1000).row(9), pattern(300).row(4)
    ([0, 8, 9, 10], [0, 3, 4])
    >>> Pattern("dilated_sparse", sparsity_ratio=0.75)(4096).density
    0.25
    """

    parts: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]

    def __init__(self, name: str, /, **options: Any) -> None:
        _check_options(name, options)
        settled = tuple(sorted((option, _settled(value)) for option, value in options.items()))
        object.__setattr__(self, "parts", ((name, settled),))

    def __call__(self, seq_len: int) -> BlockLayout:
        """The layout of ``seq_len`` tokens.

        Raises:
            TypeError, ValueError: what the constructors of BlockLayout raise.
        """
        layouts = [_make(name, seq_len, dict(options)) for name, options in self.parts]
        whole = layouts[0]
        for layout in layouts[1:]:
            whole |= layout
        return whole

    def __or__(self, other: Pattern) -> Pattern:
        if not isinstance(other, Pattern):
            return NotImplemented
        joined = object.__new__(Pattern)
        object.__setattr__(joined, "parts", self.parts + other.parts)
        return joined

    def __repr__(self) -> str:
        shown = []
        for name, options in self.parts:
            words = [repr(name), *(f"{option}={value!r}" for option, value in options)]
            shown.append(f"Pattern({', '.join(words)})")
        return " | ".join(shown)


LayoutLike: TypeAlias = "BlockLayout | Pattern | Callable[[int], BlockLayout]"


class Layouts:
    """A layout, or a function of the length with the layouts it gave last: shared by copies, left out of pickles."""

    def __init__(self, source: LayoutLike, patterns: PatternStore | None) -> None:
        if not isinstance(source, BlockLayout) and not callable(source):
            raise TypeError(
                f"layout: expected a BlockLayout, a Pattern or a function of the length, got {type(source).__name__}"
            )
        self.source, self.patterns = source, patterns
        self._kept = lru_cache(maxsize=KEPT_LENGTHS)(partial(_made, source))

    def of(self, seq_len: int) -> BlockLayout:
        """The layout of that many rows."""
        # Another function than a Pattern is equal to nothing but itself, so no other module could ask for what it gave.
        if self.patterns is None or not isinstance(self.source, Pattern):
            return self._kept(seq_len)
        key = ("dilated_block_sparse.layout", self.source, seq_len)
        layout: BlockLayout = self.patterns.get_or_create(key, partial(_made, self.source, seq_len))
        return layout

    def __deepcopy__(self, memo: object) -> Layouts:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Layouts, (self.source, self.patterns)


def _made(source: LayoutLike, seq_len: int) -> BlockLayout:
    if isinstance(source, BlockLayout):
        return source
    # A thread of its own has none of the caller's modes. A layout made in them would hold an export's fake tensors, lie
    # on the default device of a ``with`` statement, or have tensors of inference mode, which training cannot save.
    with ThreadPoolExecutor(1) as apart:
        layout = apart.submit(source, seq_len).result()
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a function that returns a BlockLayout, got {type(layout).__name__}")
    return layout


def _check_options(name: str, options: dict[str, Any]) -> None:
    """Raise unless there is a constructor of that name, which takes these options and needs no other."""
    named = "sparsity_ratio" in options
    constructors = _constructors()
    checks.choice("name", name, PATTERNS if named else [one for one in constructors if one != "named"])
    accepted = dict(constructors["named" if named else name])
    for given in ("seq_len", "pattern" if named else ""):
        accepted.pop(given, None)
    for option in options:
        if option not in accepted:
            raise TypeError(f'{option}: pattern "{name}" has no such option, only {", ".join(accepted)}')
    for option, parameter in accepted.items():
        if parameter.default is parameter.empty and option not in options:
            raise TypeError(f'{option}: pattern "{name}" needs it, only {", ".join(options) or "nothing"} was given')


@lru_cache(maxsize=1)
def _constructors() -> dict[str, Mapping[str, inspect.Parameter]]:
    """The parameters of BlockLayout's constructors that take a length. Those of scores, as ``topk``, take none."""
    methods = ((name, getattr(BlockLayout, name)) for name in dir(BlockLayout) if not name.startswith("_"))
    found = {name: inspect.signature(one).parameters for name, one in methods if inspect.ismethod(one)}
    return {name: parameters for name, parameters in found.items() if "seq_len" in parameters}


def _settled(value: Any) -> Any:
    """An option's value as one that can be hashed: lists as tuples."""
    return tuple(map(_settled, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _make(name: str, seq_len: int, options: dict[str, Any]) -> BlockLayout:
    if "sparsity_ratio" in options:
        return BlockLayout.named(name, seq_len, **options)
    layout: BlockLayout = getattr(BlockLayout, name)(seq_len, **options)
    return layout
