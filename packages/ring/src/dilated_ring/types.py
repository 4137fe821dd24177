"""The attention types that this distribution registers: entry points of the group "dilated.attention".

Each has two builders, ``attention`` and ``multihead``, called by keyword with the pattern, the sizes and options.
``dilated_factory`` finds them; nothing here knows of it.
"""

from __future__ import annotations

from typing import NamedTuple

from dilated_ring.modules import RingDilatedAttention, RingMultiheadDilatedAttention


class Builders(NamedTuple):
    """What makes the modules of one type.

    Attributes:
        attention: (segment_lengths, dilation_rates, **options) -> module of (query, key, value), heads apart.
        multihead: (embed_dim, num_heads, segment_lengths, dilation_rates, **options) -> module.
    """

    attention: type[RingDilatedAttention]
    multihead: type[RingMultiheadDilatedAttention]


ring = Builders(RingDilatedAttention, RingMultiheadDilatedAttention)
distributed = ring  # the name under which other libraries know attention over many devices
