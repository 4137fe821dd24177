"""The plan: which query rows meet which key rows, as ranges and strides. A pure function of sizes, no tensors.

A branch of rate r gives head j every r-th position of each segment, starting at j mod r. Walk along the heads and the
start moves along by one position a head, until it wraps at r. So a *run* of heads with rising phase is one strided
view: one step of the head index is one step of the position. A Tile is such a view, over equal segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Tile(NamedTuple):
    """Equal sub-problems of one branch: ``segments`` x ``groups`` x ``phases`` squares of ``rows`` queries and keys.

    Row i of segment s, head group g, phase p is position ``start + s * segment_length + p + i * rate`` of head
    ``first_head + g * rate + p``.
    """

    start: int  # position of the first row of the first head
    segments: int
    segment_length: int  # positions from one segment to the next
    rate: int  # positions from one row to the next, heads from one group to the next
    rows: int
    first_head: int
    groups: int
    phases: int

    @property
    def heads(self) -> int:
        """Heads in the tile."""
        return self.groups * self.phases

    def view(self, tensor: Tensor) -> Tensor:
        """Show the tile's part of ``tensor``, without copying.

        Args:
            tensor: (batch, seq, heads, ...), any strides.

        Returns:
            (batch, segments, groups, phases, rows, ...).
        """
        batch, seq, head, *rest = tensor.stride()
        size = (tensor.shape[0], self.segments, self.groups, self.phases, self.rows, *tensor.shape[3:])
        stride = (batch, self.segment_length * seq, self.rate * head, seq + head, self.rate * seq, *rest)
        offset = tensor.storage_offset() + self.start * seq + self.first_head * head
        return tensor.as_strided(size, stride, offset)

    def part(self, first: int, last: int) -> Tile:
        """The same tile, segments ``first`` up to ``last`` only."""
        return self._replace(start=self.start + first * self.segment_length, segments=last - first)


def _segments(segment_length: int, seq_len: int) -> Iterator[tuple[int, int, int]]:
    """(start, count, length): the whole segments, then the short one at the ragged end."""
    count, tail = divmod(seq_len, segment_length)
    if count:
        yield 0, count, segment_length
    if tail:
        yield count * segment_length, 1, tail


def _head_runs(rate: int, heads: int, first_head: int) -> Iterator[tuple[int, int, int, int]]:
    """(first head, groups, phases, first phase): maximal runs of heads whose phase rises by one a head."""
    lead_phase = first_head % rate
    lead = min(heads, rate - lead_phase) if lead_phase else 0
    if lead:
        yield 0, 1, lead, lead_phase
    groups, rest = divmod(heads - lead, rate)
    if groups:
        yield lead, groups, rate, 0
    if rest:
        yield lead + groups * rate, 1, rest, 0


def make_tiles(
    segment_lengths: tuple[int, ...],
    dilation_rates: tuple[int, ...],
    seq_len: int,
    heads: int,
    first_head: int = 0,
) -> list[Tile]:
    """Cut LongNet attention over ``seq_len`` positions and ``heads`` heads into tiles, the branches in order.

    Args:
        segment_lengths, dilation_rates: the pattern, already checked.
        seq_len, heads: the sizes of the tensors that the tiles will view.
        first_head: the global index of the tensors' head 0, where they hold a slice of the heads.

    >>> make_tiles((4,), (2,), seq_len=8, heads=2)  # both heads in one tile: head 1 starts one position later
    [Tile(start=0, segments=2, segment_length=4, rate=2, rows=2, first_head=0, groups=1, phases=2)]
    """
    tiles = []
    for segment_length, rate in zip(segment_lengths, dilation_rates, strict=True):
        for start, segments, length in _segments(segment_length, seq_len):
            # Phases below `length % rate` own one row more than the others.
            short, longer = divmod(length, rate)
            for first_phase, last_phase, rows in ((0, longer, short + 1), (longer, rate, short)):
                if rows == 0:
                    continue
                for head, groups, run, run_phase in _head_runs(rate, heads, first_head):
                    low, high = max(first_phase, run_phase), min(last_phase, run_phase + run)
                    if low < high:
                        tiles.append(
                            Tile(
                                start=start + low,
                                segments=segments,
                                segment_length=segment_length,
                                rate=rate,
                                rows=rows,
                                first_head=head + low - run_phase,
                                groups=groups,
                                phases=high - low,
                            )
                        )
    return tiles
