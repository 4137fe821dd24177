"""The life of pooled memory: a real pool's map after each line of a short program."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import style
import torch

from dilated_memory_pool import MemoryPool, PoolEvent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 1 << 20
ARENA = 8  # MiB
COLOURS = {"used": style.BLUE, "queued": style.ORANGE, "free": style.NOTHING}


class Span(NamedTuple):
    """A stretch of the arena, in MiB; state is a key of COLOURS."""

    offset: float
    size: float
    state: str


class Moment(NamedTuple):
    """What the program did, what that means, the arena's spans (none: it was given back), and the pool's events."""

    code: str
    meaning: str
    spans: tuple[Span, ...]
    events: tuple[str, ...]


def moments() -> list[Moment]:
    """Run the program.

    The pool takes its queue at every call, and a snapshot is one. What a line has queued is therefore what the call
    after it frees, as an observer is told: of such a line the spans are those of before, and these are marked.
    """
    told: list[PoolEvent] = []
    pool = MemoryPool("host", arena_bytes=ARENA * MIB, min_bytes=0, observers=[told.append])
    found: list[Moment] = []

    def empty(mebibytes: int) -> torch.Tensor:
        return pool.empty(mebibytes * MIB, dtype=torch.uint8)

    def spans() -> tuple[Span, ...]:
        arenas = pool.snapshot().arenas
        return tuple(Span(span.offset / MIB, span.nbytes / MIB, span.state) for arena in arenas for span in arena.spans)

    def note(code: str, meaning: str, before: int, shown: tuple[Span, ...] | None = None) -> None:
        events = tuple(event.kind for event in told[before:])
        found.append(Moment(code, meaning, spans() if shown is None else shown, events))

    a, b, c = empty(2), empty(3), empty(2)
    note("a, b, c = empty(2), empty(3), empty(2)", "an arena is reserved and cut into spans; each is leased", 0)
    first = pool.snapshot().arenas[0].address

    before = len(told)
    view = b[:10]
    del b
    note("view = b[:10]; del b", "the view shares b's storage, which holds the lease", before)

    before, earlier = len(told), spans()
    del view
    quiet = len(told)
    spans()  # any call of the pool
    freed = {(event.address - first) / MIB for event in told[quiet:] if event.kind == "free"}
    queued = tuple(span._replace(state="queued") if span.offset in freed else span for span in earlier)
    found.append(
        Moment(
            "del view",
            "the last owner dies: the finaliser queues the span",
            queued,
            tuple(event.kind for event in told[before:quiet]),
        )
    )

    d = empty(2)
    note("d = empty(2)", "the next call takes the queue; the free span is split", quiet)

    before = len(told)
    del a, d
    spans()
    note("del a, d; any call", "neighbours that are free are joined", before)

    before = len(told)
    del c
    spans()
    note("del c; any call", "the arena is one free span again", before)

    before = len(told)
    pool.trim()
    note("pool.trim()", "the arena goes back to the system", before)
    return found


def draw() -> Figure:
    """A line each."""
    found = moments()
    step, top, left, width = 0.62, 0.62, 3.65, 3.35
    figure = style.card(top + step * len(found) + 0.1)
    style.say(figure, 0.3, 0.2, "what the program does", size=style.TITLE, bold=True)
    style.say(figure, left, 0.2, f"the arena of {ARENA} MiB", size=style.TITLE, bold=True)
    style.legend(figure, left + 1.5, 0.23, [(colour, state) for state, colour in COLOURS.items()], step=0.68)
    for number, moment in enumerate(found):
        place = top + step * number
        style.say(figure, 0.3, place, moment.code, bold=True, size=8)
        style.say(figure, 0.3, place + 0.19, moment.meaning, size=style.SMALL, colour=style.FAINT)
        canvas = style.axes(figure, left, place - 0.04, width, 0.33, bare=True)
        canvas.set_xlim(0, ARENA)
        canvas.set_ylim(0, 1)
        for span in moment.spans:
            style.stretch(canvas, span.offset, span.size, f"{span.size:g}", COLOURS[span.state])
        if not moment.spans:
            style.write(canvas, 0, 0.46, "no arena", colour=style.FAINT, at="left")
        told = ", ".join(moment.events) or "nothing"
        style.say(figure, left, place + 0.32, f"an observer is told: {told}", size=6.5, colour=style.FAINT)
    return figure
