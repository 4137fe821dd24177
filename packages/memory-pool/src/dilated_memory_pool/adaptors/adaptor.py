"""What all adaptors have in common: they look like their upstream."""

from __future__ import annotations

from dilated_memory_pool.backends import Backend, Memory, Streams


class Adaptor:
    """A backend that passes everything on. Adaptors of your own override ``allocate``.

    Args:
        upstream: the backend or adaptor to draw from.

    Attributes:
        upstream: as given.
        reasons: the upstream's, to which an adaptor adds its own.

    ``name``, ``device``, ``addressable``, ``granule``, ``total_bytes`` and ``streams`` are the upstream's.

    Raises:
        TypeError: ``upstream`` is no backend.
    """

    def __init__(self, upstream: Backend) -> None:
        if not callable(getattr(upstream, "allocate", None)):
            raise TypeError(f"upstream: expected a backend or an adaptor, got {upstream!r}")
        self.upstream = upstream
        self.name: str = upstream.name
        self.device: str = upstream.device
        self.addressable: bool = upstream.addressable
        self.granule: int = upstream.granule
        self.total_bytes: int = upstream.total_bytes
        self.streams: Streams | None = upstream.streams
        self.reasons: tuple[str, ...] = upstream.reasons

    def allocate(self, nbytes: int) -> Memory:
        """As ``Backend.allocate``."""
        return self.upstream.allocate(nbytes)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.upstream!r})"
