"""The two creators: check what was asked, decide, build, and leave the decision on the module.

The module returned is the type's own, with one attribute added, and a hook where something goes by the length of a
call. Imports torch and dilated_core.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, cast

from torch import nn

from dilated_core import DilatedPattern
from dilated_core.checks import positive_integer
from dilated_factory.answer import decide
from dilated_factory.decision import Decision
from dilated_factory.hardware import Hardware
from dilated_factory.hooks import FollowCalls, PrecisionOfFloat32
from dilated_factory.hooks.calls import holder_of_kernel
from dilated_factory.policy import Policy
from dilated_factory.profile import Profile
from dilated_factory.request import Request, make_pattern
from dilated_factory.resources.shared import SharedResources

logger = logging.getLogger("dilated_factory")


class DecidedModule(nn.Module):
    """What type checkers see of a created module: an nn.Module with a ``decision``.

    At run time the module is of the attention type's own class; this one is never instantiated.
    """

    decision: Decision


def create_dilated_attention(
    attention_type: str = "auto",
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    *,
    sequence_length: int | None = None,
    enable_memory_pool: bool | None = None,
    lightweight_pool: bool | None = None,
    enable_pattern_cache: bool | None = None,
    buffer_manager: bool = False,
    allow_sparse: bool = False,
    fp32_precision: Literal["ieee", "tf32", "bf16"] | None = None,
    policy: Policy | None = None,
    profile: Profile | Literal["user"] | None = "user",
    hardware: Hardware | None = None,
    resources: SharedResources | None = None,
    **options: Any,
) -> DecidedModule:
    """Create a dilated attention: a module of (query, key, value), each (batch, seq, heads, head_dim).

    Args:
        attention_type: "standard" (plain composition of torch operations), "improved" (the fused path),
            "auto" (the policy chooses), or any type that an installed distribution registers.
        segment_lengths, dilation_rates: one entry a branch; both None for the paper's pattern.
        sequence_length: expected tokens a call, for the choice of the type and the first decision; it limits nothing.
            Where it is None the policy knows no length: it is never guessed from the segments. Every call decides anew
            where its length is of another class, see ``Policy.length_class``.
        enable_memory_pool, lightweight_pool, enable_pattern_cache: the caller's word, which wins over the policy; None
            leaves it to the policy.
        buffer_manager: draw each kind of buffer (output, temp, comm, cache, ...) from a pool of its own.
        allow_sparse: whether "auto" may choose a block-sparse type. Other types do not read it.
        fp32_precision: of float32 matrix products during a call: torch's own switch is set, and restored after it. None
            leaves it as it is. The switch is the process's, and the backward pass runs outside of the call.
        policy: thresholds; None for the defaults, changed by the profile.
        profile: what ``dilated tune`` measured; "user" for the user's own, where it fits this machine; None for none.
        hardware: what to decide for; None to look at this machine.
        resources: the pools and the cache to share; None for the process's own, ``shared_resources()``.
        options: of the type (is_causal=, softmax_scale=, attention_dropout=, semantics=, kernel=, ...). ``allocator=``
            and ``patterns=`` are a pool and a cache of one's own, instead of the shared ones. ``group=`` says that the
            ranks of a process group hold shards of one sequence.

    Returns:
        The module, of the type's own class, with the ``Decision`` at ``module.decision``.

    Raises:
        TypeError: an argument of a wrong type, or an option that the type does not have; those it has are listed.
        ValueError: an unknown type, sizes that do not fit, or words that contradict each other.
        NotInstalledError: a known type that is not installed.

    >>> import torch
    >>> attention = create_dilated_attention("auto", [4, 8], [1, 2], sequence_length=8)
    >>> attention(*torch.zeros(3, 1, 8, 2, 4)).shape
    torch.Size([1, 8, 2, 4])
    >>> attention.decision.attention_type, attention.decision.pool_mode
    ('improved', 'off')
    """
    pattern = make_pattern(segment_lengths, dilation_rates)
    request = Request(
        attention_type,
        sequence_length,
        enable_memory_pool,
        lightweight_pool,
        enable_pattern_cache,
        buffer_manager,
        allow_sparse,
        fp32_precision,
        policy,
        profile,
        hardware,
        resources,
        options,
    )
    return _build(request, "attention", pattern)


def create_multihead_dilated_attention(
    attention_type: str = "auto",
    embed_dim: int | None = None,
    num_heads: int | None = None,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    *,
    sequence_length: int | None = None,
    enable_memory_pool: bool | None = None,
    lightweight_pool: bool | None = None,
    enable_pattern_cache: bool | None = None,
    buffer_manager: bool = False,
    allow_sparse: bool = False,
    fp32_precision: Literal["ieee", "tf32", "bf16"] | None = None,
    policy: Policy | None = None,
    profile: Profile | Literal["user"] | None = "user",
    hardware: Hardware | None = None,
    resources: SharedResources | None = None,
    **options: Any,
) -> DecidedModule:
    """Create a multi-head dilated attention, called as nn.MultiheadAttention with batch_first.

    Query, key and value are (batch, seq, embed_dim); the call returns (output of that shape, None).

    Args:
        embed_dim, num_heads: required; embed_dim is a multiple of num_heads.
        options: of the type (dropout=, bias=, layer_norm=, kv_heads=, is_causal=, kernel=, device=, dtype=, ...).

    The other arguments are those of ``create_dilated_attention``, and so are what is returned and what is raised.

    >>> import torch
    >>> attention = create_multihead_dilated_attention("improved", 16, 4, [4, 8], [1, 2], kernel="math")
    >>> x = torch.zeros(2, 8, 16)
    >>> output, weights = attention(x, x, x)
    >>> output.shape, weights, attention.decision.kernel
    (torch.Size([2, 8, 16]), None, 'math')
    """
    if embed_dim is None or num_heads is None:
        missing = "embed_dim" if embed_dim is None else "num_heads"
        raise TypeError(f"{missing}: expected a positive int, got None (e.g. embed_dim=512, num_heads=8)")
    embed_dim, num_heads = positive_integer("embed_dim", embed_dim), positive_integer("num_heads", num_heads)
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim: expected a multiple of num_heads = {num_heads}, got {embed_dim}")
    pattern = make_pattern(segment_lengths, dilation_rates)
    request = Request(
        attention_type,
        sequence_length,
        enable_memory_pool,
        lightweight_pool,
        enable_pattern_cache,
        buffer_manager,
        allow_sparse,
        fp32_precision,
        policy,
        profile,
        hardware,
        resources,
        options,
    )
    return _build(request, "multihead", pattern, embed_dim=embed_dim, num_heads=num_heads)


def _build(request: Request, form: str, pattern: DilatedPattern, **sizes: int) -> DecidedModule:
    decision, builder, options, rules = decide(request, form, **sizes)
    module = builder(segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates, **sizes, **options)
    decided = cast(DecidedModule, module)
    decided.decision = decision
    if rules is not None and holder_of_kernel(module) is None:
        rules.profile = None  # a type of others, whose kernel is no such choice
    if rules is not None and (rules.allocator is not None or rules.profile is not None):
        follow = FollowCalls(rules)
        if rules.profile is None and decision.sequence_length is not None:
            follow.decisions[rules.policy.length_class(decision.sequence_length),] = decision
        follow.attach(module)
    if request.fp32_precision is not None:
        PrecisionOfFloat32(request.fp32_precision).attach(module)
    logger.info("%s", decision.summary())
    logger.debug("%s", decision)
    return decided
