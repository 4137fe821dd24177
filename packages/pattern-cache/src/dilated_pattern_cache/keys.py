"""Keys of attention patterns: what a pattern depends on, in fields that are checked, compared and printed.

A key has a text, ``str(key)``, that is the same in every process and no other key's. Two keys are equal where their
texts are: ``1``, ``1.0`` and ``True``, which Python takes for equal, are not the same option here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, TypeAlias

from dilated_pattern_cache.checks import check_name, fraction, truth, whole

Option: TypeAlias = "int | float | bool | str"


class PatternKey(ABC):
    """What the keys have in common. A subclass is a dataclass, ``frozen=True, eq=False``, that says its ``text``.

    Attributes:
        kind: what its values are, for statistics by kind.
    """

    kind: ClassVar[str]
    _text: str

    @abstractmethod
    def text(self) -> str:
        """What the fields say, the type of each told apart: the same in every process, and no other key's."""

    def __post_init__(self) -> None:
        self._set(_text=self.text())

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def __str__(self) -> str:
        return self._text

    def __hash__(self) -> int:
        return hash(self._text)  # which the string remembers

    def __eq__(self, other: object) -> bool:
        return self is other or (type(self) is type(other) and self._text == other._text)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class DilatedIndexKey(PatternKey):
    """The positions that dilated attention visits: of all branches and heads of a layer.

    Args:
        seq_len: tokens.
        segment_lengths: of the branches.
        dilation_rates: of the branches.
        heads: of queries.
        semantics: of dilated attention.

    Raises:
        TypeError, ValueError: a field is no such number or name; the branches have no rate each.

    >>> key = DilatedIndexKey(65536, [2048, 4096], [1, 2], heads=8)
    >>> print(key)
    dilated_s65536_seg2048-4096_dil1-2_h8_paper
    >>> key == DilatedIndexKey(65536, (2048, 4096), (1, 2), heads=8)
    True
    """

    kind: ClassVar[str] = "dilated"
    seq_len: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    heads: int = 1
    semantics: str = "paper"

    def __post_init__(self) -> None:
        self._set(seq_len=whole("seq_len", self.seq_len, least=0), heads=whole("heads", self.heads))
        self._set(**_branches(self.segment_lengths, self.dilation_rates))
        check_name("semantics", self.semantics)
        super().__post_init__()

    def text(self) -> str:
        """See ``PatternKey``."""
        branches = _branches_text(self.segment_lengths, self.dilation_rates)
        return f"dilated_s{self.seq_len}_{branches}_h{self.heads}_{self.semantics}"


@dataclass(frozen=True, eq=False)
class BlockLayoutKey(PatternKey):
    """A layout of blocks: which blocks of keys every block of queries attends to.

    Args:
        seq_len: tokens.
        pattern: the name of the constructor, such as "local" or "bigbird".
        ratio: of the blocks that are kept, where the pattern is chosen by it.
        block_size: tokens in a block, or (rows, columns).
        heads: layouts in it.
        is_causal: whether later keys are left out.
        options: what else the constructor is given, by name: "window", "seed", ...

    >>> print(BlockLayoutKey(8192, "local", ratio=0.1, block_size=128, options={"window": 3}))
    sparse_s8192_tlocal_r0.1_b128x128_h1_full_window=3
    """

    kind: ClassVar[str] = "sparse"
    seq_len: int
    pattern: str
    ratio: float | None = None
    block_size: tuple[int, int] = (128, 128)
    heads: int = 1
    is_causal: bool = False
    options: tuple[tuple[str, Option], ...] = ()

    def __post_init__(self) -> None:
        check_name("pattern", self.pattern)
        if self.ratio is not None:
            self._set(ratio=fraction("ratio", self.ratio))
        self._set(
            seq_len=whole("seq_len", self.seq_len, least=0),
            block_size=_block_size(self.block_size),
            heads=whole("heads", self.heads),
            is_causal=truth("is_causal", self.is_causal),
            options=_options(self.options),
        )
        super().__post_init__()

    def text(self) -> str:
        """See ``PatternKey``."""
        ratio = "" if self.ratio is None else f"_r{self.ratio!r}"
        rows, columns = self.block_size
        shape = f"b{rows}x{columns}_h{self.heads}_{_causality(self.is_causal)}"
        return f"sparse_s{self.seq_len}_t{self.pattern}{ratio}_{shape}{_options_text(self.options)}"


@dataclass(frozen=True, eq=False)
class BlockMaskKey(PatternKey):
    """A block mask, such as FlexAttention's.

    Args:
        q_len, kv_len: tokens.
        mask: the name of the mask function. Two functions must not have one name.
        block_size: tokens in a block, or (rows, columns).
        batch, heads: for how many the mask is made; None where it is the same for all.
        options: what else the mask depends on, by name.

    >>> print(BlockMaskKey(8192, 8192, "causal", options={"window": 1024}))
    mask_q8192_k8192_tcausal_b128x128_Ball_hall_window=1024
    """

    kind: ClassVar[str] = "mask"
    q_len: int
    kv_len: int
    mask: str
    block_size: tuple[int, int] = (128, 128)
    batch: int | None = None
    heads: int | None = None
    options: tuple[tuple[str, Option], ...] = ()

    def __post_init__(self) -> None:
        check_name("mask", self.mask)
        for name in ("batch", "heads"):
            if (value := getattr(self, name)) is not None:
                self._set(**{name: whole(name, value)})
        self._set(
            q_len=whole("q_len", self.q_len, least=0),
            kv_len=whole("kv_len", self.kv_len, least=0),
            block_size=_block_size(self.block_size),
            options=_options(self.options),
        )
        super().__post_init__()

    def text(self) -> str:
        """See ``PatternKey``."""
        rows, columns = self.block_size
        batch, heads = ("all" if count is None else count for count in (self.batch, self.heads))
        shape = f"b{rows}x{columns}_B{batch}_h{heads}"
        return f"mask_q{self.q_len}_k{self.kv_len}_t{self.mask}_{shape}{_options_text(self.options)}"


@dataclass(frozen=True, eq=False)
class CommunicationPlanKey(PatternKey):
    """A plan of which rank sends which rows to which, for a sequence that is sharded over ``world_size`` ranks.

    Args:
        seq_len: tokens on all ranks together.
        segment_lengths, dilation_rates: of the branches.
        heads: of queries.
        world_size: ranks.
        is_causal: whether later keys are left out.
        semantics: of dilated attention.
        bounds: where shards begin and the last one ends, world_size + 1 positions; None for even shards.

    >>> print(CommunicationPlanKey(65536, [2048], [1], heads=8, world_size=4, is_causal=True))
    plan_s65536_seg2048_dil1_h8_w4_causal_paper
    """

    kind: ClassVar[str] = "plan"
    seq_len: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    heads: int
    world_size: int
    is_causal: bool = False
    semantics: str = "paper"
    bounds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_name("semantics", self.semantics)
        self._set(
            seq_len=whole("seq_len", self.seq_len, least=0),
            heads=whole("heads", self.heads),
            world_size=whole("world_size", self.world_size),
            is_causal=truth("is_causal", self.is_causal),
            **_branches(self.segment_lengths, self.dilation_rates),
        )
        if self.bounds is not None:
            bounds = tuple(whole("bounds", bound, least=0) for bound in self.bounds)
            if len(bounds) != self.world_size + 1 or bounds[0] != 0 or bounds[-1] != self.seq_len:
                expected = f"world_size + 1 = {self.world_size + 1} positions from 0 to seq_len={self.seq_len}"
                raise ValueError(f"bounds: expected {expected}, got {bounds}")
            if any(first > last for first, last in pairwise(bounds)):
                raise ValueError(f"bounds: expected positions that do not fall, got {bounds}")
            self._set(bounds=bounds)
        super().__post_init__()

    def text(self) -> str:
        """See ``PatternKey``."""
        branches = _branches_text(self.segment_lengths, self.dilation_rates)
        ranks = f"h{self.heads}_w{self.world_size}_{_causality(self.is_causal)}_{self.semantics}"
        bounds = "" if self.bounds is None else "_at" + "-".join(map(str, self.bounds))
        return f"plan_s{self.seq_len}_{branches}_{ranks}{bounds}"


# -------------------------------------------------------------------------------------------------- checks


def _branches(segment_lengths: Iterable[int], dilation_rates: Iterable[int]) -> dict[str, tuple[int, ...]]:
    lengths = tuple(whole("segment_lengths", length) for length in segment_lengths)
    rates = tuple(whole("dilation_rates", rate) for rate in dilation_rates)
    if not lengths or len(lengths) != len(rates):
        raise ValueError(
            "segment_lengths, dilation_rates: expected one entry of each for every branch, "
            f"got {len(lengths)} and {len(rates)}"
        )
    return {"segment_lengths": lengths, "dilation_rates": rates}


def _block_size(value: Any) -> tuple[int, int]:
    sizes = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(sizes) != 2:
        raise ValueError(f"block_size: expected a number of tokens or (rows, columns), got {value!r}")
    return whole("block_size", sizes[0]), whole("block_size", sizes[1])


def _options(value: Any) -> tuple[tuple[str, Option], ...]:
    pairs = list(value.items() if isinstance(value, Mapping) else value)
    for name, option in pairs:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"options: expected names like those of Python's arguments, got {name!r}")
        if isinstance(option, str):
            check_name(f"options[{name!r}]", option)
        elif not isinstance(option, int | float):
            raise TypeError(f"options[{name!r}]: expected a number, True, False or a name, got {option!r}")
        elif math.isnan(option):
            raise ValueError(f"options[{name!r}]: expected a number that equals itself, got NaN")
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"options: expected different names, got {names}")
    return tuple(sorted((name, option) for name, option in pairs))


# -------------------------------------------------------------------------------------------------- text


def _branches_text(segment_lengths: tuple[int, ...], dilation_rates: tuple[int, ...]) -> str:
    return f"seg{'-'.join(map(str, segment_lengths))}_dil{'-'.join(map(str, dilation_rates))}"


def _causality(is_causal: bool) -> str:
    return "causal" if is_causal else "full"


def _options_text(options: tuple[tuple[str, Option], ...]) -> str:
    return "".join(f"_{name}={option!r}" for name, option in options)
