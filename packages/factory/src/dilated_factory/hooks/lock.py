"""One lock, for a few assignments that belong together and that any thread may make. Imports the standard library."""

from __future__ import annotations

import os
import threading


class Switching:
    """Held by threads that call one module, or set one switch of the process; new in a child of a fork."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()  # a child does not have the thread that may hold the old one

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


SWITCHING = Switching()
