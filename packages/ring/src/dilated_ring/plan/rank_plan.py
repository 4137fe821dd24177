"""What one rank does: the segments of its own, and of every branch that crosses, the strips it sends and gets."""

from __future__ import annotations

from typing import NamedTuple

from dilated_core.plan import Tile
from dilated_ring.plan.crossing import Branch, Crossing, Strip


class Bundle(NamedTuple):
    """What goes from the owner of rows to who attends them, and what comes back.

    Attributes:
        peer: the other rank; the rank itself where nothing travels.
        share: the key heads that are attended.
        strips: of each block of heads, the owner's rows.
        key_blocks: of each block, the block that its keys are sent with.
    """

    peer: int
    share: range
    strips: tuple[tuple[Strip, ...], ...]
    key_blocks: tuple[int, ...]

    def blocks(self, of_keys: bool) -> list[int]:
        """The blocks whose rows are sent: of queries all, of keys each once."""
        return [block for block, keys in enumerate(self.key_blocks) if not of_keys or block == keys]


class Segment(NamedTuple):
    """A crossing segment, as one of its ranks sees it.

    Attributes:
        crossing: the segment.
        lent: the rank's own rows, one bundle for each rank that attends them.
        gathered: the rows that the rank attends, one bundle for each owner.
        rows: of what is gathered.
        lanes: of what is gathered, of each block.
        share: as in the bundles of what it gathers.
        key_blocks: the same.
        own: the rank's own rows, of each block.
        whole: the whole segment, of each block.
    """

    crossing: Crossing
    lent: tuple[Bundle, ...]
    gathered: tuple[Bundle, ...]
    rows: int
    lanes: tuple[int, ...]
    share: range
    key_blocks: tuple[int, ...]
    own: tuple[tuple[Strip, ...], ...]
    whole: tuple[tuple[Strip, ...], ...]


class Route(NamedTuple):
    """A branch that crosses, as one rank sees it.

    Attributes:
        branch: which.
        by_heads: whether ranks attend whole heads; else their own rows, with the keys of all others.
        segments: those that the rank shares: none, one, or one at each end of its shard.
    """

    branch: Branch
    by_heads: bool
    segments: tuple[Segment, ...]


class RankPlan(NamedTuple):
    """What one rank does.

    Attributes:
        rank: which.
        world_size: of how many.
        inner: of each block of heads, the tiles that lie in its shard altogether, rate 1 first.
        routes: of each branch that crosses anywhere; all ranks have the same branches here.
    """

    rank: int
    world_size: int
    inner: tuple[tuple[Tile, ...], ...]
    routes: tuple[Route, ...]


def make_route(branch: Branch, crossings: list[Crossing], rank: int, by_heads: bool) -> Route:
    """One branch at one rank; ``crossings`` are those that it shares."""
    return Route(branch, by_heads, tuple(_segment(crossing, rank) for crossing in crossings))


def _segment(crossing: Crossing, rank: int) -> Segment:
    branch = crossing.branch
    blocks = range(branch.blocks)
    found: dict[tuple[int, range, tuple[range, ...]], tuple[tuple[Strip, ...], ...]] = {}

    def strips(owner: int, attending: int) -> tuple[tuple[Strip, ...], ...]:
        wanted = owner, crossing.share(attending), crossing.phases_met(attending)
        if wanted not in found:  # many ranks want the same of one
            found[wanted] = tuple(crossing.strips(owner, block, *wanted[1:]) for block in blocks)
        return found[wanted]

    def bundle(owner: int, attending: int) -> Bundle:
        share = crossing.share(attending)
        peer = attending if owner == rank else owner
        return Bundle(peer, share, strips(owner, attending), branch.key_blocks(share))

    share = crossing.share(rank)
    return Segment(
        crossing,
        lent=tuple(bundle(rank, peer) for peer in crossing.ranks if crossing.sends(rank, peer)),
        gathered=tuple(bundle(peer, rank) for peer in crossing.ranks if crossing.sends(peer, rank)),
        rows=crossing.gathered_rows(rank),
        lanes=tuple(crossing.gathered_lanes(block, share) for block in blocks),
        share=share,
        key_blocks=branch.key_blocks(share),
        own=tuple(crossing.strips(rank, block, share) for block in blocks),
        whole=tuple(crossing.whole(block, share) for block in blocks) if crossing.by_heads else (),
    )
