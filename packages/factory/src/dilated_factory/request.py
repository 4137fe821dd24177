"""One call's request to the factory: its checks, and the decision that answers it.

Imports torch and dilated_core for sizes and kernels; a type is imported by the registry once it is chosen.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from dilated_core import DilatedPattern, kernels
from dilated_factory import registry
from dilated_factory.decision import Decision
from dilated_factory.hardware import Hardware
from dilated_factory.policy import Policy
from dilated_factory.types import SIZES, accepted_options

# What this release records but cannot connect yet, and the distribution it will need.
_POOL = ("memory pool", "dilated-memory-pool")
_CACHE = ("pattern cache", "dilated-pattern-cache")


@dataclass(frozen=True)
class Request:
    """What one call of a creator asks for, checked at construction."""

    attention_type: str
    sequence_length: int | None
    enable_memory_pool: bool | None
    lightweight_pool: bool | None
    enable_pattern_cache: bool | None
    allow_sparse: bool
    policy: Policy | None
    hardware: Hardware | None
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if self.sequence_length is not None:
            positive("sequence_length", self.sequence_length)
        for name in ("enable_memory_pool", "lightweight_pool", "enable_pattern_cache"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise TypeError(f"{name}: expected True, False or None, got {getattr(self, name)!r}")
        if not isinstance(self.allow_sparse, bool):
            raise TypeError(f"allow_sparse: expected a bool, got {self.allow_sparse!r}")
        for name, kind in (("policy", Policy), ("hardware", Hardware)):
            if not isinstance(getattr(self, name), (kind, type(None))):
                raise TypeError(f"{name}: expected a {kind.__name__} or None, got {getattr(self, name)!r}")
        dtype = self.options.get("dtype")
        if not isinstance(dtype, (torch.dtype, type(None))):
            raise TypeError(f"dtype: expected a torch.dtype or None, got {dtype!r}")
        if self.options.get("device") is not None:
            try:
                torch.device(self.options["device"])
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"device: {error}") from error

    def decide(self, form: str, **sizes: int) -> tuple[Decision, Callable[..., nn.Module]]:
        """Return the decision, and the chosen type's builder: its "attention" or "multihead" (`form`)."""
        usable = registry.installed()
        registry.check_name(self.attention_type, usable)
        policy = self.policy or Policy()
        hardware = self.hardware or Hardware.detect(self.options.get("device"))

        name, reasons = self._choose_type(policy, hardware, usable, sizes.get("embed_dim"))
        builder: Callable[..., nn.Module] = getattr(registry.load(usable[name]), form)
        accepted = accepted_options(builder)
        _check_options(name, form, self.options, accepted)

        offered = accepted is None or "kernel" in accepted
        kernel, kernel_reason = self._foresee_kernel(hardware, sizes, offered)
        pool_mode, pool_reason = policy.choose_pool(
            name, self.sequence_length, enable=self.enable_memory_pool, lightweight=self.lightweight_pool
        )
        cache = policy.pattern_cache if self.enable_pattern_cache is None else self.enable_pattern_cache
        by = "the policy's default" if self.enable_pattern_cache is None else "as was asked for"
        reasons += (
            kernel_reason,
            f"pool: {pool_mode}, {pool_reason}",
            f"pattern cache: {'on' if cache else 'off'}, {by}",
        )

        # A wish of the policy is recorded; what the caller asked for in so many words must be had or refused.
        unwired = []
        if pool_mode != "off":
            if self.enable_memory_pool or self.lightweight_pool:
                _refuse("enable_memory_pool" if self.enable_memory_pool else "lightweight_pool", *_POOL)
            unwired.append(_POOL)
        if cache:
            if self.enable_pattern_cache:
                _refuse("enable_pattern_cache", *_CACHE)
            unwired.append(_CACHE)
        reasons += tuple(f"{what}: not wired, {_absence(distribution)}" for what, distribution in unwired)
        return Decision(name, kernel, pool_mode, cache, reasons, tuple(what for what, _ in unwired)), builder

    def _choose_type(
        self, policy: Policy, hardware: Hardware, usable: Collection[str], embed_dim: int | None
    ) -> tuple[str, tuple[str, ...]]:
        if self.attention_type != registry.AUTO:
            return self.attention_type, (f'type: "{self.attention_type}" was asked for',)
        working_set = None
        if embed_dim is not None and self.sequence_length is not None:
            dtype = self.options.get("dtype") or torch.get_default_dtype()
            working_set = policy.live_tensors * self.sequence_length * embed_dim * dtype.itemsize
        return policy.choose_type(
            self.sequence_length,
            installed=usable,
            process_group=hardware.process_group,
            working_set=working_set,
            memory_total=hardware.memory_total,
            allow_sparse=self.allow_sparse,
        )

    def _foresee_kernel(self, hardware: Hardware, sizes: dict[str, int], offered: bool) -> tuple[str, str]:
        """The kernel's name as far as it can be known before a call, and why."""
        asked = self.options.get("kernel", "auto")
        if not offered:
            return "auto", "kernel: left to the type, which has no kernel option"
        if asked != "auto":
            return str(asked), f'kernel: "{asked}" was asked for'
        if not sizes:
            return "auto", "kernel: chosen at each call, from the device, dtype and head_dim of its tensors"
        device = torch.device(self.options.get("device") or hardware.device_type)
        dtype = self.options.get("dtype") or torch.get_default_dtype()
        head_dim = sizes["embed_dim"] // sizes["num_heads"]
        name = kernels.choose("auto", device, dtype, head_dim).name
        why = f"kernel: {name}, for {dtype} with head_dim {head_dim} on {device}; chosen again at each call"
        if name == "math":
            refusals = [f"{one}: {no}" for one, no in kernels.survey(device, dtype, head_dim).items() if no]
            why += f" (the fallback; {'; '.join(refusals)})"
        elif self.options.get("dropout"):
            why += '; "math" while training, which alone drops attention weights'
        return name, why


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


def positive(name: str, value: object) -> int:
    """Return `value` if it is an int of at least 1. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a positive int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value}")
    return value


def _check_options(name: str, form: str, options: dict[str, Any], accepted: tuple[str, ...] | None) -> None:
    if accepted is None:
        return
    for option in options:
        if option in accepted:
            continue
        known = ", ".join(accepted)
        raise TypeError(
            f'{option}: attention type "{name}" has no such option, only {known}{_advice(form, option, accepted)}'
        )


def _advice(form: str, option: str, accepted: tuple[str, ...]) -> str:
    """What was probably meant: one of the type's options, or of the creator's own arguments."""
    multihead_only = SIZES[:2]
    if form == "attention" and option in multihead_only:
        return "; create_multihead_dilated_attention has it"
    names = [*SIZES, *(field.name for field in fields(Request) if field.name != "options"), *accepted]
    if form == "attention":
        names = [name for name in names if name not in multihead_only]
    near = [name for name in names if option in name] or difflib.get_close_matches(option, names, n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


def _absence(distribution: str) -> str:
    here = importlib.util.find_spec(distribution.replace("-", "_")) is not None
    state = "is installed" if here else "is not installed"
    return f"{distribution} {state} and this release of dilated-factory does not use it yet"


def _refuse(argument: str, what: str, distribution: str) -> None:
    raise registry.NotInstalledError(
        f"{argument}=True: no {what} can be provided: {_absence(distribution)}; "
        f"leave {argument} out, and the decision only records what the policy would choose"
    )
