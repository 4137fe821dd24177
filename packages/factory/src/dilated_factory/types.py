"""The attention types this distribution provides, and the shape of a type that any distribution can provide.

To add a type, write an object (a module will do) with the two builders below and register it in
pyproject.toml:

    [project.entry-points."dilated.attention"]
    my_type = "my_package.my_module:my_object"

Imports dilated_core; itself imported only when one of its types is asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import nn

from dilated_core import DilatedAttention, MultiheadDilatedAttention

SIZES = ("embed_dim", "num_heads", "segment_lengths", "dilation_rates")


class AttentionType(Protocol):
    """What an entry point of the group "dilated.attention" must load to. Both builders are called by keyword.

    The options a builder accepts are read from its signature, so misspelled ones are refused before it is
    called; with ``**options`` in its signature the builder has to refuse them itself. Where it names ``allocator`` or
    ``patterns`` it is given the shared memory pool or pattern cache by them, see ``dilated_core.Allocator`` and
    ``dilated_core.PatternStore``.
    """

    @property
    def attention(self) -> Callable[..., nn.Module]:
        """``(segment_lengths, dilation_rates, **options)`` -> module of (query, key, value), heads apart."""

    @property
    def multihead(self) -> Callable[..., nn.Module]:
        """``(embed_dim, num_heads, segment_lengths, dilation_rates, **options)`` -> module.

        Called as nn.MultiheadAttention with batch_first, it returns (output, None).
        """


@dataclass(frozen=True)
class Builders:
    """The plainest AttentionType: two callables."""

    attention: Callable[..., nn.Module]
    multihead: Callable[..., nn.Module]


# The composition of torch operations that autograd differentiates, to read and to check against.
# They allocate and plan for themselves, so it has no options for a pool and a cache.
standard = Builders(
    partial(DilatedAttention, fused=False, allocator=None, patterns=None),
    partial(MultiheadDilatedAttention, fused=False, allocator=None, patterns=None),
)
# The same function as one operator with its own backward.
improved = Builders(partial(DilatedAttention, fused=True), partial(MultiheadDilatedAttention, fused=True))


def names_option(builder: Callable[..., nn.Module], option: str) -> bool:
    """Whether a builder's signature names that option, and it is not settled by a partial.

    >>> names_option(improved.attention, "allocator"), names_option(standard.attention, "allocator")
    (True, False)
    """
    return option in inspect.signature(builder).parameters and option not in _settled(builder)


def accepted_options(builder: Callable[..., nn.Module]) -> tuple[str, ...] | None:
    """Return the names of the options a builder accepts, None where it takes any.

    Sizes, and what a partial has already set, are no options.

    >>> accepted_options(lambda segment_lengths, dilation_rates, *, window=3: None)
    ('window',)
    """
    parameters = inspect.signature(builder).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    settled = {*SIZES, *_settled(builder)}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(one.name for one in parameters if one.kind in named and one.name not in settled)


def _settled(builder: Callable[..., nn.Module]) -> frozenset[str]:
    """The options that a partial has already set."""
    return frozenset(builder.keywords) if isinstance(builder, partial) else frozenset()
