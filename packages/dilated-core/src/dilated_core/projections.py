"""What multi-head attentions have in common around the attention itself: projections, initialisation, joining.

A subclass puts its attention between ``projected`` and ``joined``. All have the same weights under the same names, so
state dicts load from any into any.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dilated_core import checks


class MultiheadProjections(nn.Module):
    """The projections of a multi-head attention: ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``, ``inner_attn_ln``.

    Args:
        embed_dim: width of input and output; a multiple of num_heads.
        num_heads: query heads.
        bias: whether the projections have biases.
        layer_norm: whether the joined heads are normalised before ``out_proj`` (MAGNETO, arXiv 2210.06423).
        layer_norm_eps: its epsilon.
        gamma_init: Xavier gain of ``v_proj`` and ``out_proj`` (MAGNETO's gamma); q_proj and k_proj have gain 1.
        kv_heads: key and value heads, a divisor of num_heads; None for num_heads.
        device, dtype: of the weights; torch's defaults by default.
        rotary: a module that turns queries and keys by their positions, or None; kept for the subclass.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> projections = MultiheadProjections(64, 4, kv_heads=2)
    >>> query, key, value, real = projections.projected(torch.randn(2, 19, 64))
    >>> query.shape, key.shape, projections.joined(query).shape
    (torch.Size([2, 19, 4, 16]), torch.Size([2, 19, 2, 16]), torch.Size([2, 19, 64]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        kv_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rotary: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = checks.positive_integer("embed_dim", embed_dim)
        self.num_heads = checks.positive_integer("num_heads", num_heads)
        self.kv_heads = num_heads if kv_heads is None else checks.positive_integer("kv_heads", kv_heads)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads = {num_heads}, got {embed_dim}")
        if num_heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of num_heads = {num_heads}, got {kv_heads}")
        if rotary is not None and not isinstance(rotary, nn.Module):
            raise TypeError(f"rotary: expected an nn.Module or None, got {type(rotary).__name__}")
        self.head_dim = embed_dim // num_heads
        self.gamma_init = checks.positive_number("gamma_init", gamma_init)
        checks.positive_number("layer_norm_eps", layer_norm_eps)
        self.rotary = rotary
        kv_dim = self.kv_heads * self.head_dim
        bias = checks.boolean("bias", bias)
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias, device, dtype)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias, device, dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.inner_attn_ln = (
            nn.LayerNorm(embed_dim, layer_norm_eps, device=device, dtype=dtype)
            if checks.boolean("layer_norm", layer_norm)
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, gain 1 for q and k and ``gamma_init`` for v and out; zero biases."""
        gains = (
            (self.q_proj, 1.0),
            (self.k_proj, 1.0),
            (self.v_proj, self.gamma_init),
            (self.out_proj, self.gamma_init),
        )
        for projection, gain in gains:
            nn.init.xavier_uniform_(projection.weight, gain)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.inner_attn_ln is not None:
            self.inner_attn_ln.reset_parameters()

    def projected(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What ``forward`` begins with: its arguments checked and projected.

        Args:
            query: (batch, seq, embed_dim).
            key, value: the same shape; query itself by default.
            key_padding_mask: (batch, seq), bool, True where the key is *padding*: nn.MultiheadAttention's sense.
            need_weights: False; weights are never formed, True raises.
            attn_mask: None; anything else raises.

        Returns:
            query (batch, seq, num_heads, head_dim), key and value (batch, seq, kv_heads, head_dim), and the mask in
            ``dilated_attention``'s sense, True where the key is real; None for none.

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or value.
        """
        key = query if key is None else key
        value = key if value is None else value
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
            if tensor.ndim != 3 or tensor.shape[-1] != self.embed_dim or tensor.shape != query.shape:
                raise ValueError(
                    f"{name}: expected shape (batch, seq, embed_dim = {self.embed_dim}), "
                    f"the same for query, key and value, got {tuple(tensor.shape)}"
                )
            self._check_placement(name, tensor)
        if attn_mask is not None:
            raise ValueError("attn_mask: expected None, there is no further mask (is_causal is one)")
        if need_weights:
            raise ValueError("need_weights: expected False, weights are never formed")
        real = checks.key_padding_mask(key_padding_mask, key, true="padding")
        return (
            self.q_proj(query).unflatten(-1, (self.num_heads, self.head_dim)),
            self.k_proj(key).unflatten(-1, (self.kv_heads, self.head_dim)),
            self.v_proj(value).unflatten(-1, (self.kv_heads, self.head_dim)),
            None if real is None else ~real,
        )

    def _check_placement(self, name: str, tensor: Tensor) -> None:
        """Refuse a tensor that lies elsewhere than the weights, or has another dtype and nothing to cast it."""
        weight = getattr(self.q_proj, "weight", None)
        # Weights that are sharded, quantised or otherwise of a class of their own have a cast of their own.
        if type(weight) is not nn.Parameter:
            return
        if tensor.device != weight.device:
            raise ValueError(
                f"{name}: expected the device of the weights, {weight.device}, got {tensor.device} (move one of them: "
                f'{name}.to("{weight.device}") or module.to("{tensor.device}"))'
            )
        device = tensor.device.type
        if tensor.dtype != weight.dtype and (device == "meta" or not torch.is_autocast_enabled(device)):
            raise TypeError(
                f"{name}: expected the dtype of the weights, {weight.dtype}, got {tensor.dtype} (cast one of them: "
                f"{name}.to({weight.dtype}) or module.to({tensor.dtype}); or call under torch.autocast)"
            )

    def joined(self, attended: Tensor) -> Tensor:
        """What ``forward`` ends with: the heads joined, normalised where ``layer_norm`` is, and projected.

        Args:
            attended: (batch, seq, num_heads, head_dim).

        Returns:
            Output (batch, seq, embed_dim).
        """
        rows = attended.flatten(-2)
        if self.inner_attn_ln is not None:
            rows = self.inner_attn_ln(rows)
        output: Tensor = self.out_proj(rows)
        return output

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, kv_heads={self.kv_heads}"
