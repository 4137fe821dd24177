"""The plan: which query rows meet which key rows, as ranges and strides. A pure function of sizes, no tensors.

A branch of rate r gives each head every r-th position of each segment, starting at the head's *phase*. Heads of one
phase lie a constant step apart, and so do the heads from one phase to the next. A *run* of heads is therefore one
strided view: one step of the phase is one step of the position. A Tile is such a view, over equal segments.

What the three semantics differ in, as far as rows and keys go, is written here and nowhere else: the phase of a head
(``head_phases``), and the zero keys that torchscale's padding adds (``Tile.phantoms``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

SEMANTICS = ("paper", "torchscale", "grouped")


class Tile(NamedTuple):
    """Equal sub-problems of one branch: ``segments`` x ``groups`` x ``phases`` squares of ``rows`` queries and keys.

    Row i of segment s, head group g, phase p is position ``start + s * segment_length + p + i * rate`` of head
    ``first_head + g * group_step + p * phase_step``.
    """

    start: int  # position of the first row of the first head
    segments: int
    segment_length: int  # positions from one segment to the next
    rate: int  # positions from one row to the next
    rows: int
    first_head: int
    groups: int  # heads of one phase
    group_step: int  # from one of them to the next
    phases: int
    phase_step: int  # heads from one phase to the next
    phantoms: int = 0  # zero keys (score 0, value 0) that every row meets beside the real ones

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
        stride = (
            batch,
            self.segment_length * seq,
            self.group_step * head,
            seq + self.phase_step * head,
            self.rate * seq,
            *rest,
        )
        offset = tensor.storage_offset() + self.start * seq + self.first_head * head
        return tensor.as_strided(size, stride, offset)

    def lanes(self, tensor: Tensor) -> Tensor | None:
        """Show the same as the kernels take it, where that is one strided view: (batch * segments, heads, rows, ...).

        Args:
            tensor: (batch, seq, heads, ...), any strides.

        Returns:
            The view, or None where batch and segments, or groups and phases, do not join without a copy.
        """
        batch, seq, head, *rest = tensor.stride()
        segment, group, phase = self.segment_length * seq, self.group_step * head, seq + self.phase_step * head
        if self.segments == 1:
            segment = batch
        elif tensor.shape[0] > 1 and batch != self.segments * segment:
            return None
        if self.phases == 1:
            phase = group
        elif self.groups > 1 and group != self.phases * phase:
            return None
        size = (tensor.shape[0] * self.segments, self.heads, self.rows, *tensor.shape[3:])
        offset = tensor.storage_offset() + self.start * seq + self.first_head * head
        return tensor.as_strided(size, (segment, phase, self.rate * seq, *rest), offset)

    def part(self, first: int, last: int) -> Tile:
        """The same tile, segments ``first`` up to ``last`` only."""
        return self._replace(start=self.start + first * self.segment_length, segments=last - first)


def head_phases(semantics: str, branch: int, branches: int, rate: int, heads: int) -> tuple[int | None, ...]:
    """The phase of every head in a branch: where in a segment its grid of rate ``rate`` starts. None: not in it.

    - "paper": head j starts at j mod rate (arXiv 2307.02486, eq. 9).
    - "torchscale": each block of ceil(heads / rate) heads shares a phase.
    - "grouped": the heads are split over the branches, the first ones taking one more; all heads of branch i start at
      i mod rate.

    >>> head_phases("paper", 0, 1, rate=3, heads=5)
    (0, 1, 2, 0, 1)
    >>> head_phases("torchscale", 0, 1, rate=3, heads=5)
    (0, 0, 1, 1, 2)
    >>> head_phases("grouped", 1, 2, rate=3, heads=5)
    (None, None, None, 1, 1)
    """
    if semantics == "paper":
        return tuple(head % rate for head in range(heads))
    if semantics == "torchscale":
        return tuple(head // -(-heads // rate) for head in range(heads))
    share, more = divmod(heads, branches)
    first = branch * share + min(branch, more)
    last = first + share + (branch < more)
    return tuple(branch % rate if first <= head < last else None for head in range(heads))


class Run(NamedTuple):
    """Heads ``first_head + g * group_step + p * phase_step``, of phase ``first_phase + p``."""

    first_phase: int
    phases: int
    phase_step: int
    first_head: int
    groups: int
    group_step: int


@lru_cache(maxsize=1024)
def branch_runs(semantics: str, branch: int, branches: int, rate: int, heads: int, chosen: range) -> tuple[Run, ...]:
    """The chosen heads of a branch, numbered from 0 in the order chosen, as the fewest runs."""
    phase_of = head_phases(semantics, branch, branches, rate, heads)
    members: dict[int, list[int]] = {}
    for index, head in enumerate(chosen):
        phase = phase_of[head]
        if phase is not None:
            members.setdefault(phase, []).append(index)
    runs: list[Run] = []
    for phase, group in sorted(members.items()):
        run = Run(phase, 1, 0, group[0], len(group), group[1] - group[0] if len(group) > 1 else 0)
        if runs:
            last = runs[-1]
            step = run.first_head - last.first_head - (last.phases - 1) * last.phase_step
            follows = phase == last.first_phase + last.phases and last[4:] == run[4:]
            if follows and step > 0 and (last.phases == 1 or step == last.phase_step):
                runs[-1] = last._replace(phases=last.phases + 1, phase_step=step)
                continue
        runs.append(run)
    return tuple(runs)


def _segments(segment_length: int, seq_len: int) -> Iterator[tuple[int, int, int]]:
    """(start, count, length): the whole segments, then the short one at the ragged end."""
    count, tail = divmod(seq_len, segment_length)
    if count:
        yield 0, count, segment_length
    if tail:
        yield count * segment_length, 1, tail


class Cut(NamedTuple):
    """A tile that holds some rows of each of its segments, as where a shard ends inside a segment.

    Attributes:
        tile: the rows.
        row: number of the tile's first row among the rows that its heads have in the whole segment.
        of: how many those are.
        run: the run that the tile's heads come from, and phase: which of its phases is the tile's first.
    """

    tile: Tile
    row: int
    of: int
    run: int
    phase: int


def cut_segments(
    runs: Sequence[Run],
    rate: int,
    *,
    start: int,
    segments: int,
    segment_length: int,
    length: int,
    first: int,
    stop: int,
    full_rows: int = 0,
) -> Iterator[Cut]:
    """The rows that equal segments have between two positions, as few tiles.

    Args:
        runs: the branch's heads, see ``branch_runs``.
        rate: the branch's dilation rate.
        start: where position ``first`` of the first segment lies in the tensors.
        segments: how many segments, ``segment_length`` positions apart, each of ``length`` positions.
        first, stop: the positions within each segment, 0 <= first <= stop <= length.
        full_rows: the rows that zero keys fill each segment up to, 0 for none.
    """
    # Phases below an edge have a row more before it than the others.
    edges = sorted({0, first % rate, stop % rate, length % rate, rate})
    for first_phase, last_phase in pairwise(edges):
        row, end, of = (-(-(position - first_phase) // rate) for position in (first, stop, length))
        if row >= end:
            continue
        for number, run in enumerate(runs):
            low = max(first_phase, run.first_phase)
            high = min(last_phase, run.first_phase + run.phases)
            if low < high:
                phase = low - run.first_phase
                tile = Tile(
                    start=start + row * rate + low - first,
                    segments=segments,
                    segment_length=segment_length,
                    rate=rate,
                    rows=end - row,
                    first_head=run.first_head + phase * run.phase_step,
                    groups=run.groups,
                    group_step=run.group_step,
                    phases=high - low,
                    phase_step=run.phase_step,
                    phantoms=max(0, full_rows - of),
                )
                yield Cut(tile, row, of, number, phase)


def make_tiles(
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    seq_len: int,
    heads: int,
    *,
    semantics: str = "paper",
    is_causal: bool = False,
    chosen: range | None = None,
) -> list[Tile]:
    """Cut dilated attention over ``seq_len`` positions and ``heads`` heads into tiles, rate 1 first.

    Args:
        segment_lengths, dilation_rates: the pattern, already checked.
        seq_len, heads: positions and query heads of the whole attention.
        semantics: "paper", "torchscale" or "grouped", see ``head_phases``.
        is_causal: whether rows look back only; torchscale's padding, which comes last, is then never seen.
        chosen: the heads that the tensors hold, all by default; the tiles number them from 0.

    Raises:
        ValueError: "torchscale" with several segments of a length that its rate does not divide.

    >>> make_tiles((4,), (2,), seq_len=8, heads=2)[0]._asdict()  # both heads in one: head 1 starts a position later
    {'start': 0, 'segments': 2, 'segment_length': 4, 'rate': 2, 'rows': 2, 'first_head': 0, 'groups': 1,
     'group_step': 0, 'phases': 2, 'phase_step': 1, 'phantoms': 0}
    """
    chosen = range(heads) if chosen is None else chosen
    tiles = []
    for branch, (segment_length, rate) in enumerate(zip(segment_lengths, dilation_rates, strict=True)):
        segment_length = min(segment_length, max(seq_len, 1))
        if semantics == "torchscale":
            check_torchscale(branch, segment_length, rate, seq_len)
        full_rows = padded_rows(semantics, segment_length, rate, is_causal=is_causal)
        runs = branch_runs(semantics, branch, len(dilation_rates), rate, heads, chosen)
        for start, segments, length in _segments(segment_length, seq_len):
            cuts = cut_segments(
                runs,
                rate,
                start=start,
                segments=segments,
                segment_length=segment_length,
                length=length,
                first=0,
                stop=length,
                full_rows=full_rows,
            )
            tiles += [cut.tile for cut in cuts]
    return sorted(tiles, key=lambda tile: tile.rate)


def padded_rows(semantics: str, segment_length: int, rate: int, *, is_causal: bool) -> int:
    """The rows that torchscale's zero keys fill each segment up to; 0 where none are seen."""
    return -(-segment_length // rate) if semantics == "torchscale" and not is_causal else 0


def check_torchscale(branch: int, segment_length: int, rate: int, seq_len: int) -> None:
    """Refuse what torchscale itself computes wrongly: it puts such segments back in the wrong places.

    Raises:
        ValueError: more than one segment, of a length that ``rate`` does not divide.
    """
    if segment_length % rate and segment_length < seq_len:
        raise ValueError(
            f'segment_lengths[{branch}]: semantics="torchscale" needs a multiple of dilation_rates[{branch}] = {rate} '
            f"where a sequence has several segments, got {segment_length} for {seq_len} tokens (torchscale pads each "
            f"segment and puts the results back in the wrong places, which no checkpoint should rely on; use "
            f'semantics="paper" or another length)'
        )
