"""A pool's events on file, one JSON object a line, and what can be done with such a file afterwards."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from io import FileIO
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, NamedTuple, final

from dilated_memory_pool.errors import PoolMemoryError
from dilated_memory_pool.events import PoolEvent

if TYPE_CHECKING:
    from dilated_memory_pool import Block, MemoryPool, PoolStatistics

_FORMAT = "dilated_memory_pool.events"
_LINES = 512  # held back and written together; some 60 KiB
_SECONDS = 1.0  # the longest that lines are held back while events arrive, so that a running log can be followed


@final
class JsonLinesLog:
    """Writes every event to a file.

    The first line has the wall-clock ``start`` (UTC), ``pid`` and ``version``; every other one an event: ``time`` in
    seconds since the start by the monotonic clock, ``thread``, ``kind``, ``address`` (hexadecimal text), ``nbytes``
    and ``requested``. Lines are written in batches, the last one by ``close`` or the end of a ``with`` block. Events
    after that are not recorded.

    Nor are those of a forked child: what the log holds back is the parent's to write, and the child's pool is another
    pool, at the same addresses. Give a pool that is made in the child a log of its own.

    Args:
        path_or_file: a path, whose file is replaced; or a text file open for writing, which is flushed after every
            batch and never closed.

    Raises:
        TypeError: it is neither.
        OSError: the file cannot be opened; when an event is told, it cannot be written.

    >>> from io import StringIO
    >>> from dilated_memory_pool import MemoryPool
    >>> file = StringIO()
    >>> with JsonLinesLog(file) as log:
    ...     block = MemoryPool("host", mode="full", observers=[log]).allocate(1000)
    >>> [json.loads(line).get("kind") for line in file.getvalue().splitlines()]
    [None, 'reserve', 'allocate']
    """

    def __init__(self, path_or_file: str | os.PathLike[str] | IO[str]) -> None:
        from dilated_memory_pool import __version__

        self._pid = os.getpid()
        self._opened: FileIO | None = None
        self._put: Callable[[str], None] | None = None
        self._lines: deque[str] = deque()
        self._writing = threading.Lock()
        if isinstance(path_or_file, (str, os.PathLike)):
            self._opened = FileIO(os.fspath(path_or_file), "w")
            self._put = partial(_put_bytes, self._opened)
        elif callable(getattr(path_or_file, "write", None)):
            self._put = partial(_put_text, path_or_file)
        else:
            raise TypeError(f"path_or_file: expected a path or a text file open for writing, got {path_or_file!r}")
        start = datetime.now(timezone.utc).isoformat()
        self._start = self._written = time.monotonic()
        self._lines.append(json.dumps({"format": _FORMAT, "version": __version__, "pid": self._pid, "start": start}))
        self.flush()

    def __call__(self, event: PoolEvent) -> None:
        """Take down an event."""
        if self._put is None or self._pid != os.getpid():
            return
        now = time.monotonic()
        self._lines.append(
            f'{{"time": {now - self._start:.6f}, "thread": {event.thread}, "kind": "{event.kind}", '
            f'"address": "{event.address:#x}", "nbytes": {event.nbytes}, "requested": {event.requested}}}'
        )
        if len(self._lines) >= _LINES or now - self._written >= _SECONDS:
            # Without waiting: who is writing will write these too, and may be this very thread, interrupted.
            self._write(wait=False)

    def flush(self) -> None:
        """Write what is held back."""
        self._write(wait=True)

    def close(self) -> None:
        """Write what is held back, stop recording, and close the file if the log opened it."""
        try:
            self.flush()
        finally:
            self._put = None
            if self._opened is not None:
                self._opened.close()

    def _write(self, wait: bool) -> None:
        # The child comes first: the lock may be held by a thread that it does not have.
        if self._put is None or self._pid != os.getpid() or not self._writing.acquire(blocking=wait):
            return
        try:
            batch: list[str] = []
            while self._lines:
                batch.append(self._lines.popleft())
            self._put("".join(f"{line}\n" for line in batch))
            self._written = time.monotonic()
        finally:
            self._writing.release()

    def __enter__(self) -> JsonLinesLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class LoggedEvent(NamedTuple):
    """An event of a log.

    Attributes:
        time: seconds since the log's start.
        event: what happened.
    """

    time: float
    event: PoolEvent


def read(path: str | os.PathLike[str]) -> Iterator[LoggedEvent]:
    """The events of a log, in order. A last line that was cut off, by a crash or a full disk, is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not the file of a ``JsonLinesLog``.
    """
    with open(path, encoding="utf-8") as file:
        header = _parse(file.readline(), path, 1)
        if header.get("format") != _FORMAT:
            raise ValueError(f"{os.fspath(path)} is not a log of pool events: its first line has no format {_FORMAT}")
        for number, line in enumerate(file, start=2):
            if not line.endswith("\n"):
                return
            entry = _parse(line, path, number)
            try:
                time_, address = entry.pop("time"), int(entry.pop("address"), 16)
                yield LoggedEvent(time_, PoolEvent(address=address, **entry))
            except (KeyError, TypeError) as error:
                raise ValueError(f"line {number} of {os.fspath(path)} is not an event: {line.strip()}") from error


def replay(path: str | os.PathLike[str], pool: MemoryPool) -> PoolStatistics:
    """Make the allocations of a log anew, in its order and in one thread, and return the numbers of ``pool`` then.

    For choosing size classes, modes and limits by a program's own requests: waste, hits, peaks and refusals are what
    this pool would have had. The memory is never touched, so that host memory takes up addresses and little else.
    A request that the pool refuses counts in ``ooms`` and is passed over. What the log leaves alive is alive when the
    numbers are taken, and freed afterwards.

    Raises:
        OSError, ValueError: as ``read``.
        RuntimeError: the pool is closed.
    """
    live: dict[int, Block] = {}
    for _, event in read(path):
        if event.kind == "allocate":
            try:
                live[event.address] = pool.allocate(event.requested)
            except PoolMemoryError:
                continue
        elif event.kind == "free":
            live.pop(event.address, None)
    return pool.statistics()


def _put_bytes(file: FileIO, text: str) -> None:
    """Without a buffer: a forked child would inherit what is in it, and write it a second time when it exits."""
    rest = memoryview(text.encode())
    while rest:  # a raw file may take less than it is given
        rest = rest[file.write(rest) :]


def _put_text(file: IO[str], text: str) -> None:
    file.write(text)
    file.flush()


def _parse(line: str, path: str | os.PathLike[str], number: int) -> dict[str, Any]:
    """The JSON object on a line."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {os.fspath(path)} is not JSON: {line.strip()[:80]!r}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"line {number} of {os.fspath(path)} is not a JSON object: {line.strip()[:80]!r}")
    return entry
