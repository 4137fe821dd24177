"""What one call of a creator asks for, checked before anything is decided.

Imports torch and dilated_core, and of the factory what its arguments may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dilated_core import Allocator, DilatedPattern, PatternStore
from dilated_core.checks import positive_integer
from dilated_factory.hardware import Hardware
from dilated_factory.policy import Policy
from dilated_factory.profile import Profile
from dilated_factory.resources.shared import SharedResources, shared_resources

USERS = "user"
_PRECISIONS = ("ieee", "tf32", "bf16")


@dataclass(frozen=True)
class Request:
    """The arguments of a creator, named as there, and ``options``: all that is for the type.

    Raises:
        TypeError, ValueError: one is none of its kind, or two contradict each other.
    """

    attention_type: str
    sequence_length: int | None
    enable_memory_pool: bool | None
    lightweight_pool: bool | None
    enable_pattern_cache: bool | None
    buffer_manager: bool
    allow_sparse: bool
    fp32_precision: str | None
    policy: Policy | None
    profile: Profile | str | None
    hardware: Hardware | None
    resources: SharedResources | None
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if self.sequence_length is not None:
            object.__setattr__(self, "sequence_length", positive_integer("sequence_length", self.sequence_length))
        for name in ("enable_memory_pool", "lightweight_pool", "enable_pattern_cache"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise TypeError(f"{name}: expected True, False or None, got {getattr(self, name)!r}")
        for name in ("allow_sparse", "buffer_manager"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if self.fp32_precision not in (None, *_PRECISIONS):
            raise ValueError(f"fp32_precision: expected None or one of {_PRECISIONS}, got {self.fp32_precision!r}")
        if not (self.profile is None or self.profile == USERS or isinstance(self.profile, Profile)):
            raise TypeError(f'profile: expected a Profile, None or "{USERS}", got {self.profile!r}')
        self._check_resources()
        for name, kind in (("policy", Policy), ("hardware", Hardware), ("resources", SharedResources)):
            if not isinstance(getattr(self, name), (kind, type(None))):
                raise TypeError(f"{name}: expected a {kind.__name__} or None, got {getattr(self, name)!r}")
        dtype = self.options.get("dtype")
        if not isinstance(dtype, (torch.dtype, type(None))):
            raise TypeError(f"dtype: expected a torch.dtype or None, got {dtype!r}")
        if self.options.get("device") is not None:
            try:
                device = torch.device(self.options["device"])
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"device: {error}") from error
            if device.type == "cuda" and not torch.cuda.is_available():
                raise ValueError(
                    f'device: expected a device that is here, got "{device}", and CUDA is not available to '
                    f"torch {torch.__version__} (`dilated info` says what is)"
                )

    def _check_resources(self) -> None:
        """Refuse words about pools and caches that contradict each other. Raises TypeError or ValueError."""
        for name, protocol, method, others in (
            ("allocator", Allocator, "empty", ("enable_memory_pool", "lightweight_pool", "buffer_manager")),
            ("patterns", PatternStore, "get_or_create", ("enable_pattern_cache",)),
        ):
            own = self.options.get(name)
            if own is None:
                continue
            if not isinstance(own, protocol):
                raise TypeError(f"{name}: expected an object with {method}, or None, got {type(own).__name__}")
            for other in others:
                word = getattr(self, other)
                if word is True or (word is False and other != "buffer_manager"):  # whose False is no word
                    raise ValueError(f"{other}: expected None beside {name}, which is what is used, got {word}")
        if self.buffer_manager and (self.enable_memory_pool is False or self.lightweight_pool is not None):
            word = "enable_memory_pool=False" if self.enable_memory_pool is False else "lightweight_pool"
            raise ValueError(f"buffer_manager=True and {word} contradict: it has a pool for each kind of buffer")

    @property
    def shared(self) -> SharedResources:
        """The pools and the cache that the module is to share: those that were given, else the process's own."""
        return shared_resources() if self.resources is None else self.resources


def make_pattern(segment_lengths: Sequence[int] | None, dilation_rates: Sequence[int] | None) -> DilatedPattern:
    """Return the pattern; the paper's where both are None.

    Raises as DilatedPattern does, and says what to write where the two were swapped.
    """
    if segment_lengths is None and dilation_rates is None:
        return DilatedPattern.longnet()
    if segment_lengths is None or dilation_rates is None:
        missing = "segment_lengths" if segment_lengths is None else "dilation_rates"
        raise ValueError(f"{missing}: expected one entry a branch, or neither for the paper's pattern; got None")
    try:
        return DilatedPattern(segment_lengths, dilation_rates)
    except ValueError as error:
        try:
            DilatedPattern(dilation_rates, segment_lengths)
        except (TypeError, ValueError):
            raise error from None
        raise ValueError(
            "segment_lengths and dilation_rates look swapped: write "
            f"segment_lengths={list(dilation_rates)}, dilation_rates={list(segment_lengths)}"
        ) from error
