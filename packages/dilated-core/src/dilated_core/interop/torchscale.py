"""torchscale's DilatedAttention swapped for ours, in any model: parameters, keys, hooks and modes stay what they were.

    model = convert(model)      # a torchscale LongNet, a Prov-GigaPath slide encoder, anything that holds one

torchscale is not needed and not imported: a module is recognised by what it carries. May import torch and dilated_core.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dilated_core import checks
from dilated_core.decode import DilatedKVCache, decode_step
from dilated_core.functional import dilated_attention
from dilated_core.pattern import DilatedPattern

LOGGER = logging.getLogger("dilated_core")

CACHE_KEY = "dilated_kv_cache"
"""Where a layer's ``incremental_state`` keeps its DilatedKVCache; nothing else is put there."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

# The dense class has the same parts and, in a decoder, the same args: only its name tells it apart.
DENSE_CLASS = "MultiheadAttention"

# One entry of a list written as text; numpy 2 writes its own integers as np.int64(1024).
WRITTEN_INTEGER = re.compile(r"(?:(?:np|numpy)\.u?int\d*\((?P<numpy>\d+)\)|(?P<plain>\d+))")

ROTARY_BASE = 10000.0
"""Base of XPOS's wavelengths (arXiv 2212.10554)."""

XPOS_FASTEST_DECAY = -math.log(0.4 / 1.4)
"""What XPOS's first pair loses over ``scale_base`` positions, in nats: -log zeta_0 (arXiv 2212.10554, section 2.3)."""


def convert(model: nn.Module, *, semantics: str = "torchscale", kernel: str = "auto") -> nn.Module:
    """Replace every torchscale-style DilatedAttention in ``model`` by a TorchscaleDilatedAttention, in place.

    Taken for one is a module with ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``, ``inner_attn_ln`` and ``xpos``
    (each a module or None), ``num_heads``, ``head_dim``, and ``args.segment_length`` and ``args.dilated_ratio``, lists
    or lists written as text; of any class but one named MultiheadAttention, which is torchscale's dense attention.

    What is kept: the Parameter objects themselves (an optimizer goes on), every state-dict key, dtype, device, train or
    eval mode, hooks. A module found in several places is replaced by one module in all of them. Either everything is
    replaced or, after an error, nothing. Converting again changes ``semantics`` and ``kernel`` and nothing else. The
    count is logged at INFO on the logger "dilated_core".

    Args:
        model: any module, changed in place.
        semantics: "torchscale" computes what torchscale computes, so that trained weights give the same results; the
            others ("paper", "grouped") are different functions of the same weights, see ``dilated_attention``.
        kernel: as in ``dilated_attention``.

    Returns:
        ``model``; or the replacement, where ``model`` itself is what was replaced.

    Raises:
        TypeError: model is not a module.
        ValueError: nothing was found; a module found cannot be replaced, named by its path: sequence parallelism, cross
            attention, a forward of its own set on the instance, or segment lengths and ratios that are no pattern.

    >>> from types import SimpleNamespace
    >>> class DilatedAttention(nn.Module):  # torchscale's, as far as it is seen from outside
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(32, 32) for _ in range(4))
    ...         self.inner_attn_ln, self.xpos, self.num_heads, self.head_dim = nn.LayerNorm(32), None, 4, 8
    ...         self.args = SimpleNamespace(segment_length="[8, 16]", dilated_ratio="[1, 2]")
    >>> model = nn.Sequential(DilatedAttention())
    >>> convert(model) is model
    True
    >>> attended, _ = model[0](*torch.randn(1, 1, 20, 32).expand(3, 1, 20, 32))
    >>> attended.shape
    torch.Size([1, 20, 32])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    checks.semantics(semantics)
    checks.kernel(kernel)
    found = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if _is_dilated(module)]
    if not found:
        raise ValueError(
            f"model: found no torchscale-style DilatedAttention in this {type(model).__name__}; looked for modules "
            f"with {', '.join(PROJECTIONS)}, inner_attn_ln, xpos, num_heads, head_dim, and args with segment_length "
            "and dilated_ratio set"
        )
    replacements: dict[nn.Module, TorchscaleDilatedAttention] = {}
    for path, module in found:
        if module not in replacements:
            replacements[module] = TorchscaleDilatedAttention(
                module, semantics=semantics, kernel=kernel, name=path or type(module).__name__
            )
    for path, module in found:
        if path:
            model.set_submodule(path, replacements[module])
    LOGGER.info("converted %d DilatedAttention modules of %s", len(replacements), type(model).__name__)
    return replacements.get(model, model)


class TorchscaleDilatedAttention(nn.Module):
    """A torchscale DilatedAttention with this package's attention inside; ``convert`` makes them.

    Its parameters, buffers, submodules, hooks and mode *are* those of the module it is made from. Differences from
    torchscale, all deliberate:

    - any device, dtype and torch kernel: no flash-attn package is needed;
    - a ``key_padding_mask`` with padding in it is honoured (torchscale ignores it on this path);
    - attention dropout acts in training only (torchscale's acts in evaluation too);
    - decoding with ``incremental_state`` gives, row by row, what one causal call gives, at any length (torchscale's is
      wrong without XPOS, and with it raises once the sequence outgrows a segment).

    Args:
        module: what to take everything from.
        semantics, kernel: as in ``dilated_attention``.
        name: what to call it in errors.

    Raises:
        ValueError: it cannot be replaced, see ``convert``.
    """

    # Of torchscale's modules only what is used here is known, hence Any.
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    inner_attn_ln: nn.Module | None
    xpos: Any
    args: Any
    dropout_module: nn.Dropout

    def __init__(
        self, module: Any, *, semantics: str = "torchscale", kernel: str = "auto", name: str = "module"
    ) -> None:
        super().__init__()
        args = module.args
        if getattr(args, "seq_parallel", False):
            raise ValueError(
                f"{name}: expected args.seq_parallel = False, got {args.seq_parallel} (without its communication every "
                "rank would attend alone)"
            )
        if getattr(module, "encoder_decoder_attention", False):
            raise ValueError(f"{name}: expected self-attention, got encoder_decoder_attention = True")
        if "forward" in vars(module):
            raise ValueError(
                f"{name}: expected its class's own forward, got one set on the instance, which would be lost (undo "
                "that, convert, redo it)"
            )
        try:
            self.pattern = DilatedPattern(
                _integers("segment_length", args.segment_length), _integers("dilated_ratio", args.dilated_ratio)
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
        # All that nn.Module itself keeps: parameters, buffers, submodules, hooks, mode. The containers are taken, not
        # copied, so that a hook's handle still removes it.
        vars(self).update({key: state for key, state in vars(module).items() if key in vars(self)})
        self.args = args
        self.num_heads = int(module.num_heads)
        self.head_dim = int(module.head_dim)
        self.embed_dim = self.num_heads * self.head_dim
        self.inner_attn_ln = module.inner_attn_ln
        self.xpos = module.xpos
        if not hasattr(self, "dropout_module"):
            self.dropout_module = nn.Dropout(getattr(args, "attention_dropout", 0.0)).train(self.training)
        self.semantics = checks.semantics(semantics)
        self.kernel = checks.kernel(kernel)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        incremental_state: dict[str, Any] | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: None = None,
        rel_pos: None = None,
        is_first_step: bool = False,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend, in the argument order of torchscale's own forward.

        Args:
            query, key, value: (batch, seq, embed_dim), of one shape.
            incremental_state: this layer's own dict, or None. It makes the call the next rows of a causal sequence:
                they see what earlier calls put there, a DilatedKVCache under ``CACHE_KEY``, and are added to it. A beam
                search reorders that cache (``cache.reorder``).
            key_padding_mask: (batch, seq), True or not 0 at *padding* (torchscale's sense; the inverse of
                ``dilated_attention``'s), or None.
            attn_mask, rel_pos: None; torchscale's own dilated attention takes no other.
            is_first_step: the sequence begins here, whatever ``incremental_state`` holds.
            is_causal: whether a row sees only keys at or before it; needed with ``incremental_state``.

        Returns:
            (output of query's shape, None).

        Raises:
            TypeError, ValueError: an argument of a wrong type or shape, or one that is refused.
        """
        for name, option in (("attn_mask", attn_mask), ("rel_pos", rel_pos)):
            if option is not None:
                raise ValueError(f"{name}: expected None, a pattern takes no further mask or bias")
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.ndim != 3 or tensor.shape != query.shape:
                raise ValueError(
                    f"{name}: expected (batch, seq, embed_dim), the same for query, key and value (this is "
                    f"self-attention), got {tuple(tensor.shape)} beside query {tuple(query.shape)}"
                )
        real_keys = _real_keys(key_padding_mask, query.shape[:2])
        # Called, not read: a projection may be a MultiwayNetwork, a quantised layer, or carry an adapter.
        q, k, v = (
            project(rows).unflatten(-1, (self.num_heads, self.head_dim))
            for project, rows in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        if incremental_state is not None:
            if not is_causal or real_keys is not None:
                raise ValueError(
                    "incremental_state: expected is_causal = True and a key_padding_mask that hides nothing (decoding "
                    f"is causal and knows no padding), got is_causal = {is_causal} and a mask that hides "
                    f"{'nothing' if real_keys is None else 'keys'}"
                )
            attended = self._decode(q, k, v, incremental_state, is_first_step)
        else:
            if self.xpos is not None:
                q, k = self._xpos(q, downscale=False), self._xpos(k, downscale=True)
            attended = dilated_attention(
                q.to(v.dtype),
                k.to(v.dtype),
                v,
                self.pattern.segment_lengths,
                self.pattern.dilation_rates,
                is_causal=is_causal,
                dropout_p=self._dropout_p,
                key_padding_mask=real_keys,
                semantics=self.semantics,
                kernel=self.kernel,
            )
        joined = attended.flatten(-2)
        if self.inner_attn_ln is not None:
            joined = self.inner_attn_ln(joined)
        return self.out_proj(joined), None

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return (
            f"segment_lengths={list(self.pattern.segment_lengths)}, "
            f"dilation_rates={list(self.pattern.dilation_rates)}, num_heads={self.num_heads}, "
            f"semantics={self.semantics!r}, kernel={self.kernel!r}"
        )

    @property
    def _dropout_p(self) -> float:
        return float(self.dropout_module.p) if self.training else 0.0

    def _xpos(self, rows: Tensor, *, downscale: bool) -> Tensor:
        """The model's own XPOS over a whole sequence, (batch, seq, heads, head_dim) in and out."""
        batch, seq, heads, head_dim = rows.shape
        folded = rows.transpose(1, 2).reshape(batch * heads, seq, head_dim)
        turned: Tensor = self.xpos(folded, offset=0, downscale=downscale)
        return turned.view(batch, heads, seq, head_dim).transpose(1, 2)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, state: dict[str, Any], is_first_step: bool) -> Tensor:
        """The next rows of a causal sequence, (batch, seq, heads, head_dim), against the cache in ``state``."""
        if self._dropout_p:
            raise ValueError("incremental_state: expected eval mode, a step drops no probabilities (call model.eval())")
        if is_first_step or CACHE_KEY not in state:
            state[CACHE_KEY] = DilatedKVCache(
                self.pattern.segment_lengths,
                self.pattern.dilation_rates,
                batch_size=v.shape[0],
                num_heads=self.num_heads,
                head_dim=self.head_dim,
                semantics=self.semantics,
                dtype=v.dtype,
                device=v.device,
            )
        cache = state[CACHE_KEY]
        if self.xpos is not None:
            # Every row of the batch has come the same way, so they all are as long.
            first = cache.lengths[0]
            q = xpos_rows(q, first, self.xpos.scale, self.xpos.scale_base, downscale=False)
            k = xpos_rows(k, first, self.xpos.scale, self.xpos.scale_base, downscale=True)
        return decode_step(q.to(v.dtype), k.to(v.dtype), v, cache, kernel=self.kernel)


def xpos_rows(rows: Tensor, first: int, zeta: Tensor, scale_base: float, *, downscale: bool) -> Tensor:
    """XPOS (arXiv 2212.10554) of rows at positions ``first``, ``first + 1``, ..., its scales counted from position 0.

    torchscale counts scales from the middle of the sequence so far, which moves at every step, so a cached key would
    have to be scaled anew each time. Only the product of a query's and a key's scale matters: any fixed origin does.

    Args:
        rows: (batch, seq, heads, head_dim).
        first: position of the first row.
        zeta: (head_dim / 2,), the decay of each channel pair over ``scale_base`` positions.
        scale_base: in positions.
        downscale: True for keys, which get the inverse scale.

    Returns:
        The rows turned, in float32 (float64 for float64).

    Raises:
        ValueError: a position whose scale leaves the range of the rows' dtype.
    """
    last = first + rows.shape[1] - 1
    longest = int(math.log(torch.finfo(rows.dtype).max) / XPOS_FASTEST_DECAY * scale_base)
    if last >= longest:
        raise ValueError(
            f"query: position {last} is too far for XPOS with scale_base = {scale_base:g} in {rows.dtype}: its scale "
            f"overflows; expected at most {longest} positions"
        )
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    position = torch.arange(first, last + 1, device=rows.device, dtype=torch.float32)[:, None, None]
    pair = torch.arange(len(zeta), device=rows.device)
    # Angles in float32 whatever the rows are, as torchscale's own module has them: they must agree to the bit.
    angle = (position * (1.0 / ROTARY_BASE ** (pair / len(zeta)))).to(wide)
    size = zeta.to(wide) ** (position.to(wide) / scale_base)
    size = 1.0 / size if downscale else size
    cos, sin = angle.cos() * size, angle.sin() * size
    even, odd = rows.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _is_dilated(module: nn.Module) -> bool:
    """Whether ``module`` is, seen from outside, torchscale's DilatedAttention."""
    args = getattr(module, "args", None)
    return (
        type(module).__name__ != DENSE_CLASS
        and all(isinstance(getattr(module, name, None), nn.Module) for name in PROJECTIONS)
        and all(hasattr(module, name) for name in ("inner_attn_ln", "xpos", "num_heads", "head_dim"))
        and all(getattr(args, name, None) is not None for name in ("segment_length", "dilated_ratio"))
    )


def _integers(name: str, setting: object) -> list[int]:
    """A list of whole numbers, or the same written as text, as torchscale's configurations have it.

    >>> _integers("segment_length", "[np.int64(1024), 5792]")
    [1024, 5792]
    """
    if isinstance(setting, str):
        entries = setting.strip().removeprefix("[").removesuffix("]").split(",")
        matches = [WRITTEN_INTEGER.fullmatch(entry.strip()) for entry in entries]
        numbers = [int(match["numpy"] or match["plain"]) for match in matches if match]
        if len(numbers) != len(entries):
            raise ValueError(f"args.{name}: expected a list of whole numbers, got the text {setting!r}")
        return numbers
    if not isinstance(setting, Iterable):
        raise ValueError(f"args.{name}: expected a list of whole numbers, got {setting!r}")
    return [checks.positive_integer(f"args.{name}[{index}]", entry) for index, entry in enumerate(setting)]


def _real_keys(padding: Tensor | None, shape: torch.Size) -> Tensor | None:
    """torchscale's mask (True at padding) in this package's sense (True at real keys), None where nothing is padded."""
    if padding is None:
        return None
    if padding.shape != shape:
        raise ValueError(f"key_padding_mask: expected (batch, seq) = {tuple(shape)}, got {tuple(padding.shape)}")
    padding = padding.to(torch.bool)
    # torchscale's encoder always passes a mask, and nearly always one that hides nothing: looking is cheaper than
    # masking. A compiler cannot look, so there the mask is always applied.
    if not torch.compiler.is_compiling() and not padding.any():
        return None
    return ~padding
