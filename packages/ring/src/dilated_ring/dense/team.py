"""Who works on one sequence together: a ring of ranks, ranks that exchange heads, both, or one device alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from dilated_ring.comm import Comm, Group, Purpose, agree_with_ticket, comm_of, refuse, together
from dilated_ring.errors import DisagreementError

# Of a call's agreements, among those who exchange heads and round the ring; None where there was none.
Tickets = tuple[int | None, int | None]


class Team(NamedTuple):
    """One rank's doors to the others. Shards are numbered row by row: ranks that exchange heads are neighbours.

    Attributes:
        ring: to the ranks that keys travel round; None for none.
        heads: to the ranks that exchange heads; None for none.
    """

    ring: Comm | None = None
    heads: Comm | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Ranks in the ring, ranks that exchange heads."""
        return 1 if self.ring is None else self.ring.size, 1 if self.heads is None else self.heads.size

    @property
    def place(self) -> tuple[int, int]:
        """This rank's number in either."""
        return 0 if self.ring is None else self.ring.rank, 0 if self.heads is None else self.heads.rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.shape[0] * self.shape[1]

    @property
    def rank(self) -> int:
        """The number of this rank's shard."""
        return self.place[0] * self.shape[1] + self.place[1]

    def agree(
        self, call: Mapping[str, object], length: int, of_forward: Tickets = (None, None)
    ) -> tuple[list[int], Tickets]:
        """Make sure that all ranks were called alike, see ``dilated_ring.comm.agree``.

        Args:
            of_forward: in a backward, the tickets of the forward that it belongs to.

        Returns:
            Every rank's length, and the tickets of this agreement.

        Raises:
            DisagreementError: on every rank.
        """
        row, heads_ticket, ring_ticket = [length], None, None
        if self.heads is not None:
            try:
                row, heads_ticket = self._agree(
                    self.heads, f"row {self.place[0]}", {**call, "call": of_forward[0]}, length
                )
            except DisagreementError as error:
                if self.ring is not None:
                    refuse(self.ring, error)
                raise
        if self.ring is None or self.ring.size == 1:
            return row, (heads_ticket, None)
        column = f"column {self.place[1]}"
        lengths, ring_ticket = self._agree(self.ring, column, {**call, "call": of_forward[1]}, sum(row))
        return lengths if self.heads is None else _rows(self.ring, row), (heads_ticket, ring_ticket)

    def _agree(self, comm: Comm, where: str, call: Mapping[str, object], length: int) -> tuple[list[int], int]:
        """``agree_with_ticket`` of some of the ranks; where they are not all, errors say which."""
        try:
            return agree_with_ticket(comm, call, length)
        except DisagreementError as error:
            if comm.size == self.size:
                raise
            raise DisagreementError(f"in {where} of the mesh, {error}") from None

    def refuse(self, error: Exception) -> None:
        """Tell the others, who are about to agree, that this rank raises ``error`` instead."""
        for comm in (self.heads, self.ring):
            if comm is not None:
                refuse(comm, error)

    def together(self) -> AbstractContextManager[None]:
        """Give up both dimensions where this rank fails in the midst of a call, see ``dilated_ring.comm.together``."""
        return together(self.ring, self.heads)


def team_of(group: Group | Team) -> Team:
    """The team of a group: its ranks form a ring; in a mesh of two dimensions those of the second exchange heads.

    Raises:
        TypeError, ValueError, RuntimeError: see ``comm_of``.
    """
    if isinstance(group, Team):
        return group
    if isinstance(group, DeviceMesh) and group.ndim == 2:
        return Team(comm_of(group.get_group(0)), comm_of(group.get_group(1)))
    return Team(ring=comm_of(group))


def _rows(ring: Comm, row: list[int]) -> list[int]:
    """The lengths of every row of the team, this rank's row being ``row``."""
    own = torch.tensor(row, dtype=torch.int64, device=ring.device)
    every = own.new_empty(ring.size * len(row))
    counts = [len(row)] * ring.size
    ring.exchange(every, own.repeat(ring.size), counts, counts, Purpose("lengths of shards", "agreement")).wait()
    return every.tolist()
