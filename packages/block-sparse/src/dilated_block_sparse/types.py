"""The attention types that this distribution registers: entry points of the group "dilated.attention".

Each has two builders, ``attention`` and ``multihead``, called by keyword with the pattern, the sizes and options.
``dilated_factory`` finds them; nothing here knows of it. The ring is imported when one of its modules is built.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from dilated_block_sparse.layout import BlockSize, checks
from dilated_block_sparse.modules import BlockSparseAttention, BlockSparseMultiheadAttention
from dilated_block_sparse.pattern import LayoutLike, Pattern
from dilated_core import DilatedPattern
from dilated_core import checks as core_checks

# What sparsity_ratio alone means.
DEFAULT_PATTERN = "dilated_sparse"
# The options by which the factory lends what it has to any type.
_LENT = ("allocator", "patterns", "kernel")
# Tokens in a block, as of BlockLayout's constructors.
DEFAULT_BLOCK = 128


class Builders(NamedTuple):
    """The two builders of a type, both called by keyword.

    Attributes:
        attention: (segment_lengths, dilation_rates, **options) -> module of (query, key, value), heads apart.
        multihead: (embed_dim, num_heads, segment_lengths, dilation_rates, **options) -> module.
    """

    attention: Callable[..., nn.Module]
    multihead: Callable[..., nn.Module]


def choose_layout(
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    layout: LayoutLike | None = None,
    pattern: str | None = None,
    sparsity_ratio: float | None = None,
    block_size: BlockSize | None = None,
    seed: int | None = None,
    is_causal: bool = False,
) -> LayoutLike:
    """The layout that a builder's options mean.

    Args:
        segment_lengths, dilation_rates: LongNet's branches. Alone they mean LongNet with blocks for tokens: segments
            of as many blocks as hold ``segment_lengths``, of which every ``dilation_rates``-th is seen, all branches in
            one set. (The blocks that hold a pair of LongNet itself, ``BlockLayout.longnet``, are whole segments where
            rates are below the block size.) Beside ``layout`` or ``sparsity_ratio`` they must be the paper's, which the
            factory gives where its caller gave none.
        layout: a layout, Pattern or function, taken as it is, with none of the following.
        pattern: a name that ``BlockLayout.named`` takes, with sparsity_ratio; "dilated_sparse" by default.
        sparsity_ratio: the share of blocks that is left out.
        block_size: tokens in a block, or (rows, columns); None for the constructor's own.
        seed: of patterns that are drawn, with sparsity_ratio; None for the constructor's own.
        is_causal: whether the layout is for causal attention, so that the share is one of the blocks it can see.

    Raises:
        TypeError, ValueError: an option of a wrong type or value, or two that contradict.

    >>> choose_layout([64, 256], [1, 4], block_size=16)
    Pattern('dilated', block_size=16, rate=1, segment=4) | Pattern('dilated', block_size=16, rate=4, segment=16)
    """
    branches = DilatedPattern(segment_lengths, dilation_rates)
    size = {} if block_size is None else {"block_size": block_size}
    given = {"pattern": pattern, "sparsity_ratio": sparsity_ratio, "block_size": block_size, "seed": seed}
    if layout is not None:
        _refuse_beside("layout", {**given, "segment_lengths": _lengths_unless_default(branches)})
        return layout
    if sparsity_ratio is not None:
        core_checks.probability("sparsity_ratio", sparsity_ratio)
        _refuse_beside("sparsity_ratio", {"segment_lengths": _lengths_unless_default(branches)})
        drawn = {} if seed is None else {"seed": seed}
        causal = {"is_causal": True} if is_causal else {}
        name = DEFAULT_PATTERN if pattern is None else pattern
        return Pattern(name, sparsity_ratio=sparsity_ratio, **size, **drawn, **causal)
    for name, value in (("pattern", pattern), ("seed", seed)):
        if value is not None:
            raise ValueError(
                f"{name}: expected None without sparsity_ratio, got {value!r} "
                "(a pattern by numbers of its own is a Pattern, given as layout)"
            )
    tokens = DEFAULT_BLOCK if block_size is None else checks.block_size(block_size)[1]
    layouts = []
    for segment_length, rate in zip(branches.segment_lengths, branches.dilation_rates, strict=True):
        segment = -(-segment_length // tokens)
        layouts.append(Pattern("dilated", segment=segment, rate=min(rate, segment), **size))
    return functools.reduce(operator.or_, layouts)


def _builder(module: Callable[..., nn.Module], like: type[nn.Module] | None = None) -> Callable[..., nn.Module]:
    """A builder, called by keyword, of a module on the layout that its options mean.

    Args:
        module: called with ``layout=`` and what else it is built with.
        like: the class whose parameters, with those of ``choose_layout`` in the place of its layout, are the options
            that the builder's signature shows. None for any: the module refuses those it does not know, and of its own
            the signature shows those by which pools, caches and kernels are given.
    """
    of_layout = inspect.signature(choose_layout).parameters

    def build(**options: Any) -> nn.Module:
        own = {name: options.pop(name) for name in of_layout if name in options and name != "is_causal"}
        chosen = choose_layout(**own, is_causal=options.get("is_causal", False))
        return module(layout=chosen, **options)

    own = inspect.signature(like or BlockSparseAttention).parameters
    others = [one for name, one in own.items() if name not in of_layout and (like or name in _LENT)]
    shown = [one.replace(kind=one.KEYWORD_ONLY) for one in (*of_layout.values(), *others)]
    rest = [] if like else [inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)]
    build.__signature__ = inspect.Signature([*shown, *rest])  # type: ignore[attr-defined]
    return build


def _of_ring(name: str) -> Callable[..., nn.Module]:
    """A class of the room that imports dilated_ring, found when it is called: ImportError there names the extra."""

    def make(**options: Any) -> nn.Module:
        try:
            room = importlib.import_module("dilated_block_sparse.ring.modules")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "dilated_ring":
                raise
            raise ImportError(
                f'{name} needs dilated-ring, which is not installed: pip install "dilated-block-sparse[ring]"'
            ) from error
        made = getattr(room, name)
        known = inspect.signature(made).parameters
        for option in options:
            if option not in known:
                sizes = ("segment_lengths", "dilation_rates", "embed_dim", "num_heads")
                every = dict.fromkeys((*inspect.signature(choose_layout).parameters, *known))
                others = ", ".join(one for one in every if one not in sizes)
                raise TypeError(f'{option}: attention type "block_sparse_ring" has no such option, only {others}')
        module: nn.Module = made(**options)
        return module

    return make


block_sparse = Builders(
    _builder(BlockSparseAttention, BlockSparseAttention),
    _builder(BlockSparseMultiheadAttention, BlockSparseMultiheadAttention),
)
block_sparse_ring = Builders(
    _builder(_of_ring("BlockSparseRingAttention")), _builder(_of_ring("BlockSparseRingMultiheadAttention"))
)


def _lengths_unless_default(branches: DilatedPattern) -> list[int] | None:
    return None if branches == DilatedPattern.longnet() else list(branches.segment_lengths)


def _refuse_beside(name: str, others: dict[str, object]) -> None:
    for other, value in others.items():
        if value is not None:
            raise ValueError(f"{other}: expected None beside {name}, which says which blocks live, got {value!r}")
