"""BlockLayout: which blocks of keys every block of query rows attends. Immutable, compressed rows, no dense table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dilated_block_sparse.layout import algebra, block_mask, checks, files, lists, picture, tables
from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.layout.constructors import Constructors

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class BlockLayout(Constructors):
    """Blocks of a (q_len, kv_len) attention that are live, for every head or for all heads alike.

    The last block of rows or columns is shorter where the length is no multiple. A live block is attended whole: one
    softmax a row, over the keys of all its live blocks, each key once.

    A layout lies in CPU memory and takes 4 bytes a live block. It never changes; plans are kept with it. Two layouts
    are equal where their sizes and live blocks are.

    Attributes:
        q_len, kv_len: tokens.
        block_size: (rows, columns), tokens in a block.
        heads: 1 where all heads share the layout, else one layout a head.
        indptr: (heads, q_blocks + 1), int64: row i of head h has indices[indptr[h, i] : indptr[h, i + 1]].
        indices: (live blocks,), int32: their columns, rising in each row.

    >>> layout = BlockLayout.local(1024, 1) | BlockLayout.global_(1024, 1, 0)
    >>> layout
    BlockLayout(q_len=1024, kv_len=1024, block_size=(128, 128), heads=1, live=28, density=0.438)
    >>> layout.row(5)
    [0, 4, 5, 6]
    """

    indptr: Tensor
    indices: Tensor

    def __init__(
        self,
        indptr: Tensor,
        indices: Tensor,
        q_len: int,
        kv_len: int,
        *,
        block_size: BlockSize = 128,
    ) -> None:
        """Check and keep copies of ``indptr`` and ``indices``.

        Raises:
            TypeError: not integer tensors, or sizes that are no ints.
            ValueError: shapes that do not fit, or a row whose columns do not rise or are out of range; it is named.
        """
        self.q_len = checks.length("q_len", q_len)
        self.kv_len = checks.length("kv_len", kv_len)
        self.block_size = checks.block_size(block_size)
        with torch.inference_mode(False):  # a tensor of inference mode could not be saved for a backward
            self.indptr, self.indices = checks.compressed_rows(indptr, indices, self.q_blocks, self.kv_blocks)
        self.heads = self.indptr.shape[0]
        self.plans: dict[Any, Any] = {}
        _LIVING[_place(self.indptr, self.indices)] = self

    # -------------------------------------------------------------------------------------------- sizes

    @property
    def q_blocks(self) -> int:
        """Blocks of query rows."""
        return -(-self.q_len // self.block_size[0])

    @property
    def kv_blocks(self) -> int:
        """Blocks of keys."""
        return -(-self.kv_len // self.block_size[1])

    @property
    def live(self) -> int:
        """Live blocks, of all heads together."""
        return len(self.indices)

    @cached_property
    def density(self) -> float:
        """Live (query, key) pairs over all of them; 0 where there are none. Short blocks count by their tokens."""
        return algebra.density(self)

    def row(self, block: int, head: int = 0) -> list[int]:
        """The live columns of a row of blocks, rising.

        Raises:
            TypeError, ValueError: there is no such row of blocks, or no such head.
        """
        checks.index("block", block, self.q_blocks)
        checks.index("head", head, self.heads)
        start, stop = self.indptr[head, block : block + 2].tolist()
        columns: list[int] = self.indices[start:stop].tolist()
        return columns

    # -------------------------------------------------------------------------------------------- identity

    def key(self) -> str:
        """A text that is the same for equal layouts, in every process, and another for others: for caches."""
        return self._key

    @cached_property
    def _key(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.indptr, self.indices):
            digest.update(algebra.bytes_of(tensor))
        rows, columns = self.block_size
        return f"blocks_q{self.q_len}_k{self.kv_len}_b{rows}x{columns}_h{self.heads}_{digest.hexdigest()}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        return self is other or self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return (
            f"BlockLayout(q_len={self.q_len}, kv_len={self.kv_len}, block_size={self.block_size}, heads={self.heads}, "
            f"live={self.live}, density={self.density:.3g})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.indptr, self.indices, self.q_len, self.kv_len, self.block_size)

    def validate(self) -> BlockLayout:
        """Check the compressed rows again, as at construction, forget what was made of them, and return self.

        For who has written to them: plans, key and density are otherwise those of before.

        Raises:
            ValueError: as the constructor.
        """
        checks.compressed_rows(self.indptr, self.indices, self.q_blocks, self.kv_blocks)
        self.plans.clear()
        for name in ("density", "_key", "_transposed"):
            self.__dict__.pop(name, None)
        return self

    # -------------------------------------------------------------------------------------------- algebra

    def __or__(self, other: BlockLayout) -> BlockLayout:
        """Blocks that live in either. A layout that all heads share goes with one a head.

        Raises:
            TypeError: the other side is no BlockLayout.
            ValueError: other lengths, another block size, or other heads.
        """
        return algebra.union(self, other)

    def __and__(self, other: BlockLayout) -> BlockLayout:
        """Blocks that live in both; as ``|`` otherwise."""
        return algebra.intersection(self, other)

    def __sub__(self, other: BlockLayout) -> BlockLayout:
        """Blocks that live here and not in the other; as ``|`` otherwise."""
        return algebra.difference(self, other)

    def causal(self) -> BlockLayout:
        """Without the blocks whose every key comes after every row: what ``is_causal`` can see. Row i sees key j <= i.

        Blocks on the diagonal stay whole here; ``is_causal=True`` masks inside them.

        >>> layout = BlockLayout.from_rows([[0, 2], [0, 1], [0, 1, 2]], q_len=300, kv_len=300)
        >>> [layout.causal().row(block) for block in range(3)]
        [[0], [0, 1], [0, 1, 2]]

        Raises:
            ValueError: q_len that is not kv_len.
        """
        return algebra.causal(self)

    @property
    def T(self) -> BlockLayout:  # noqa: N802  as in torch
        """Rows and columns exchanged."""
        return self._transposed

    @cached_property
    def _transposed(self) -> BlockLayout:
        return algebra.transpose(self)

    def q_slice(self, start: int, stop: int) -> BlockLayout:
        """Rows of tokens ``start`` to ``stop`` as a layout; both are on the edges of blocks, or the end.

        Raises:
            TypeError, ValueError: they are no such positions.

        >>> layout = BlockLayout.from_rows([[0], [0, 1], [2]], q_len=300, kv_len=300)
        >>> layout.q_slice(128, 300)
        BlockLayout(q_len=172, kv_len=300, block_size=(128, 128), heads=1, live=3, density=0.673)
        """
        return algebra.q_slice(self, start, stop)

    def kv_slice(self, start: int, stop: int) -> BlockLayout:
        """Keys of tokens ``start`` to ``stop`` as a layout; both are on the edges of blocks, or the end.

        Raises:
            TypeError, ValueError: they are no such positions.
        """
        return algebra.kv_slice(self, start, stop)

    def head(self, head: int) -> BlockLayout:
        """The layout of one head.

        Raises:
            TypeError, ValueError: there is no such head.
        """
        checks.index("head", head, self.heads)
        return algebra.select_heads(self, [head])

    @classmethod
    def stack(cls, layouts: Sequence[BlockLayout]) -> BlockLayout:
        """Layouts of the same sizes, the heads of one after those of the other.

        Raises:
            TypeError, ValueError: none, something else than a BlockLayout, or other sizes.
        """
        return algebra.stack(layouts)

    # -------------------------------------------------------------------------------------------- conversions

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Iterable[int]] | Sequence[Sequence[Iterable[int]]],
        q_len: int,
        kv_len: int,
        *,
        block_size: BlockSize = 128,
    ) -> BlockLayout:
        """A layout from the live columns of every row of blocks, in any order; one list a head where it is nested.

        Raises:
            TypeError: columns that are no ints.
            ValueError: not one list a row of blocks, or columns that come twice or are out of range; the row is named.

        >>> BlockLayout.from_rows([[0], [1, 0], [2]], q_len=300, kv_len=300).row(1)
        [0, 1]
        >>> BlockLayout.from_rows([[[0], [1]], [[0], [0, 1]]], q_len=200, kv_len=200).heads
        2
        """
        return tables.from_rows(rows, q_len, kv_len, block_size)

    @classmethod
    def from_dense(cls, mask: Tensor, *, block_size: BlockSize = 128) -> BlockLayout:
        """The blocks in which ``mask``, bool (q_len, kv_len) or (heads, q_len, kv_len), is True.

        Raises:
            TypeError: no bool tensor.
            ValueError: another shape, or a block that is live in part; it is named.
        """
        return tables.from_dense(mask, block_size)

    def to_dense(self) -> Tensor:
        """The token mask, bool (heads, q_len, kv_len): True where attended. For tests and small sizes."""
        return tables.to_dense(self)

    @classmethod
    def from_blocks(cls, blocks: Tensor, q_len: int, kv_len: int, *, block_size: BlockSize = 128) -> BlockLayout:
        """A layout from a bool table of blocks, (q_blocks, kv_blocks) or (heads, q_blocks, kv_blocks).

        Raises:
            TypeError: no bool tensor.
            ValueError: another shape than the lengths and the block size make.
        """
        return tables.from_blocks(blocks, q_len, kv_len, block_size)

    def to_blocks(self) -> Tensor:
        """The table of blocks, bool (heads, q_blocks, kv_blocks)."""
        return tables.to_blocks(self)

    @classmethod
    def from_block_mask(cls, mask: BlockMask) -> BlockLayout:
        """The blocks of a FlexAttention BlockMask of batch 1, of which none may be live in part.

        Of those that ``to_block_mask`` made, the partial blocks count whole: for ``is_causal`` it is the causal layout.

        Raises:
            TypeError: not a BlockMask.
            ValueError: a batch other than 1, or a partial block; the first is named.
        """
        return block_mask.from_block_mask(mask)

    def to_block_mask(self, *, is_causal: bool = False, device: torch.device | str | None = None) -> BlockMask:
        """The same as a FlexAttention BlockMask, whose mask_mod looks the block up in a table.

        It keeps 17 bytes a block, live or not: above 1 GiB it is refused. Name the device here: ``BlockMask.to`` leaves
        the mask_mod's table where it is. Partial blocks are those on the diagonal, with ``is_causal``, and short ones.

        Raises:
            ValueError: more than 1 GiB; with ``is_causal``, q_len that is not kv_len.
        """
        return block_mask.to_block_mask(self, is_causal=is_causal, device=device)

    def to_bsr(self, *, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """(indptr, indices), int32, of a layout that heads share, as FlashInfer's block-sparse wrapper takes them.

        >>> indptr, indices = BlockLayout.from_rows([[1], [0, 1]], 256, 256).to_bsr()
        >>> indptr.tolist(), indices.tolist()
        ([0, 1, 3], [1, 0, 1])

        Raises:
            ValueError: a layout of several heads, or kv_len that is no multiple of a block.
        """
        return lists.to_bsr(self, device=device)

    @classmethod
    def from_bsr(
        cls, indptr: Tensor, indices: Tensor, q_len: int, kv_len: int, *, block_size: BlockSize = 128
    ) -> BlockLayout:
        """The inverse of ``to_bsr``; columns may come in any order.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        return lists.from_bsr(indptr, indices, q_len, kv_len, block_size)

    def to_lists(self, *, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """(counts (1, heads, q_blocks), columns (1, heads, q_blocks, most)), int32, as FlashAttention-4 takes them.

        They are its ``full_block_cnt`` and ``full_block_idx``. ``most`` is the longest row: one makes all as wide.

        >>> counts, columns = BlockLayout.from_rows([[1], [0, 1]], 256, 256).to_lists()
        >>> counts.tolist(), columns.tolist()
        ([[[1, 2]]], [[[[1, 0], [0, 1]]]])
        """
        return lists.to_lists(self, device=device)

    @classmethod
    def from_lists(
        cls, counts: Tensor, columns: Tensor, q_len: int, kv_len: int, *, block_size: BlockSize = 128
    ) -> BlockLayout:
        """The inverse of ``to_lists``; columns may come in any order.

        Raises:
            TypeError, ValueError: as the constructor; a batch other than 1.
        """
        return lists.from_lists(counts, columns, q_len, kv_len, block_size)

    # -------------------------------------------------------------------------------------------- files, pictures

    def save(self, path: str | Path) -> None:
        """Write it to a file that ``load`` reads: 4 bytes a live block, and 8 for each row of blocks and head."""
        files.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> BlockLayout:
        """Read what ``save`` wrote, and check it. Nothing in the file is executed.

        Raises:
            OSError: no file that can be read.
            ValueError: a damaged file, one of something else, or one of a later version; the path is named.
        """
        return files.load(path)

    def draw(self, path: str | Path | None = None, *, heads: Sequence[int] | None = None) -> Any:
        """Draw the blocks, one panel a head, tokens along both axes; needs the extra "plot".

        Args:
            path: where to save it, PNG or what else matplotlib knows by the suffix; None saves nothing.
            heads: which heads, of which the first 16 are drawn; None for all.

        Returns:
            matplotlib's Figure.

        Raises:
            ImportError: matplotlib is not installed; the message names the extra.
            ValueError: a head that the layout does not have, or none.
        """
        return picture.draw(self, path, heads=heads)


# Layouts by where their tensors lie: an operator is given the tensors, and plans are kept with the layout. Weak.
_LIVING: WeakValueDictionary[tuple[Any, ...], BlockLayout] = WeakValueDictionary()


def _place(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple((tensor.data_ptr(), tensor.device, tuple(tensor.shape), tensor.stride()) for tensor in tensors)


def living(indptr: Tensor, indices: Tensor) -> BlockLayout | None:
    """The layout whose own tensors these are, if it lives."""
    return _LIVING.get(_place(indptr, indices))


def _unpickle(indptr: Tensor, indices: Tensor, q_len: int, kv_len: int, block_size: tuple[int, int]) -> BlockLayout:
    return BlockLayout(indptr, indices, q_len, kv_len, block_size=block_size)
