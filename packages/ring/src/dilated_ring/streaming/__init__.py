"""Dense attention on one device over keys and values that lie in host memory or in a file."""

from dilated_ring.streaming.functional import streamed_attention
from dilated_ring.streaming.sources import StoredTensor

__all__ = ["StoredTensor", "streamed_attention"]
