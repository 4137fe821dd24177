"""When a copy on an accelerator may be used, and when its memory may be used again.

A copy is made without waiting for it, on the stream that is current for the one who makes it. Whoever finds it later
may work on another stream: that stream waits for the copy, and the allocator is told that it uses the memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dilated_pattern_cache.values.tensors import strided_parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Wait until the work up to there is done."""

    def query(self) -> bool:
        """Whether the work up to there is done. Not to be asked while a graph is captured: that breaks the capture."""


class Streams(Protocol):
    """What a cache asks of a device that works on its own. Streams can be compared and hashed."""

    def current(self) -> Hashable:
        """The calling thread's current stream."""

    def capturing(self) -> bool:
        """Whether the calling thread's work is being captured into a graph."""

    def send(self, tensor: Tensor) -> Tensor:
        """A copy on the device, there when the current stream gets to it. The source may die at once."""

    def record(self, stream: Any) -> Event:
        """An event after all that the stream was given."""

    def wait(self, stream: Any, event: Any) -> None:
        """The stream goes on after the event."""

    def hold(self, tensor: Tensor, stream: Any) -> None:
        """The tensor's memory, once freed, is not used again before what the stream was given by then is done."""


class Arrival:
    """Called at every hit of a copy: makes it fit for use on the caller's current stream.

    The streams wait for the event only until it was seen to be done. A stream is known to the allocator for as long as
    the memory lives, so it is told of each stream once.

    Args:
        streams: of the copy's device. The copy was just made on the current one.
        tensors: the parts of the copy that were made.

    Raises:
        RuntimeError: when called during a capture while the copy was not seen to be done. The event is outside of the
            graph: the graph cannot wait for it, nor may it be asked.
    """

    def __init__(self, streams: Streams, tensors: Sequence[Tensor]) -> None:
        self._streams, self._tensors = streams, tensors
        self._home = streams.current()
        self._told = {self._home}
        self._event: Event | None = streams.record(self._home)

    def __call__(self) -> None:
        """See above."""
        streams, event = self._streams, self._event
        stream = streams.current()
        if event is not None:
            refuse_capture(streams)
            if event.query():
                self._event = None
            elif stream != self._home:
                streams.wait(stream, event)
        # A graph runs when it is replayed, on streams of that time: there is nothing to tell while it is captured.
        if stream not in self._told and not streams.capturing():
            for tensor in self._tensors:
                streams.hold(tensor, stream)
            self._told.add(stream)

    def finish(self) -> None:
        """Wait until the copy is there. From then on it may be used while a graph is captured."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None


def refuse_capture(streams: Streams) -> None:
    """See that no graph is being captured.

    Raises:
        RuntimeError: one is.
    """
    if streams.capturing():
        raise RuntimeError(
            "a cached value is not known to be on this device yet, and cannot be copied there while a CUDA graph is "
            "captured: warm the cache for the device before the capture"
        )


def streams_of(device: torch.device) -> Streams | None:
    """The streams of a device; None where copies are waited for."""
    return CudaStreams(device) if device.type == "cuda" else None


class CudaStreams:
    """PyTorch's streams of one device of CUDA or ROCm."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def current(self) -> torch.cuda.Stream:
        """See ``Streams``."""
        import torch

        return torch.cuda.current_stream(self._device)

    def capturing(self) -> bool:
        """See ``Streams``."""
        import torch

        return torch.cuda.is_current_stream_capturing()

    def send(self, tensor: Tensor) -> Tensor:
        """See ``Streams``. From the host by way of page-locked memory, which the host's allocator keeps until it was
        read. From another accelerator by PyTorch, which orders the current streams of both.
        """
        import torch

        if tensor.is_cuda:
            for part in strided_parts(tensor):
                part.record_stream(torch.cuda.current_stream(part.device))
            return tensor.to(self._device, non_blocking=True)
        if not _is_plain(tensor):
            return tensor.to(self._device)
        if not tensor.is_pinned():
            # Not pin_memory(), which cannot write what has several elements in one place, as expanded tensors do.
            tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
        return tensor.to(self._device, non_blocking=True)

    def record(self, stream: torch.cuda.Stream) -> Event:
        """See ``Streams``."""
        event: Event = stream.record_event()
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """See ``Streams``."""
        stream.wait_event(event)

    def hold(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        """See ``Streams``."""
        for part in strided_parts(tensor):
            part.record_stream(stream)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its memory can be page-locked: it lies on the host, and is no wrapper and of no special layout."""
    import torch

    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.is_quantized
    )
