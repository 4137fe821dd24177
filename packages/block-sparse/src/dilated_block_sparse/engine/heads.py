"""Which heads are attended together."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dilated_block_sparse.layout import BlockLayout


class HeadBlock(NamedTuple):
    """Heads that are attended together.

    Attributes:
        layout_head: the head of the layout that they follow.
        queries, keys: the heads. With one key head, all of these query heads are of its group.
    """

    layout_head: int
    queries: slice
    keys: slice

    @property
    def kv_heads(self) -> int:
        """Key heads in it."""
        return int(self.keys.stop) - int(self.keys.start)


def head_blocks(query: Tensor, key: Tensor, layout: BlockLayout, blocks: int, *, split_groups: bool) -> list[HeadBlock]:
    """Cut the heads into ``blocks`` at least, where there are as many; heads with layouts of their own are apart.

    Args:
        split_groups: whether query heads that share a key head may be apart, so that a block is small.
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    group = heads // kv_heads
    if layout.heads == 1 and group == 1:
        size = -(-heads // blocks)
        return [HeadBlock(0, own, own) for own in (slice(at, min(at + size, heads)) for at in range(0, heads, size))]
    if layout.heads in (1, kv_heads):
        parts = min(group, -(-blocks // kv_heads)) if split_groups else 1
        size = -(-group // parts)
        return [
            HeadBlock(head % layout.heads, slice(at, min(at + size, (head + 1) * group)), slice(head, head + 1))
            for head in range(kv_heads)
            for at in range(head * group, (head + 1) * group, size)
        ]
    return [HeadBlock(head, slice(head, head + 1), slice(head // group, head // group + 1)) for head in range(heads)]


def heads_of(tensor: Tensor, heads: slice) -> Tensor:
    """These heads of (batch, seq, heads, ...)."""
    return tensor if heads == slice(0, tensor.shape[2]) else tensor[:, :, heads]
