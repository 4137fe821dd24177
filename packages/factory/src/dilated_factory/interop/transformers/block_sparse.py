"""The engine of "block_sparse": whole sequences by ``block_sparse_attention``, the last rows by their live blocks.

Imports torch and dilated_core; dilated_block_sparse only where something is attended.
"""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dilated_core.resources import Resources
from dilated_factory.interop.transformers.settings import BlockSparseSettings, Described, make_layout, of_module

if TYPE_CHECKING:
    from dilated_block_sparse import BlockLayout

_EXAMPLE = {"patterns": [{"name": "local", "window": 4}], "block_size": 64}


class BlockSparseEngine:
    """One softmax a row over the keys of its live blocks, for transformers; see ``rows.Engine``."""

    name = "block_sparse"

    def __init__(self, defaults: BlockSparseSettings | None, resources: Resources) -> None:
        self.defaults, self.resources = defaults, resources

    def settings(self, module: nn.Module) -> BlockSparseSettings:
        """What ``config.block_sparse`` says, or the defaults."""
        found: BlockSparseSettings = of_module(
            module, self.name, self.defaults, BlockSparseSettings.from_config, _EXAMPLE
        )
        return found

    def check_heads(self, settings: BlockSparseSettings, heads: int, all_heads: int | None) -> None:
        """Nothing to refuse: a layout is the same for all heads, or has a number of heads, which the call checks."""

    def whole(
        self,
        settings: BlockSparseSettings,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real: Tensor | None,
        *,
        is_causal: bool,
        scale: float | None,
        dropout_p: float,
    ) -> Tensor:
        """Self-attention over all rows."""
        layout = settings.layout(operator.index(query.shape[1]))  # a trace may not know it, and then looks
        options = {"is_causal": is_causal, "scale": scale, "dropout_p": dropout_p}
        return self._attend(settings, query, key, value, real, layout, {**options, "patterns": self.resources.patterns})

    def last_rows(
        self,
        settings: BlockSparseSettings,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real: Tensor | None,
        *,
        scale: float | None,
        dropout_p: float,
    ) -> Tensor:
        """The last rows of the causal call: one by a layout of one row, more behind rows in which nothing is live."""
        tokens = operator.index(key.shape[1])  # as in whole
        past = tokens - operator.index(query.shape[1])
        options = {"is_causal": past + 1 < tokens, "scale": scale, "dropout_p": dropout_p}
        layout = _last_layout(settings.patterns, past, tokens)
        if past + 1 == tokens:
            return self._attend(settings, query, key, value, real, layout, options)
        query = torch.cat([query.new_zeros(query.shape[0], past, *query.shape[2:]), query], 1)
        return self._attend(settings, query, key, value, real, layout, options)[:, past:]

    def _attend(
        self,
        settings: BlockSparseSettings,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real: Tensor | None,
        layout: BlockLayout,
        options: dict[str, Any],
    ) -> Tensor:
        from dilated_block_sparse import block_sparse_attention

        out: Tensor = block_sparse_attention(
            query,
            key,
            value,
            layout,
            key_padding_mask=real,
            enable_gqa=True,
            backend=settings.backend,
            kernel=settings.kernel,
            allocator=self.resources.allocator,
            **options,
        )
        return out


# A trace takes the layout for a constant of its lengths, as that of a whole sequence (settings.make_layout).
def _last_layout(patterns: Described, past: int, tokens: int) -> BlockLayout:
    return _make_last_layout(patterns, past, tokens)


_last_layout._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Every layer of a model asks for the same at each step.
@lru_cache(maxsize=8)
def _make_last_layout(patterns: Described, past: int, tokens: int) -> BlockLayout:
    """The layout of the rows from ``past``: of one row alone, or of all rows with nothing live in those before.

    Raises:
        ValueError: rows before ``past`` have other blocks at this length than they had when they were attended.
    """
    layout = make_layout(patterns, tokens).causal()
    rows, columns = layout.block_size
    first = past // rows
    _check_unchanged(make_layout(patterns, past).causal(), layout, past)
    if tokens - past == 1:
        live = [[layout.row(first, head)] for head in range(layout.heads)]
        return type(layout).from_rows(live, 1, tokens, block_size=(1, columns))
    nothing: list[list[int]] = [[] for _ in range(first)]
    live = [nothing + [layout.row(row, head) for row in range(first, layout.q_blocks)] for head in range(layout.heads)]
    return type(layout).from_rows(live, tokens, tokens, block_size=(rows, columns))


def _check_unchanged(before: BlockLayout, now: BlockLayout, past: int) -> None:
    rows, columns = -(-past // now.block_size[0]), -(-past // now.block_size[1])
    if not torch.equal(_live(before, rows, columns), _live(now, rows, columns)):
        raise ValueError(
            "config.block_sparse.patterns: expected blocks that do not depend on the length, but the first "
            f"{past} tokens have others once more follow, so that generating with a cache would be another function "
            "(give patterns by numbers of blocks, or use_cache=False)"
        )


def _live(layout: BlockLayout, rows: int, columns: int) -> Tensor:
    """Head, row and column of the live blocks among the first rows and columns, int64 (blocks, 3)."""
    counts = layout.indptr.diff(dim=1).flatten()
    place = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
    blocks = torch.stack([place // layout.q_blocks, place % layout.q_blocks, layout.indices.to(torch.int64)], 1)
    return blocks[(blocks[:, 1] < rows) & (blocks[:, 2] < columns)]
