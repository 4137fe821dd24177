"""Single flight: what is being made is made by one worker, and all others who want it wait for it.

A worker is a thread, or a task of asyncio in it. Workers who wait are known to all caches of the process, so that a
circle of them is an error for the last to join it rather than a silence. Two who close the circle at the same instant
may both hear of it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, TypeAlias
from weakref import ref

if TYPE_CHECKING:
    from dilated_pattern_cache.storage.shelf import Entry


Landing: TypeAlias = "Entry | None"


class Worker(NamedTuple):
    """Who makes or waits. Attributes: thread: its identifier; task: of asyncio, where it is one."""

    thread: int
    task: object = None

    def stands_still_with(self, other: Worker) -> bool:
        """Whether this one cannot go on while the other waits: they are one, or the whole thread waits."""
        return self.thread == other.thread and (self.task is other.task or self.task is None or other.task is None)


class Flight(Future[Landing]):
    """One value being made.

    It lands with an entry; with the exception that every worker who waits is to see; or with None, where its author
    alone was interrupted, and those who waited try again.

    Attributes:
        author: who makes it.
        superseded: whether its value is not to be kept: the key was stored, deleted or cleared meanwhile.

    In the child of a fork, those of the parent do nothing: whoever waits for them is there.
    """

    def __init__(self, author: Worker) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()  # nobody can cancel it from now on
        self.author, self.superseded, self._process = author, False, os.getpid()

    def land(self, entry: Entry | None) -> None:
        """Give the entry to all who wait, or nothing; unless it has landed."""
        if self._process != os.getpid():
            return
        if not self.done():
            self.set_result(entry)
            return
        with self._condition:  # a signal handler may have raised between the landing and its announcement
            self._condition.notify_all()
        self._invoke_callbacks()  # type: ignore[attr-defined]

    def crash(self, error: Exception) -> None:
        """Give the exception to all who wait, unless it has landed."""
        if self._process == os.getpid() and not self.done():
            self.set_exception(error)

    def forked(self) -> None:
        """In the child of its author's fork: nobody waits yet, whatever the locks within say."""
        self.__init__(self.author)  # type: ignore[misc]

    async def landed(self) -> None:
        """Wait in a task. ``result`` then has the very exception, which asyncio's own futures would not hand on."""
        import asyncio

        loop = asyncio.get_running_loop()
        landed = loop.create_future()

        def wake() -> None:
            if not landed.done():
                landed.set_result(None)

        def tell(flight: object) -> None:
            with suppress(RuntimeError):  # the loop is closed: the task was cancelled
                loop.call_soon_threadsafe(wake)

        self.add_done_callback(tell)
        try:
            await landed
        finally:
            with self._condition, suppress(ValueError):
                if not self.done():  # this task gave up, and the callbacks are not being called yet
                    self._done_callbacks.remove(tell)  # type: ignore[attr-defined]


_awaited: dict[Worker, Flight] = {}


@contextmanager
def waiting(worker: Worker, flight: Flight, key: Hashable) -> Iterator[None]:
    """While the worker waits for the flight.

    Raises:
        RuntimeError: it would wait for itself.
    """
    before = _awaited.get(worker)  # this may be a signal handler
    _awaited[worker] = flight
    try:
        path = []
        ahead: Flight | None = flight
        while ahead is not None:
            path.append(ahead)
            if ahead.author.stands_still_with(worker):
                if not any(passed.done() for passed in path):  # else somebody is no longer where the search met him
                    raise RuntimeError(f"the cached value of {key!r} is needed to make itself")
                break
            ahead = _awaited.get(ahead.author) or _awaited.get(Worker(ahead.author.thread))
        yield
    finally:
        if before is None:
            _awaited.pop(worker, None)
        else:
            _awaited[worker] = before


def this_thread() -> Worker:
    """The caller, who blocks its thread while it waits."""
    return Worker(threading.get_ident())


def this_task() -> Worker:
    """The caller, a task that lets others run while it waits."""
    from asyncio import current_task

    task = current_task()
    return Worker(threading.get_ident(), None if task is None else ref(task))  # one for each task


def forget_other_threads(flights: dict[Hashable, Flight]) -> None:
    """In a forked child: the other threads are in the parent, and what they made will not arrive here."""
    here = threading.get_ident()
    for key, flight in list(flights.items()):
        if flight.author.thread == here:
            flight.forked()
        else:
            del flights[key]
    for worker in list(_awaited):
        if worker.thread != here:
            del _awaited[worker]
