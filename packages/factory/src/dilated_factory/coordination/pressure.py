"""A rank that is short asks, and the others give back what lies idle.

One counter holds the bytes that were ever asked for. Each rank has a thread that looks at it; where it has grown, the
rank trims its pools by as much, settles its ledger and writes down up to where it has answered. The rank that is short
waits until all have answered up to its own request. It holds nothing meanwhile, and its own thread goes on answering:
ranks that are short at the same time serve each other.

A rank that did not answer in time is not waited for again until it answers: a dead one costs one timeout, not one for
each attempt.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from dilated_factory.coordination.ledger import Ledger
from dilated_factory.coordination.line import Line
from dilated_factory.coordination.table import Table
from dilated_memory_pool import MemoryPool, PoolStatistics
from dilated_memory_pool.attention import AttentionBufferManager

_LOGGER = logging.getLogger("dilated_factory")
_WATCH_SECONDS = 0.02  # between two looks of the watching thread: two round trips of 50 microseconds each
_WAIT_SECONDS = 0.005  # between two looks at the answers
_RETRY_SECONDS = 0.1  # between two looks while the store does not answer
_LOOKS_PER_SECOND = 2000  # of all ranks together, however many they are: the store serves one call at a time


class Answer(NamedTuple):
    """Attributes: up_to: the requests answered, as the counter stood; given: bytes given back since the beginning."""

    up_to: int
    given: int


class Relief(NamedTuple):
    """Attributes: given: bytes that other ranks gave back; silent: the ranks that did not answer in time."""

    given: int
    silent: tuple[int, ...]


def expect_questions(line: Line) -> None:
    """Before the ranks meet: from then on others may read this rank's answer."""
    line.set(f"answer/{line.rank}", "0 0")


class Pressure:
    """See above.

    Args:
        line: to the store, after ``expect_questions``.
        ledger: of this rank.
        timeout: seconds to wait for the other ranks.
        world_size: ranks that use the store.
    """

    def __init__(self, line: Line, ledger: Ledger, timeout: float, world_size: int) -> None:
        self._line, self._ledger, self._timeout = line, ledger, timeout
        self._others = tuple(rank for rank in ledger.ranks if rank != ledger.rank)
        self._pause = max(_WATCH_SECONDS, world_size / _LOOKS_PER_SECOND)
        self._givers: dict[int, weakref.ref[MemoryPool | AttentionBufferManager]] = {}
        self._numbers = count()
        self._silent: dict[int, int] = {}
        self._key = f"asked of {ledger.ranks[0]}"
        line.add(self._key, 0)  # from here on it exists
        self._heard = self._answered = self._given = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, name=f"dilated pool coordinator, rank {ledger.rank}", daemon=True
        )

    # ------------------------------------------------------------------------------------------ this rank's memory

    def watch(self, giver: MemoryPool | AttentionBufferManager) -> None:
        """Trim it when a rank is short. It is not kept alive."""
        self._givers[next(self._numbers)] = weakref.ref(giver)

    def give_back(self, missing: int) -> int:
        """Trim this rank's pools until so many bytes are given back or nothing is idle; the bytes given back."""
        given = 0
        for giver in self._alive():
            if given >= missing:
                break
            try:
                if isinstance(giver, MemoryPool):
                    given += giver.trim(max(giver.statistics().reserved_bytes - (missing - given), 0))
                else:
                    given += giver.trim()
            except Exception:  # an observer's: it must not end the thread that all ranks wait for
                _LOGGER.exception("rank %d: %r could not be trimmed for a rank that is short", self._ledger.rank, giver)
        return given

    def numbers(self) -> list[PoolStatistics]:
        """Of all pools that are watched."""
        found: list[PoolStatistics] = []
        for giver in self._alive():
            if isinstance(giver, MemoryPool):
                found.append(giver.statistics())
            else:
                found += giver.statistics().values()
        return found

    def _alive(self) -> Iterator[MemoryPool | AttentionBufferManager]:
        for number, reference in self._givers.copy().items():
            giver = reference()
            if giver is None:
                self._givers.pop(number, None)  # another thread may have been first
            else:
                yield giver

    # ------------------------------------------------------------------------------------------ asking

    def relieve(self, missing: int) -> Relief:
        """Have the other ranks give back ``missing`` > 0 bytes, and wait until they have answered or time is up."""
        before = self._answers()
        request = self._line.add(self._key, missing)
        deadline = time.monotonic() + self._timeout
        while True:
            answers = self._answers()
            left = self._ledger.table().left
            awaited = [
                rank
                for rank, answer in answers.items()
                if answer.up_to < request and rank not in left and self._silent.get(rank) != answer.up_to
            ]
            if not awaited or self._ledger.closed:
                break
            if time.monotonic() > deadline:
                self._silent |= {rank: answers[rank].up_to for rank in awaited}
                break
            time.sleep(_WAIT_SECONDS)
        given = sum(answer.given - before[rank].given for rank, answer in answers.items())
        silent = (rank for rank, answer in answers.items() if answer.up_to < request and rank not in left)
        return Relief(given, tuple(silent))

    def _answers(self) -> dict[int, Answer]:
        if not self._others:
            return {}
        texts = self._line.get_all([f"answer/{rank}" for rank in self._others])
        return {rank: Answer(*map(int, text.split())) for rank, text in zip(self._others, texts, strict=True)}

    # ------------------------------------------------------------------------------------------ answering

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> bool:
        """Answer no more. Waits for the thread to end, but in the thread itself; whether the store can still be asked.

        It cannot where the thread does not end in time: it waits for the store, and so would whoever asks next.
        """
        self._stop.set()
        if self._thread is threading.current_thread():
            return True
        self._thread.join(self._timeout)
        return not self._thread.is_alive()

    def _watch(self) -> None:
        """Answer until told to stop, or until the store has not answered for as long as one waits for a rank."""
        silent_since = None
        while not self._stop.wait(self._pause if silent_since is None else max(self._pause, _RETRY_SECONDS)):
            try:
                self._answer()
                silent_since = None
            except RuntimeError as error:  # whoever charges or asks next is told by an error of their own
                now = time.monotonic()
                silent_since = now if silent_since is None else silent_since
                if now - silent_since >= self._timeout:
                    _LOGGER.info("rank %d: the pool coordinator's thread ends: %s", self._ledger.rank, error)
                    return

    def _answer(self) -> None:
        """Look once."""
        asked, text = self._line.get_all([self._key, self._ledger.key])
        self._ledger.settle(Table.read(text))
        if int(asked) > self._answered:
            # Where the store fails below, all this comes again, and the same request must not be served twice.
            self._given += self.give_back(int(asked) - self._heard)
            self._heard = int(asked)
            # The answer promises that what was given back no longer counts.
            while not self._ledger.settle(self._ledger.table()) and not self._stop.is_set():
                time.sleep(_WAIT_SECONDS)
            self._line.set(f"answer/{self._ledger.rank}", f"{asked} {self._given}")
            self._answered = int(asked)
