"""One call's request to the factory: its checks, the decision that answers it, and what is wired for it.

Imports torch and dilated_core for sizes and kernels; a type is imported by the registry once it is chosen.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from dilated_core import Allocator, DilatedPattern, PatternStore, kernels
from dilated_factory import registry
from dilated_factory.decision import Decision
from dilated_factory.hardware import Hardware
from dilated_factory.hooks import Rules
from dilated_factory.policy import Policy, PoolMode
from dilated_factory.profile import Profile, users_profile
from dilated_factory.resources.handles import BuffersByKind, CachedPatterns, PooledAllocator
from dilated_factory.resources.shared import POOLED_DEVICES, SharedResources, shared_resources
from dilated_factory.types import SIZES, accepted_options, names_option

USERS = "user"
_PRECISIONS = ("ieee", "tf32", "bf16")


class Answer(NamedTuple):
    """What a request comes to.

    Attributes:
        decision: the choices, for the length that was given.
        builder: of the type that was chosen.
        options: for the builder: the caller's, and what is wired.
        rules: what goes by the length of a call; None where nothing does.
    """

    decision: Decision
    builder: Callable[..., nn.Module]
    options: dict[str, Any]
    rules: Rules | None


@dataclass(frozen=True)
class Request:
    """What one call of a creator asks for, checked at construction."""

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
            positive("sequence_length", self.sequence_length)
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

    def decide(self, form: str, **sizes: int) -> Answer:
        """Decide, for the "attention" or the "multihead" form of a type."""
        usable = registry.installed()
        registry.check_name(self.attention_type, usable)
        hardware = self.hardware or Hardware.detect(self.options.get("device"))
        profile, profile_reason = self._profile(hardware)
        policy = self.policy or (Policy() if profile is None else profile.policy(Policy()))

        name, reasons = self._choose_type(policy, hardware, usable, sizes.get("embed_dim"))
        registry.check_name(name, usable)
        builder: Callable[..., nn.Module] = getattr(registry.load(usable[name]), form)
        accepted = accepted_options(builder)
        _check_options(name, form, self.options, accepted)
        options = dict(self.options)
        unwired: list[str] = []

        rules = Rules(name, policy, self.enable_memory_pool, self.lightweight_pool)
        rules.sequence_length = self.sequence_length
        if sizes:
            rules.head_dim = sizes["embed_dim"] // sizes["num_heads"]
        # What another's `**options` would make of the word is not known.
        offered = names_option(builder, "kernel") or (accepted is None and name in registry.KNOWN)
        kernel, kernel_reason = self._foresee_kernel(hardware, sizes, offered)
        own = names_option(builder, "kernel") and options.get("kernel", "auto") == "auto"
        if own and profile is not None and profile.kernels and not _drops(options):
            rules.profile = replace(profile, measurements=())  # which copies of the module need not carry

        pool_mode, pool_reason = self._wire_pool(policy, hardware, name, builder, options, rules, unwired)
        cache, cache_reason = self._wire_cache(policy, name, builder, options, unwired)
        reasons += (
            kernel_reason,
            f"pool: {pool_mode}, {pool_reason}",
            f"pattern cache: {cache_reason}",
            profile_reason,
        )
        if profile is not None and profile.block_size and "block_size" in (accepted or ()):
            rows, columns = profile.block_size
            fastest = f"the profile found ({rows}, {columns}) the fastest: another function, so give block_size= for it"
            reasons += (f"block size: the type's own; {fastest}",)
        decision = Decision(
            name,
            kernel,
            pool_mode,
            cache,
            reasons,
            buffer_manager=self.buffer_manager,
            sequence_length=self.sequence_length,
            policy=policy,
            profile=None if profile is None else profile.path or "as given",
            unwired=tuple(unwired),
        )
        follows = rules.allocator is not None or rules.profile is not None
        return Answer(decision, builder, options, rules if follows else None)

    def _profile(self, hardware: Hardware) -> tuple[Profile | None, str]:
        """The profile that counts, and a reason."""
        if self.profile is None:
            return None, "profile: none, as was asked for"
        if isinstance(self.profile, Profile):
            found: Profile | None = self.profile
        elif self.hardware is not None:
            return None, "profile: none, since hardware= describes another machine than the one it would be of"
        else:
            found = users_profile(hardware.device_type)
        if found is None:
            return None, "profile: none that fits this machine (`dilated tune` measures one)"
        thresholds = "" if self.policy is None else "; its pool thresholds yield to policy="
        return (
            found,
            f"profile: {found.path or 'as given'}, measured {found.created or 'at an unknown time'}{thresholds}",
        )

    def _wire_pool(
        self,
        policy: Policy,
        hardware: Hardware,
        name: str,
        builder: Callable[..., nn.Module],
        options: dict[str, Any],
        rules: Rules,
        unwired: list[str],
    ) -> tuple[PoolMode, str]:
        """The pool's mode and a reason; the allocator goes into `options`, and into `rules` where calls switch it."""
        given = options.get("allocator")
        if given is not None:
            own: PoolMode = "lightweight" if getattr(given, "mode", None) == "lightweight" else "full"
            return own, f"the caller's allocator, {given!r}"
        takes = names_option(builder, "allocator")
        device = torch.device(options.get("device") or hardware.device_type).type
        if device not in POOLED_DEVICES and (self.buffer_manager or self.enable_memory_pool or self.lightweight_pool):
            raise ValueError(f"device: expected one of {POOLED_DEVICES} for a memory pool, got {device}")
        if self.buffer_manager:
            if not takes:
                raise TypeError(f'buffer_manager: attention type "{name}" has no option allocator to take it by')
            options["allocator"] = BuffersByKind(self._resources)
            return "full", "buffer_manager=True was asked for: a pool for each kind of buffer, in a mode of its own"
        mode, reason = policy.choose_pool(
            name, self.sequence_length, enable=self.enable_memory_pool, lightweight=self.lightweight_pool
        )
        if takes and mode != "off" and device not in POOLED_DEVICES:
            unwired.append("memory pool")
            return mode, f"{reason}; not wired, since there is none on {device}"
        if not takes:
            if mode == "off":
                return mode, reason
            if self.enable_memory_pool or self.lightweight_pool:
                word = "enable_memory_pool" if self.enable_memory_pool else "lightweight_pool"
                raise TypeError(f'{word}: attention type "{name}" has no option allocator to take a pool by')
            unwired.append("memory pool")
            return mode, f'{reason}; not wired, since the type "{name}" has no option allocator'
        if self.enable_memory_pool is False:
            return mode, reason
        allocator = PooledAllocator(self._resources, mode)
        options["allocator"] = allocator
        # A mode that the caller has named is settled; any other goes by the length of each call.
        if not (self.lightweight_pool or (self.enable_memory_pool and self.lightweight_pool is False)):
            rules.allocator = allocator
        return mode, reason

    def _wire_cache(
        self, policy: Policy, name: str, builder: Callable[..., nn.Module], options: dict[str, Any], unwired: list[str]
    ) -> tuple[bool, str]:
        """Whether plans are cached, and a reason; the store goes into `options`."""
        if options.get("patterns") is not None:
            return True, f"on, the caller's, {options['patterns']!r}"
        wanted = policy.pattern_cache if self.enable_pattern_cache is None else self.enable_pattern_cache
        by = "the policy's default" if self.enable_pattern_cache is None else "as was asked for"
        if not wanted:
            return False, f"off, {by}"
        if names_option(builder, "patterns"):
            options["patterns"] = CachedPatterns(self._resources)
            return True, f"on, {by}; the one that modules of this process share"
        if self.enable_pattern_cache:
            raise TypeError(f'enable_pattern_cache: attention type "{name}" has no option patterns to take a cache by')
        unwired.append("pattern cache")
        return True, f'on, {by}; not wired, since the type "{name}" has no option patterns'

    @property
    def _resources(self) -> SharedResources:
        return shared_resources() if self.resources is None else self.resources

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
            sharded=self.options.get("group") is not None,
            world_size=hardware.world_size,
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


def _drops(options: dict[str, Any]) -> bool:
    """Whether attention weights are dropped, which one kernel alone does."""
    return bool(options.get("dropout") or options.get("attention_dropout"))
