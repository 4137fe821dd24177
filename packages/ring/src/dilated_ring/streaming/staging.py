"""How chunks of keys and values come to the device: read in place on the CPU, through two pinned buffers to a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dilated_core.resources import Resources
from dilated_ring.streaming.sources import Source

# Takes positions, returns each source's rows there, (batch, rows, kv_heads, head_dim), on the device.
Take = Callable[[slice], Sequence[Tensor]]


@contextmanager
def chunks_on(
    device: torch.device, dtype: torch.dtype, sources: Sequence[Source], longest: int, resources: Resources
) -> Iterator[Take]:
    """Give a function that brings chunks of the sources, of at most ``longest`` rows, to ``device`` in ``dtype``.

    What it returned is over with the next call but one: by then the work on it must be launched.
    """
    if device.type == "cpu":
        yield lambda rows: [source.read(rows).to(dtype) for source in sources]
        return
    staging = _Staging(device, dtype, sources, longest, resources)
    try:
        yield staging.take
    finally:
        staging.close()


class _Staging:
    """Two pinned buffers and two device buffers, used in turns, and a stream of copies beside the current one.

    While the device attends one chunk, the host reads the next into a pinned buffer, and the copy runs on its own
    stream. Whoever overwrites a buffer waits for its last reader: the host for the copy out of a pinned buffer, the
    copy for the attention of a device buffer. The two streams also wait for each other before the first and after the
    last copy, so the device buffers' memory may come from any allocator, and Tensor.record_stream is not needed.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, sources: Sequence[Source], longest: int, resources: Resources
    ) -> None:
        self._device, self._sources = device, sources
        batch, _, *rest = sources[0].shape
        size = (len(sources) * batch * longest * math.prod(rest),)
        self._pinned = [torch.empty(size, dtype=dtype, pin_memory=True) for _ in range(2)]
        self._buffers = [resources.empty(size, dtype=dtype, device=device) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._attended = [torch.cuda.Event() for _ in range(2)]
        self._copies = torch.cuda.Stream(device)
        self._copies.wait_stream(torch.cuda.current_stream(device))
        self._taken = 0

    def take(self, rows: slice) -> Sequence[Tensor]:
        """The sources' rows; work on them belongs on the current stream."""
        current = torch.cuda.current_stream(self._device)
        slot = self._taken % 2
        if self._taken:
            self._attended[1 - slot].record(current)  # all that reads the chunk before is launched
        self._taken += 1

        batch, _, *rest = self._sources[0].shape
        shape = (len(self._sources), batch, rows.stop - rows.start, *rest)
        # Contiguous, whatever the number of rows: a copy between views with gaps would not be one transfer.
        pinned, buffer = (each[slot][: math.prod(shape)].view(shape) for each in (self._pinned, self._buffers))
        self._copied[slot].synchronize()
        for place, source in zip(pinned, self._sources, strict=True):
            place.copy_(source.read(rows))
        self._copies.wait_event(self._attended[slot])
        with torch.cuda.stream(self._copies):
            buffer.copy_(pinned, non_blocking=True)
            self._copied[slot].record(self._copies)
        current.wait_event(self._copied[slot])
        return buffer.unbind()

    def close(self) -> None:
        """Let the current stream go on only after the last copy: then the buffers may be used for something else."""
        torch.cuda.current_stream(self._device).wait_stream(self._copies)
