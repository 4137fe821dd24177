"""Memory used on two streams: when work is queued, when it is done, and when the memory is used again.

The pool is real. The device is the one of the pool's tests: its work stays queued until it is told to run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import recorded
import style

from dilated_memory_pool import Block, MemoryPool

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAKE_DEVICE = "packages/memory-pool/tests/fake_device.py"
NBYTES = 8192
COLOURS = {"used": style.BLUE, "waiting": style.ORANGE, "free": style.NOTHING}


class Queued(NamedTuple):
    """A piece of work: its stream, the steps at which it was queued and done."""

    name: str
    stream: int
    queued: int
    done: int


class Timeline(NamedTuple):
    """What happened.

    Attributes:
        calls: of the program, one a step.
        work: what was queued.
        memory: of every arena its state after each step, None before it is there.
        owners: of every arena who has it after each step, "" for nobody.
    """

    calls: list[str]
    work: list[Queued]
    memory: list[list[str | None]]
    owners: list[list[str]]


def timeline() -> Timeline:
    """Run the program."""
    fake = recorded.load(FAKE_DEVICE)
    device = fake.FakeDevice()
    pool = MemoryPool(fake.FakeBackend(device, False), min_bytes=0, arena_bytes=NBYTES)
    calls: list[str] = []
    states: list[dict[int, str]] = []
    owners: list[dict[int, str]] = []
    held: dict[str, Block] = {}
    starts: dict[str, tuple[int, int]] = {}
    done: dict[str, int] = {}

    def queue(name: str, stream: int) -> None:
        starts[name] = stream, len(calls)
        device.enqueue(lambda: done.setdefault(name, len(calls)), stream)

    def step(call: str) -> None:
        calls.append(call)
        states.append({arena.address: arena.spans[0].state for arena in pool.snapshot().arenas})
        owners.append({block.address: name for name, block in held.items()})

    held["x"] = pool.allocate(NBYTES)
    step("x = allocate\non stream 0")
    queue("write x", 0)
    step("queue:\nwrite x on 0")
    queue("read x", 1)
    pool.record_stream(held["x"], 1)
    step("queue: read\nx on 1; record")
    device.run(0)
    del held["x"]
    step("del x")
    held["y"] = pool.allocate(NBYTES)
    step("y = allocate")
    device.run(1)
    step("the read\nis done")
    held["z"] = pool.allocate(NBYTES)
    step("z = allocate")

    places = list(dict.fromkeys(address for state in states for address in state))
    found = Timeline(
        calls,
        [Queued(name, stream, start, done[name]) for name, (stream, start) in starts.items()],
        [[state.get(address) for state in states] for address in places],
        [[owner.get(address, "") for owner in owners] for address in places],
    )
    held.clear()
    return found


def draw() -> Figure:
    """Steps from left to right: the program, the streams, the memory."""
    found = timeline()
    left, step, lane, high = 1.1, 0.85, 0.52, 0.3
    figure = style.card(3.65)
    lanes = ["program", "stream 0", "stream 1", *(f"memory {number + 1}" for number in range(len(found.memory)))]
    tops = [0.3, *(0.95 + lane * number for number in range(len(lanes) - 1))]
    for name, top in zip(lanes, tops, strict=True):
        style.say(figure, 0.25, top + 0.06, name, bold=True, size=style.SMALL)
    for number, call in enumerate(found.calls):
        style.say(figure, left + step * number + 0.02, 0.3, call, size=6.8)
    for work in found.work:
        top, width = tops[1 + work.stream], step * (work.done - work.queued)
        colour = style.SERIES[2 + work.stream]
        style.box(
            figure,
            left + step * work.queued,
            top,
            width,
            high,
            f"{work.name}: queued, then done",
            colour=colour,
            size=7,
        )
    for number, (states, owners) in enumerate(zip(found.memory, found.owners, strict=True)):
        canvas = style.axes(figure, left, tops[3 + number], step * len(states), high, bare=True)
        canvas.set_xlim(0, len(states))
        canvas.set_ylim(0, 1)
        for at, (state, owner) in enumerate(zip(states, owners, strict=True)):
            if state is not None:
                style.stretch(canvas, at, 1, owner or state, COLOURS[state])
    style.legend(figure, left, 3.33, [(colour, state) for state, colour in COLOURS.items()], step=0.8)
    note = "an event was recorded on stream 1 when x died"
    style.say(figure, 7.0, 3.32, note, size=style.SMALL, colour=style.FAINT, at="right")
    return figure
