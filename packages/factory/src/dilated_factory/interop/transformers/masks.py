"""What a model's mask becomes on its way to the attention function: the padding, and nothing that could be lost.

transformers asks the function made here once a forward call. It says what is to be attended by a *mask function* of
indices; causal and bidirectional are the two that an attention of ours can honour. Imports torch only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def make_mask_function(
    causal_mask_function: Callable[..., Any], bidirectional_mask_function: Callable[..., Any]
) -> Callable[..., Tensor | None]:
    """The function for transformers' AttentionMaskInterface, given the two mask functions it accepts.

    It is called by keyword and returns a bool tensor (batch, tokens), True where a token is real, or None where all
    are. ``tokens`` is fewer than the keys where a cache of fixed size has room left: keys from there on are empty. Fed
    with its own result it returns the same, which transformers does where masks are prepared ahead of a call.

    For any other mask function it returns a mask of no tokens, which ``check_padding`` refuses. Models that can have a
    sliding window make a mask for it even where none of their layers uses it, so the refusal is left to a layer that
    does.
    """

    def padding_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = causal_mask_function,
        attention_mask: Tensor | None = None,
        allow_is_causal_skip: bool = True,
        allow_is_bidirectional_skip: bool = False,
        device: torch.device | str | None = None,
        **unused: Any,  # dtype and alike, for masks that are added to scores
    ) -> Tensor | None:
        is_causal = mask_function is causal_mask_function
        refused = attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] == 0
        if refused or (not is_causal and mask_function is not bidirectional_mask_function):
            return torch.ones(batch_size, 0, dtype=torch.bool, device=device)
        if kv_offset != 0:
            raise ValueError(
                f"past_key_values: expected a cache that keeps all tokens, got one that dropped {kv_offset}"
            )
        tokens = _tokens(q_length, kv_length, q_offset) if is_causal else kv_length
        if attention_mask is None:
            may_skip = allow_is_causal_skip if is_causal else allow_is_bidirectional_skip
            if tokens == kv_length and may_skip:
                return None
            return _said(torch.ones(batch_size, tokens, dtype=torch.bool, device=device), is_causal)
        # Only a cache of fixed size, whose length is a tensor, has a mask for keys that are not there yet.
        if attention_mask.ndim == 2 and attention_mask.shape[1] == kv_length and isinstance(q_offset, Tensor):
            attention_mask = attention_mask[:, :tokens]
        if attention_mask.shape != (batch_size, tokens):
            raise ValueError(
                f"attention_mask: expected (batch, tokens so far) = {(batch_size, tokens)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        real = attention_mask.to(torch.bool)
        if tokens == kv_length and not is_tracing() and bool(real.all()):
            return None
        return _said(real, is_causal)

    return padding_mask


def is_tracing() -> bool:
    """Whether what runs is recorded for other masks too, so that the values of this one must decide nothing."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


def said_causal(mask: Tensor | None) -> bool | None:
    """Whether a mask was made for causal attention; None where it does not say."""
    return getattr(mask, "_dilated_is_causal", None)


def _said(mask: Tensor, is_causal: bool) -> Tensor:
    """The mask, with the word whether it is causal; on an object of its own, for the caller's may serve two models."""
    mask = mask.view(mask.shape)
    mask._dilated_is_causal = is_causal  # type: ignore[attr-defined]
    return mask


def _tokens(q_length: int, kv_length: int, q_offset: int | Tensor) -> int:
    """How many keys there are, the new ones included: all of them, or fewer in a cache of fixed size."""
    if isinstance(q_offset, Tensor):
        if torch.compiler.is_compiling():
            raise ValueError(
                "past_key_values: expected a cache that grows under torch.compile, got one of fixed size, whose length "
                'is not known while tracing (use cache_implementation="dynamic", or do not compile)'
            )
        q_offset = int(q_offset)
    if q_offset + q_length > kv_length:
        raise ValueError(f"past_key_values: expected room for {q_offset + q_length} tokens, got {kv_length}")
    return q_offset + q_length


def check_padding(mask: object, batch: int, keys: int) -> Tensor | None:
    """Return what came as ``attention_mask`` if it is None or a padding mask for at most this many keys.

    Raises:
        TypeError: no bool tensor.
        ValueError: another shape, such as the four dimensions of an arbitrary mask; or a mask of no tokens, which
            stands for a mask function that is neither causal nor bidirectional.
    """
    if mask is None:
        return None
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else None
    if shape is not None and len(shape) == 4:
        raise ValueError(
            f"attention_mask: expected a padding mask (batch, tokens) or None, got four dimensions, {shape}: this "
            "attention cannot honour a mask of pairs"
        )
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"attention_mask: expected a bool tensor (batch, tokens) or None, got {found}")
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] > keys:
        raise ValueError(f"attention_mask: expected (batch, tokens) = ({batch}, at most {keys}), got {shape}")
    if mask.shape[1] == 0:
        raise ValueError(
            "attention_mask: expected causal or bidirectional attention, got another mask function (a sliding window "
            'or chunks: make each of config.layer_types "full_attention", or without layer_types set '
            "config.sliding_window = None; packed sequences: pass them as rows of a batch, and an attention_mask under "
            "torch.compile, where transformers cannot tell them from one sequence)"
        )
    return mask
