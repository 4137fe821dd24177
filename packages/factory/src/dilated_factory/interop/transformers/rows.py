"""From transformers' call of an attention function to an engine: whole sequences or steps, each row from its own start.

A row's positions are counted from its first real token, whatever padding is on its left: whole sequences are rolled to
start there and rolled back, and in steps the keys before it are cut off. Imports torch and this folder's masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dilated_factory.interop.transformers.masks import check_padding, is_tracing, said_causal

# What models hand on to every layer, and what has no say in which keys are attended.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "deterministic",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)


class Engine(Protocol):
    """One of the two attentions. Tensors are (batch, seq, heads, head_dim), key and value with heads of their own."""

    name: str

    def settings(self, module: nn.Module) -> Any:
        """What the module's config says."""

    def check_heads(self, settings: Any, heads: int, all_heads: int | None) -> None:
        """Raise ValueError where these heads, a part of all, would attend otherwise than they do among all."""

    def whole(
        self,
        settings: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real: Tensor | None,
        *,
        is_causal: bool,
        scale: float | None,
        dropout_p: float,
    ) -> Tensor:
        """Self-attention of sequences that start at their first token; real: (batch, seq), bool, False at padding."""

    def last_rows(
        self,
        settings: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real: Tensor | None,
        *,
        scale: float | None,
        dropout_p: float,
    ) -> Tensor:
        """The last query.shape[1] rows of the causal call over all keys, of which there are more."""


def make_attention_function(engine: Engine) -> Callable[..., tuple[Tensor, None]]:
    """The function for transformers' AttentionInterface that attends by this engine."""

    def attention_function(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """(batch, heads, seq, head_dim) in, (batch, seq, heads, head_dim) out, as transformers has it."""
        real = check_padding(attention_mask, key.shape[0], key.shape[2])
        if real is not None and is_tracing() and not torch.compiler.is_compiling():
            raise ValueError(
                "attention_mask: expected None under torch.jit.trace, which would take the padding of the example for "
                f"that of every call (torch.compile and torch.export do not), got shape {tuple(real.shape)}"
            )
        _refuse_others(engine.name, others)
        causal = _is_causal(engine.name, module, is_causal)
        by_mask = said_causal(real)
        if by_mask is not None:  # as with sdpa: some modules say causal and are given a bidirectional mask
            causal = by_mask
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if real is not None and causal:  # a cache of fixed size holds no tokens beyond the mask
            key, value = (tensor[:, : real.shape[1]] for tensor in (key, value))
        seq, keys = query.shape[1], key.shape[1]
        if (real is not None and real.shape[1] != keys) or (seq != keys and (not causal or seq > keys)):
            raise ValueError(
                f'key: expected the tokens of query, {seq}, or more in causal decoding, got {keys}: "{engine.name}" is '
                "self-attention (give cross-attention another attn_implementation)"
            )
        settings = engine.settings(module)
        engine.check_heads(settings, query.shape[2], _all_heads(module))
        options = {"scale": scaling, "dropout_p": dropout}
        attend = _whole if seq == keys else _last_rows
        out = attend(engine, settings, (query, key, value), real, causal, options)
        return out.contiguous(), None

    return attention_function


def _refuse_others(name: str, others: dict[str, Any]) -> None:
    for option, value in others.items():
        if option not in _WITHOUT_EFFECT and value is not None and value is not False:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f'{option}: expected None, which is all that "{name}" attention can honour, got {found}')


def _is_causal(name: str, module: nn.Module, is_causal: bool | None) -> bool:
    """The caller's word, or else the module's, as the other attention functions take it."""
    if is_causal is None:
        if not isinstance(getattr(module, "is_causal", None), bool):
            raise ValueError(f"module: expected an attribute is_causal, {type(module).__name__} has none")
        is_causal = bool(module.is_causal)
    across = "Cross" in type(module).__name__ or getattr(module, "is_cross_attention", False)
    if across or (getattr(module, "is_decoder", False) is True and not is_causal):
        raise ValueError(
            f'module: expected self-attention, got {type(module).__name__} across two sequences, which "{name}" does '
            "not define (give it another attn_implementation)"
        )
    return is_causal


def _all_heads(module: nn.Module) -> int | None:
    """How many heads the module has on all devices; None where neither it nor its config says."""
    config = getattr(module, "config", None)
    said = (getattr(module, "num_heads", None), getattr(config, "num_attention_heads", None))
    return next((heads for heads in said if isinstance(heads, int)), None)


def _whole(
    engine: Engine,
    settings: Any,
    tensors: tuple[Tensor, Tensor, Tensor],
    real: Tensor | None,
    is_causal: bool,
    options: dict[str, Any],
) -> Tensor:
    if real is None:
        return engine.whole(settings, *tensors, None, is_causal=is_causal, **options)
    starts = _first_real(real)
    # Elsewhere than on a CPU, and while tracing, a look at the values costs more than rolling by 0.
    if real.device.type == "cpu" and not torch.compiler.is_compiling() and not starts.any():
        return engine.whole(settings, *tensors, real, is_causal=is_causal, **options)
    seq = real.shape[1]
    row = torch.arange(real.shape[0], device=real.device).unsqueeze(1)
    position = torch.arange(seq, device=real.device)
    from_start = (row, (position + starts.unsqueeze(1)) % seq)
    query, key, value = (tensor[from_start] for tensor in tensors)
    out = engine.whole(settings, query, key, value, real[from_start], is_causal=is_causal, **options)
    return out[row, (position - starts.unsqueeze(1)) % seq]


def _last_rows(
    engine: Engine,
    settings: Any,
    tensors: tuple[Tensor, Tensor, Tensor],
    real: Tensor | None,
    is_causal: bool,
    options: dict[str, Any],
) -> Tensor:
    if real is None:
        return engine.last_rows(settings, *tensors, None, **options)
    query, key, value = tensors
    past = key.shape[1] - query.shape[1]
    parts: list[tuple[list[int], Tensor]] = []
    for start, rows in _by_start(real):
        # Neighbours, and a row alone, are views: nothing of the cache is copied.
        at = slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else rows
        k, v, here = (tensor[at, start:] for tensor in (key, value, real))
        kept = None if bool(here.all()) else here
        new = query[at, max(start - past, 0) :]
        if start >= past:  # the first real token is among the new ones
            out = engine.whole(settings, new, k, v, kept, is_causal=is_causal, **options)
            out = torch.cat([out.new_zeros(len(rows), start - past, *out.shape[2:]), out], 1)
        else:
            out = engine.last_rows(settings, new, k, v, kept, **options)
        parts.append((rows, out))
    order = [row for rows, _ in parts for row in rows]
    joined = torch.cat([out for _, out in parts])
    if order == sorted(order):
        return joined
    return joined[torch.tensor(order, device=joined.device).argsort()]


def _first_real(real: Tensor) -> Tensor:
    """The position of each row's first real token, int64 (batch,); 0 where a row has none."""
    return real.to(torch.uint8).argmax(1)


def _by_start(real: Tensor) -> Iterator[tuple[int, list[int]]]:
    """The batch rows of each first real position; on a GPU this waits for the device."""
    starts: list[int] = _first_real(real).tolist()
    for start in sorted(set(starts)):
        yield start, [row for row, own in enumerate(starts) if own == start]
