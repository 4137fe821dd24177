"""Exceptions that strike at a chosen point: in the backend, or between any two bytecodes of the pool's own code."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dis import opmap
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import dilated_memory_pool
from dilated_memory_pool.backends import Backend, Memory

_SOURCE = Path(dilated_memory_pool.__file__).parent
_STRUCK = (
    "heap.py",
    "ledger.py",
    "placement/spans.py",
    "placement/bins.py",
    "placement/best_fit.py",
    "interop/torch.py",
)
_FINALISER = "__del__"  # CPython swallows what is raised there: no program can clean up after it
_FILES = {str(_SOURCE / name) for name in _STRUCK}


class FailingBackend:
    """A backend whose ``allocate`` raises ``error`` when it is called for the ``fails_at``-th time, from 0.

    Attributes:
        calls: so far.
        armed: whether it fails at all.
    """

    def __init__(self, backend: Backend, fails_at: int, error: type[BaseException]) -> None:
        self._backend, self._fails_at, self._error = backend, fails_at, error
        self.calls, self.armed = 0, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def allocate(self, nbytes: int) -> Memory:
        self.calls += 1
        if self.armed and self.calls == self._fails_at + 1:
            raise self._error("injected")
        return self._backend.allocate(nbytes)


@cache
def _out_of_reach(filename: str) -> tuple[frozenset[int], frozenset[int]]:
    """(leaving, cleanup): lines of a file where no exception is injected.

    - Leaving: the lines of ``with``, of ``return`` within one, and of ``try``. A ``with`` is left on the first two: an
      exception there, before ``__exit__`` is called, leaks the lock in any Python program. ``try`` is an instruction
      that does nothing, which the compiler leaves outside of the ``with`` around it. CPython handles no signal there.
    - Cleanup: the bodies of ``finally`` and ``except``, and all they call, which is the cleanup after an exception.
      Who would clean up after the second?
    """
    leaving: set[int] = set()
    cleanup: set[int] = set()
    for node in ast.walk(ast.parse(Path(filename).read_text())):
        if isinstance(node, ast.With):
            leaving.update(range(node.lineno, node.body[0].lineno))
            leaving.update(inner.lineno for inner in ast.walk(node) if isinstance(inner, ast.Return | ast.Try))
        elif isinstance(node, ast.Try):
            for body in (node.finalbody, *(handler.body for handler in node.handlers)):
                if body:
                    cleanup.update(range(body[0].lineno, (body[-1].end_lineno or 0) + 1))
    return frozenset(leaving), frozenset(cleanup)


def _in_reach(frame: FrameType) -> bool:
    """Whether the frame is not leaving a ``with``, and neither it nor a caller within the pool is cleaning up.

    Bytecodes of no line close an ``except``: an exception before that is done keeps the one that was handled, and with
    it the frames and all they hold, in CPython's own books.
    """
    if frame.f_lineno is None or frame.f_lineno in _out_of_reach(frame.f_code.co_filename)[0]:
        return False
    caller: FrameType | None = frame
    while caller is not None:
        if caller.f_code.co_filename in _FILES and caller.f_lineno in _out_of_reach(caller.f_code.co_filename)[1]:
            return False
        caller = caller.f_back
    return True


def _at_a_nop(frame: FrameType, event: str) -> bool:
    """Whether the next bytecode does nothing, as at the edges of ``try``: some of these no handler covers."""
    return event == "opcode" and frame.f_code.co_code[frame.f_lasti] == opmap["NOP"]


class Strike:
    """Runs a call, and raises KeyboardInterrupt before the ``at``-th line, or bytecode, of the pool that it executes.

    Attributes:
        where: file, line and function that were struck; None where the call had fewer.
        passed: the same of all that could have been struck before.
    """

    def __init__(self, at: float, every: Literal["line", "opcode"]) -> None:
        self._at, self._every = at, every
        self.where: str | None = None
        self.passed: list[str] = []

    def run(self, call: Callable[[], object]) -> None:
        """The call, up to the exception, which goes no further. What was traced before, by a debugger or a coverage
        tool, goes on after.
        """
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            call()
        except KeyboardInterrupt:
            assert self.where is not None
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code.co_filename not in _FILES or code.co_name == _FINALISER or self.where is not None:
            return None
        frame.f_trace_opcodes = self._every == "opcode"
        return self._step

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == self._every and self.where is None and _in_reach(frame) and not _at_a_nop(frame, event):
            place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
            if len(self.passed) == self._at:
                self.where = place
                raise KeyboardInterrupt(place)
            self.passed.append(place)
        return self._step
