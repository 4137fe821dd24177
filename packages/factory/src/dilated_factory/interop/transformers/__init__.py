"""Dilated and block-sparse attention for the models of Hugging Face's transformers, by the name of an implementation.

This file alone knows transformers, and only while ``register_transformers`` runs. The rooms beside it are given what
they need: masks (what a model's mask says), settings (what its config says), rows (padding, prompts and steps), and an
engine for each of the two attentions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dilated_core import Allocator, PatternStore
from dilated_core.checks import resources
from dilated_factory.interop.transformers.block_sparse import BlockSparseEngine
from dilated_factory.interop.transformers.dilated import DilatedEngine
from dilated_factory.interop.transformers.masks import make_mask_function
from dilated_factory.interop.transformers.rows import make_attention_function
from dilated_factory.interop.transformers.settings import BlockSparseSettings, DilatedSettings

__all__ = ["register_transformers"]


def register_transformers(
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    *,
    semantics: str | None = None,
    kernel: str | None = None,
    block_sparse: Mapping[str, Any] | None = None,
    allocator: Allocator | None = None,
    patterns: PatternStore | None = None,
) -> None:
    """Make "dilated" and "block_sparse" values of ``attn_implementation`` for every transformers model.

    What a model attends is written in its config, which save_pretrained and from_pretrained keep:

        config.dilated = {"segment_lengths": [512, 2048], "dilation_rates": [1, 4]}     # and semantics, kernel
        config.block_sparse = {"patterns": [{"name": "local", "window": 4}], "block_size": 64}    # and backend, kernel

    The arguments here are for models whose config has no such entry; a config's entry replaces them whole. A model
    with neither raises at its first call: a default would be another function than the one it was trained with.
    May be called again, with other defaults; models that run then use the new ones.

    Segments start at a row's first real token, so left padding changes nothing. One new token, or a chunk of them,
    with keys from a cache is attended as the same rows of the causal call over all tokens so far. Not supported, and
    refused: masks of four dimensions, sliding windows, packed sequences, cross-attention, attention weights as output,
    padding under torch.jit.trace, and whatever else a model asks of its attention (soft caps, sinks, position biases).

    Args:
        segment_lengths, dilation_rates: LongNet's branches, both or neither.
        semantics: "paper" (where None), "torchscale" or "grouped", as in ``dilated_attention``.
        kernel: a name from ``dilated_core.kernels.table()``, or "auto" (where None).
        block_sparse: as ``config.block_sparse``.
        allocator, patterns: lent to every call, as in ``dilated_attention``.

    Raises:
        ImportError: transformers is not installed, or older than 5; the message names the extra.
        TypeError, ValueError: an argument of a wrong type or value.
    """
    lent = resources(allocator, patterns)
    dilated_defaults = DilatedSettings.from_arguments(segment_lengths, dilation_rates, semantics, kernel)
    block_sparse_defaults = (
        None if block_sparse is None else BlockSparseSettings.from_config("block_sparse", block_sparse)
    )
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
    except ImportError as error:
        raise ImportError(
            'register_transformers needs transformers 5 or later: pip install "dilated-factory[transformers]"'
        ) from error

    mask_function = make_mask_function(causal_mask_function, bidirectional_mask_function)
    for engine in (DilatedEngine(dilated_defaults, lent), BlockSparseEngine(block_sparse_defaults, lent)):
        AttentionInterface.register(engine.name, make_attention_function(engine))
        # Without this, transformers gives the attention function no mask at all.
        AttentionMaskInterface.register(engine.name, mask_function)
