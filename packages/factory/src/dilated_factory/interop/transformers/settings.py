"""What a model's config says about its attention, checked: the entries ``dilated`` and ``block_sparse``.

Both are plain dictionaries, so that they survive a config's JSON. Imports dilated_core; dilated_block_sparse only
where a layout is made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from dilated_core import DilatedPattern, checks
from dilated_factory import registry
from dilated_factory.request import make_pattern

if TYPE_CHECKING:
    from dilated_block_sparse import BlockLayout
    from dilated_block_sparse.pattern import Layouts

# One entry of a config's patterns: its items, sorted.
Described: TypeAlias = tuple[tuple[tuple[str, Any], ...], ...]
# Unions of patterns whose last layouts are kept: those of a few models.
_KEPT_PATTERNS = 8


@dataclass(frozen=True)
class DilatedSettings:
    """The entry ``dilated``: a pattern, and how it is computed."""

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    semantics: str = "paper"
    kernel: str = "auto"

    @classmethod
    def from_arguments(
        cls,
        segment_lengths: Sequence[int] | None,
        dilation_rates: Sequence[int] | None,
        semantics: str | None,
        kernel: str | None,
    ) -> DilatedSettings | None:
        """The defaults that a caller gave; None where there are none.

        Raises:
            TypeError, ValueError: one is missing beside another, or of a wrong type or value.

        >>> DilatedSettings.from_arguments([64, 256], [1, 4], None, None)
        DilatedSettings(segment_lengths=(64, 256), dilation_rates=(1, 4), semantics='paper', kernel='auto')
        """
        if segment_lengths is None and dilation_rates is None:
            for name, value in (("semantics", semantics), ("kernel", kernel)):
                if value is not None:
                    raise ValueError(f"{name}: expected None without segment_lengths, got {value!r}")
            return None
        pattern = make_pattern(segment_lengths, dilation_rates)
        return cls(
            pattern.segment_lengths,
            pattern.dilation_rates,
            checks.semantics("paper" if semantics is None else semantics),
            checks.kernel("auto" if kernel is None else kernel),
        )

    @classmethod
    def from_config(cls, name: str, entry: object) -> DilatedSettings:
        """The settings that a config's entry means. Raises TypeError or ValueError, naming the entry."""
        given = _entry(name, entry, ("segment_lengths", "dilation_rates"), ("semantics", "kernel"))
        pattern = DilatedPattern(given["segment_lengths"], given["dilation_rates"])
        return cls(
            pattern.segment_lengths,
            pattern.dilation_rates,
            checks.semantics(given.get("semantics", "paper")),
            checks.kernel(given.get("kernel", "auto")),
        )


@dataclass(frozen=True)
class BlockSparseSettings:
    """The entry ``block_sparse``: a union of named patterns, and how it is computed."""

    patterns: Described
    backend: str = "auto"
    kernel: str = "auto"

    @classmethod
    def from_config(cls, name: str, entry: object) -> BlockSparseSettings:
        """The settings that a config's entry means. The patterns' own options are checked when a layout is made."""
        given = _entry(name, entry, ("patterns",), ("block_size", "backend", "kernel"))
        patterns = given["patterns"]
        if isinstance(patterns, str) or not isinstance(patterns, Sequence):
            raise TypeError(f"{name}.patterns: expected a list of dicts, got {patterns!r}")
        if not patterns:
            raise ValueError(f"{name}.patterns: expected at least one pattern, got none")
        everywhere = {"block_size": given["block_size"]} if "block_size" in given else {}
        described = []
        for index, pattern in enumerate(patterns):
            if not isinstance(pattern, Mapping) or not isinstance(pattern.get("name"), str):
                raise TypeError(
                    f'{name}.patterns[{index}]: expected a dict with a "name", as {{"name": "local", "window": 2}}, '
                    f"got {pattern!r}"
                )
            described.append({**everywhere, **pattern})
        return cls(
            _frozen(described),
            checks.choice(f"{name}.backend", given.get("backend", "auto"), ("auto", "tiles", "flex")),
            checks.kernel(given.get("kernel", "auto")),
        )

    def layout(self, seq_len: int) -> BlockLayout:
        """The layout of that many tokens; the last ones asked for are kept, since every layer asks.

        Raises:
            ImportError: dilated_block_sparse is not installed; the message names the extra.
            TypeError, ValueError: a pattern has no such name or option, or a value is out of its range.
        """
        return make_layout(self.patterns, seq_len)


def of_module(
    module: nn.Module, name: str, defaults: Any, from_config: Callable[[str, object], Any], example: Mapping[str, Any]
) -> Any:
    """The settings of one attention module: its config's entry ``name``, or else the defaults.

    Raises:
        ValueError: there is neither; the message shows an ``example`` of an entry.
    """
    entry = getattr(getattr(module, "config", None), name, None)
    if entry is not None:
        return from_config(f"config.{name}", entry)
    if defaults is None:
        raise ValueError(
            f'config.{name}: expected a dict, as {dict(example)}, for attn_implementation="{name}", got None (or give '
            "defaults to register_transformers)"
        )
    return defaults


def _entry(name: str, entry: object, needed: Sequence[str], optional: Sequence[str]) -> Mapping[str, Any]:
    """Return the entry if it is a mapping with these keys. Raises TypeError or ValueError."""
    if not isinstance(entry, Mapping):
        raise TypeError(f"{name}: expected a dict, got {entry!r} of type {type(entry).__name__}")
    for key in entry:
        if key not in needed and key not in optional:
            raise ValueError(f"{name}: expected the keys {[*needed, *optional]}, got {key!r}")
    for key in needed:
        if key not in entry:
            raise ValueError(f"{name}: expected the key {key!r}, got only {list(entry)}")
    return entry


def _frozen(value: Any) -> Any:
    """A value of JSON as one that can be hashed, and that torch.compile takes for a constant."""
    if isinstance(value, Mapping):
        return tuple((key, _frozen(value[key])) for key in sorted(value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_frozen(each) for each in value)
    return value


# A trace runs this as it is and takes the layout for a constant of that length.
def make_layout(patterns: Described, seq_len: int) -> BlockLayout:
    """The layout of that many tokens; see ``BlockSparseSettings.layout``."""
    return _layouts(patterns).of(seq_len)


# What torch.compiler.assume_constant_result sets; calling it would load the whole compiler with this file.
make_layout._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=_KEPT_PATTERNS)
def _layouts(patterns: Described) -> Layouts:
    try:
        from dilated_block_sparse.pattern import Layouts, Pattern
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "dilated_block_sparse":
            raise
        raise registry.NotInstalledError(
            'attn_implementation: "block_sparse" is provided by dilated-block-sparse, which is not installed: '
            f"{registry.install_command('block_sparse')}"
        ) from error
    parts = []
    for index, described in enumerate(patterns):
        options = dict(described)
        try:
            parts.append(Pattern(options.pop("name"), **options))
        except (TypeError, ValueError) as error:
            raise type(error)(f"config.block_sparse.patterns[{index}]: {error}") from error
    return Layouts(reduce(operator.or_, parts), None)
