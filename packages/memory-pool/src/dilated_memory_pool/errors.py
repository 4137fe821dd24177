"""What a pool raises when it cannot serve a request."""

from __future__ import annotations

from dilated_memory_pool.sizes import format_bytes


class PoolMemoryError(MemoryError):
    """The memory a pool draws from refused, after the pool had given back what it could and collected garbage.

    Attributes:
        requested: bytes asked for.
        allocated: bytes in spans that were in use.
        reserved: bytes the pool held altogether.
        limit: the pool's limit in bytes, or None.
        largest_free: bytes of the largest free span that was left.
        why: what is said instead of advice, by an adaptor that knows more than the pool; "" where none does.
    """

    def __init__(
        self, requested: int, allocated: int, reserved: int, limit: int | None, largest_free: int, why: str = ""
    ) -> None:
        self.requested, self.allocated, self.reserved = requested, allocated, reserved
        self.limit, self.largest_free, self.why = limit, largest_free, why
        super().__init__(
            f"{self._cause()}: requested {format_bytes(requested)}, allocated {format_bytes(allocated)}, "
            f"reserved {format_bytes(reserved)}, limit {'none' if limit is None else format_bytes(limit)}, "
            f"largest free block {format_bytes(largest_free)}; {why or self._cure()}"
        )

    def _cause(self) -> str:
        return "the backend has no more memory"

    def _cure(self) -> str:
        return "free tensors, or ask for less"

    def __reduce__(self) -> tuple[type[PoolMemoryError], tuple[int, int, int, int | None, int, str]]:
        """So that it crosses process boundaries with its numbers."""
        return type(self), (self.requested, self.allocated, self.reserved, self.limit, self.largest_free, self.why)


class PoolLimitError(PoolMemoryError):
    """Serving the request would have taken the pool over its own limit."""

    def _cause(self) -> str:
        return "the pool's limit is reached"

    def _cure(self) -> str:
        return "free tensors, ask for less, or raise the limit with set_limit"
