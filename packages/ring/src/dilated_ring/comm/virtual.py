"""Ranks as threads of one process: the same code without a network, for fast tests and for looking around."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from dilated_ring.comm.protocol import Comm, Purpose, Transfer, check_message
from dilated_ring.errors import PeerError

T = TypeVar("T")


class _Hall:
    """Where the ranks meet: chunks lie under (exchange, source, destination) until they are taken."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self.timeout = size, timeout
        self.changed = threading.Condition()
        self.chunks: dict[tuple[int, int, int], tuple[Purpose, Tensor]] = {}
        self.started: set[tuple[int, int]] = set()
        self.failed = False
        self.gone: set[int] = set()

    def put(self, exchange: int, source: int, chunks: Sequence[Tensor], purpose: Purpose) -> None:
        with self.changed:
            self.started.add((exchange, source))
            for destination, chunk in enumerate(chunks):
                self.chunks[exchange, source, destination] = purpose, chunk
            self.changed.notify_all()

    def take(self, exchange: int, source: int, destination: int, purpose: Purpose) -> Tensor:
        place = exchange, source, destination
        with self.changed:
            # Looked at once more when time is up: what came while this thread was held up is there.
            self.changed.wait_for(lambda: place in self.chunks or source in self.gone, self.timeout)
            if place not in self.chunks:
                self.failed = True
                reason = "is gone" if source in self.gone else f"sent nothing in {self.timeout} s"
                raise PeerError(destination, self.size, purpose, f"rank {source} {reason}")
            its_purpose, chunk = self.chunks.pop(place)
        if its_purpose != purpose:
            raise PeerError(destination, self.size, purpose, f"rank {source} sends {its_purpose}")
        return chunk

    def leave(self, rank: int) -> None:
        with self.changed:
            self.gone.add(rank)
            self.changed.notify_all()


class VirtualComm:
    """One rank of ``run_ranks``. Stricter than a network: what does not fit raises."""

    device = torch.device("cpu")

    def __init__(self, hall: _Hall, rank: int) -> None:
        self.rank, self.size = rank, hall.size
        self._hall, self._exchanges = hall, 0

    def exchange(
        self,
        received: Tensor,
        sent: Tensor,
        received_counts: Sequence[int],
        sent_counts: Sequence[int],
        purpose: Purpose,
    ) -> Transfer:
        """Start an uneven all-to-all, see Comm."""
        check_message(self, received, sent, received_counts, sent_counts)
        if self.rank in self._hall.gone:
            raise PeerError(self.rank, self.size, purpose, "this rank gave up the group after an earlier error")
        number = self._exchanges
        self._exchanges += 1
        chunks = [chunk.clone() for chunk in sent.detach().split(list(sent_counts))]
        self._hall.put(number, self.rank, chunks, purpose)
        return _Delivery(self, number, received.detach().split(list(received_counts)), purpose)

    def give_up(self) -> None:
        """See Comm."""
        self._hall.leave(self.rank)

    def take(self, number: int, source: int, purpose: Purpose) -> Tensor:
        """What ``source`` sends this rank in the exchange of that number."""
        return self._hall.take(number, source, self.rank, purpose)


class _Delivery:
    def __init__(self, comm: VirtualComm, number: int, places: Sequence[Tensor], purpose: Purpose) -> None:
        self._comm, self._number, self._places, self._purpose = comm, number, places, purpose

    def wait(self) -> None:
        """See Transfer."""
        for source, place in enumerate(self._places):
            chunk = self._comm.take(self._number, source, self._purpose)
            if chunk.shape != place.shape or chunk.dtype != place.dtype:
                found, wanted = f"{len(chunk)} of {chunk.dtype}", f"{len(place)} of {place.dtype}"
                reason = f"rank {source} sends {found}, expected {wanted}"
                raise PeerError(self._comm.rank, self._comm.size, self._purpose, reason)
            place.copy_(chunk)


def run_ranks(size: int, work: Callable[[Comm], T], *, timeout: float = 60.0) -> list[T]:
    """Run ``work(comm)`` on ``size`` ranks, each a thread with a Comm of its own. For tensors on the CPU.

    Args:
        size: how many ranks.
        work: what each does; ``comm.rank`` says which it is.
        timeout: seconds that a rank waits for another.

    Returns:
        What the ranks return, in their order.

    Raises:
        BaseException: what the first rank to fail raised; the others, which then find it gone, are not asked.
        PeerError: a rank started an exchange and never waited for it.

    >>> run_ranks(3, lambda comm: (comm.rank, comm.size))
    [(0, 3), (1, 3), (2, 3)]
    """
    hall = _Hall(size, timeout)
    failures: list[BaseException] = []
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()  # a thread begins without

    def run(rank: int) -> T | None:
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                return work(VirtualComm(hall, rank))
        except BaseException as error:
            failures.append(error)
            return None
        finally:
            hall.leave(rank)

    with ThreadPoolExecutor(size, thread_name_prefix="rank") as threads:
        results = list(threads.map(run, range(size)))
    if failures:
        # Peers may find a rank gone before it has told what went wrong.
        raise next((error for error in failures if not isinstance(error, PeerError)), failures[0])
    for (exchange, source, destination), (purpose, _) in hall.chunks.items():
        if (exchange, destination) in hall.started and not hall.failed:
            raise PeerError(destination, size, purpose, f"never waited for what rank {source} sends")
    return results  # type: ignore[return-value]
