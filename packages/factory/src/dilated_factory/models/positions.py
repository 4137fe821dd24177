"""Relative positions inside attention: rotary angles, and XPOS, which adds a decay with distance.

Both are called between the projections and the attention, ``query, key = positions(query, key)``, hold no parameters,
and make the score of a query at n with a key at m a function of n - m only. Nothing here knows about dilation: a
sparse row still meets each key at its true distance. May import torch only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

POSITION_KINDS = ("xpos", "rotary", "none")

ROTARY_BASE = 10000.0
"""Base of the geometric series of wavelengths (RoFormer, arXiv 2104.09864, section 3.2.2)."""

XPOS_GAMMA = 0.4
"""Offset of the decay rates, so that the fastest channel does not vanish at once (arXiv 2212.10554, section 2.3)."""

XPOS_SCALE_BASE = 512
"""Distance over which channel j decays by zeta_j (arXiv 2212.10554, and torchscale's xpos_scale_base)."""


class RotaryPositions(nn.Module):
    """Rotates channel pairs of query and key by an angle proportional to their position (arXiv 2104.09864).

    Pair j, channels (2j, 2j + 1), of the row at position n turns by ``n * base ** (-2j / head_dim)``, so that the score
    of a query at n with a key at m depends on n - m only. Any length: angles are computed in float64 (float32 on
    devices that have no float64) and applied in float32, or float64 for float64 inputs, whatever autocast says; the
    results return in the dtype they came in.

    Args:
        head_dim: channels of one head, even.
        base: of the geometric series of wavelengths.

    Raises:
        ValueError: head_dim is odd or not positive; base is not above 1.

    >>> query = key = torch.ones(1, 3, 1, 4)
    >>> turned_query, turned_key = RotaryPositions(4)(query, key)
    >>> scores = torch.einsum("bnhd,bmhd->nm", turned_query, turned_key)
    >>> bool(torch.isclose(scores[0, 1], scores[1, 2]))
    True
    """

    def __init__(self, head_dim: int, *, base: float = ROTARY_BASE) -> None:
        super().__init__()
        if head_dim <= 0 or head_dim % 2:
            raise ValueError(f"head_dim: expected a positive even number (channels turn in pairs), got {head_dim}")
        if not base > 1.0:
            raise ValueError(f"base: expected a number above 1, got {base}")
        self.head_dim = head_dim
        self.base = float(base)

    def forward(self, query: Tensor, key: Tensor, start: int | None = None) -> tuple[Tensor, Tensor]:
        """Query and key of positions 0 to seq - 1, turned; shapes and dtypes kept.

        Args:
            query, key: (batch, seq, heads, head_dim).
            start: for a sequence that comes in parts, the position of this part's first row. The parts, the first with
                start 0 among them, then score as the whole would. None where the rows are a whole sequence.

        Raises:
            TypeError, ValueError: shapes that do not fit, or a start that is no position.
        """
        positions = self._positions(query, key, start)
        compute = torch.float64 if query.dtype == torch.float64 else torch.float32
        cos, sin = self._turns(positions, compute)
        return _rotate(query, cos, sin), _rotate(key, cos, sin)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"head_dim={self.head_dim}, base={self.base:g}"

    def _positions(self, query: Tensor, key: Tensor, start: int | None) -> Tensor:
        """The rows' positions, (seq, 1, 1), exact. Raises TypeError or ValueError."""
        for name, tensor in (("query", query), ("key", key)):
            if tensor.ndim != 4 or tensor.shape[-1] != self.head_dim:
                raise ValueError(
                    f"{name}: expected (batch, seq, heads, head_dim={self.head_dim}), got {tuple(tensor.shape)}"
                )
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                f"key: expected the query's positions, seq {query.shape[1]}, got seq {key.shape[1]}: "
                "rows are numbered alike on both sides"
            )
        if start is None:
            start = 0
        elif isinstance(start, bool) or not isinstance(start, int):
            raise TypeError(f"start: expected an int or None, got {type(start).__name__}")
        elif start < 0:
            raise ValueError(f"start: expected a position, 0 or more, got {start}")
        # float32 resolves an angle of 1e6 rad to 0.06 rad only, hence float64; nothing is stored as a buffer because
        # module.to(bfloat16) would round it there.
        rows = torch.arange(query.shape[1], device=query.device, dtype=_exact_dtype(query.device))
        return (rows + start)[:, None, None]

    def _turns(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of every position's angles, (seq, 1, head_dim / 2)."""
        pairs = torch.arange(self.head_dim // 2, device=positions.device, dtype=positions.dtype)
        frequencies = torch.exp(pairs * (-2.0 * math.log(self.base) / self.head_dim))
        angles = positions * frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)


class XPOSPositions(RotaryPositions):
    """Rotary positions whose scores also decay with distance: XPOS (arXiv 2212.10554), for causal attention.

    With ``zeta_j = (2j / head_dim + 0.4) / 1.4``, pair j of the query at n is multiplied by
    ``zeta_j ** (n / scale_base)`` and of the key at m by its inverse, so that a pair at distance n - m >= 0 counts
    ``zeta_j ** ((n - m) / scale_base)``. Positions are counted from the middle of the sequence: the product is the same
    and the factors reach half as far. (Of a sequence that comes in parts, from the middle of the longest one, which is
    the same for all of them.)
    They still grow exponentially with the length, so a sequence for which ``zeta_0 ** (-seq / scale_base)`` leaves the
    range of the dtype is refused. At scale_base 512 the longest is 36,260 tokens in float32 (bfloat16 36,259), 4,532
    in float16 and 290,085 in float64; it grows in proportion to scale_base.

    Keys *after* the query would be amplified without bound: encoders want rotary or learned positions instead.

    Args:
        head_dim: channels of one head, even.
        base: of the rotary wavelengths.
        scale_base: distance, in tokens, over which pair j decays by zeta_j.

    Raises:
        ValueError: as RotaryPositions; scale_base is not positive; in forward, the sequence is too long for the dtype.

    >>> query = key = torch.ones(1, 2000, 1, 4)
    >>> turned_query, turned_key = XPOSPositions(4)(query, key)
    >>> bool(torch.isfinite(turned_query).all() and torch.isfinite(turned_key).all())
    True
    """

    def __init__(self, head_dim: int, *, base: float = ROTARY_BASE, scale_base: float = XPOS_SCALE_BASE) -> None:
        super().__init__(head_dim, base=base)
        if not scale_base > 0:
            raise ValueError(f"scale_base: expected a positive distance in tokens, got {scale_base}")
        self.scale_base = float(scale_base)

    def longest(self, dtype: torch.dtype) -> int:
        """The longest sequence whose scales fit ``dtype``, in tokens."""
        return int(math.log(torch.finfo(dtype).max) / self._fastest_decay())

    def forward(self, query: Tensor, key: Tensor, start: int | None = None) -> tuple[Tensor, Tensor]:
        """As RotaryPositions.forward, and scaled. Raises ValueError too where the sequence becomes too long."""
        positions = self._positions(query, key, start)
        length, longest = query.shape[1] + (start or 0), self.longest(query.dtype)
        if length > longest:
            needed = math.ceil(
                length * self._fastest_decay() * self.scale_base / math.log(torch.finfo(query.dtype).max)
            )
            raise ValueError(
                f"query: {length} tokens are too many for XPOS with scale_base={self.scale_base:g} in {query.dtype} "
                f"(at most {longest}): its scales overflow; use scale_base={needed} or more, a dtype "
                "of wider range, or rotary positions"
            )
        compute = torch.float64 if query.dtype == torch.float64 else torch.float32
        cos, sin = self._turns(positions, compute)
        scale = self._scales(positions - (length if start is None else longest) // 2, compute)
        inverse = scale.reciprocal()
        return _rotate(query, cos * scale, sin * scale), _rotate(key, cos * inverse, sin * inverse)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{super().extra_repr()}, scale_base={self.scale_base:g}"

    def _fastest_decay(self) -> float:
        """-log(zeta_0) / scale_base: what the fastest pair loses per token, in nats."""
        return -math.log(XPOS_GAMMA / (1.0 + XPOS_GAMMA)) / self.scale_base

    def _scales(self, centred: Tensor, dtype: torch.dtype) -> Tensor:
        """zeta_j ** (centred position / scale_base), (seq, 1, head_dim / 2)."""
        pairs = torch.arange(self.head_dim // 2, device=centred.device, dtype=centred.dtype)
        log_zeta = ((2.0 * pairs / self.head_dim + XPOS_GAMMA) / (1.0 + XPOS_GAMMA)).log()
        return (centred / self.scale_base * log_zeta).exp().to(dtype)


def create_positions(kind: str, head_dim: int, *, scale_base: float | None = None) -> RotaryPositions | None:
    """The positions module named by ``kind``: "xpos", "rotary", or None for "none".

    Raises:
        ValueError: kind is none of them; head_dim or scale_base as the module says; scale_base without XPOS.

    >>> create_positions("rotary", 64)
    RotaryPositions(head_dim=64, base=10000)
    """
    if kind == "xpos":
        return XPOSPositions(head_dim, scale_base=XPOS_SCALE_BASE if scale_base is None else scale_base)
    if scale_base is not None:
        raise ValueError(f"xpos_scale_base: only XPOS positions have one, got {scale_base} with positions={kind!r}")
    if kind == "rotary":
        return RotaryPositions(head_dim)
    if kind == "none":
        return None
    raise ValueError(f"positions: expected one of {', '.join(map(repr, POSITION_KINDS))}, got {kind!r}")


def _exact_dtype(device: torch.device) -> torch.dtype:
    """Apple's MPS is the one torch device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel pairs (2j, 2j + 1) of rows (batch, seq, heads, head_dim), turned by (seq, 1, head_dim / 2) angles."""
    wide = rows.to(cos.dtype)
    if torch.compiler.is_compiling():
        # Real arithmetic, which the compiler fuses; it has no code for complex numbers.
        even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        # The same as one complex product: 7 times faster on a CPU than the five real operations, and equal to the bit.
        wide = wide.contiguous()
        if wide.storage_offset() % 2:  # a complex view must start on a pair
            wide = wide.clone()
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * torch.complex(cos, sin))
    return turned.flatten(-2).to(rows.dtype)
