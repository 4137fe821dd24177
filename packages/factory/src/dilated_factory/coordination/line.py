"""The way to the store: every call a rank makes to it, none of which waits for a key.

A client of a TCPStore serves one call at a time, and a ``get`` of a key that is not there would block all other threads
until it is. So the keys read here exist before they are read, and what is waited for is polled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")


class Line:
    """One rank's own client of the store.

    Args:
        store: a client that no one else blocks.
        rank: named by the errors.
        origin: the store it is a client of, kept alive: in the process that serves the store, it is the server.

    Every method raises a RuntimeError that names the rank where the store no longer answers.
    """

    def __init__(self, store: Store, rank: int, origin: Store) -> None:
        self.store, self.rank, self._origin = store, rank, origin

    def below(self, prefix: str) -> Line:
        """The same client, with all keys below ``prefix``."""
        from torch.distributed.distributed_c10d import PrefixStore

        return Line(PrefixStore(prefix, self.store), self.rank, self._origin)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, 0 at first, and return its new value. One atomic step of the store."""
        return self._ask(lambda: self.store.add(key, amount))

    def set(self, key: str, value: str) -> None:
        """Write ``value``."""
        self._ask(lambda: self.store.set(key, value))

    def get(self, key: str) -> str:
        """The value of a key that is known to exist."""
        return self._ask(lambda: self.store.get(key)).decode()

    def get_all(self, keys: Sequence[str]) -> list[str]:
        """The values of keys that are known to exist, in one round trip."""
        return [value.decode() for value in self._ask(lambda: self.store.multi_get(list(keys)))]

    def has(self, *keys: str) -> bool:
        """Whether all these keys exist."""
        return self._ask(lambda: self.store.check(list(keys)))

    def exchange(self, key: str, expected: str, desired: str) -> str:
        """Write ``desired`` where ``expected`` stands ("" where nothing does); what stands there afterwards.

        One atomic step of the store. ``desired`` must be a text that nobody else writes, or the answer says nothing.
        """
        return self._ask(lambda: self.store.compare_set(key, expected, desired)).decode()

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank}: the pool coordinator's store does not answer, so the common limit cannot be kept: "
                f"{error}; the process that serves the store must live as long as the coordinator"
            ) from error
