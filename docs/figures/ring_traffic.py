"""Who sends how much to whom: one branch by "gather" and by "heads", beside a dense ring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import style
import torch

from dilated_ring import RingPlan, make_plan, ring_attention
from dilated_ring.comm import Comm, RecordingComm, run_ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS, HEADS, HEAD_DIM, RANKS, RATE = 256, 8, 64, 4, 4
DTYPE = torch.bfloat16

Matrix = list[list[int]]  # bytes from each rank (row) to each other (column)


def plan(exchange: str) -> RingPlan:
    """One branch whose only segment is the whole sequence."""
    return make_plan(TOKENS, [TOKENS], [RATE], HEADS, RANKS, exchange=exchange)


def planned(exchange: str) -> Matrix:
    """What the plan says, forward."""
    return plan(exchange).matrix(DTYPE, HEAD_DIM)


def dense_ring() -> Matrix:
    """What passes in a dense ring, forward: run on virtual ranks and counted, without the agreement before it."""

    def work(comm: Comm) -> list[int]:
        recording = RecordingComm(comm)
        shard = torch.zeros(1, TOKENS // RANKS, HEADS, HEAD_DIM, dtype=DTYPE)
        ring_attention(shard, shard, shard, group=recording)
        sent = [0] * RANKS
        for record in recording.records:
            if record.purpose.phase == "forward":
                sent = [before + more for before, more in zip(sent, record.sent, strict=True)]
        return sent

    return run_ranks(RANKS, work)


def draw() -> Figure:
    """Three matrices on one scale of colours."""
    matrices = {
        'dilated, "gather"': planned("gather"),
        'dilated, "heads"': planned("heads"),
        "dense ring": dense_ring(),
    }
    most = max(nbytes for matrix in matrices.values() for line in matrix for nbytes in line)
    figure = style.card(3.3)
    side, gap, left = 1.78, 0.5, 0.62
    for number, (title, matrix) in enumerate(matrices.items()):
        place = left + number * (side + gap)
        style.say(figure, place, 0.2, title, size=style.TITLE, bold=True)
        received = max(sum(column) for column in zip(*matrix, strict=True))
        style.say(figure, place, 0.42, f"each rank receives {style.in_kib(received)}", colour=style.FAINT)
        canvas = style.axes(figure, place, 0.95, side, side)
        style.cells(canvas, [[_tint(nbytes / most) if nbytes else None for nbytes in line] for line in matrix])
        for rank in range(RANKS):
            style.write(canvas, rank + 0.5, -0.25, str(rank), colour=style.FAINT)
            style.write(canvas, -0.25, rank + 0.5, str(rank), colour=style.FAINT)
            for peer, nbytes in enumerate(matrix[rank]):
                if nbytes:
                    colour = "white" if nbytes / most > 0.5 else style.INK
                    text = style.in_kib(nbytes).replace(" ", "\n")
                    style.write(canvas, peer + 0.5, rank + 0.5, text, size=7, colour=colour)
        style.say(figure, place + side / 2, 2.8, "to rank", size=style.SMALL, colour=style.FAINT, at="center")
    style.say(figure, 0.3, 0.95 + side / 2, "from rank", size=style.SMALL, colour=style.FAINT, at="center", turned=True)
    note = f"{TOKENS} tokens on {RANKS} ranks, {HEADS} heads of {HEAD_DIM}, bfloat16, rate {RATE}; forward"
    style.say(figure, 7.0, 3.02, note, size=style.SMALL, colour=style.FAINT, at="right")
    return figure


def _tint(share: float) -> str:
    """From light to dark blue."""
    return style.paler(style.SHADES[-1], 0.84 * (1 - share))
