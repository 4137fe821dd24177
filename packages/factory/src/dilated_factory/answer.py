"""The decision that answers a request: which type, which kernel, which profile, and why.

Imports torch and dilated_core for sizes and kernels; a type is imported by the registry once it is chosen.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from dilated_core import kernels
from dilated_factory import registry
from dilated_factory.decision import Decision
from dilated_factory.hardware import Hardware
from dilated_factory.hooks import Rules
from dilated_factory.policy import Policy
from dilated_factory.profile import Profile, users_profile
from dilated_factory.request import Request
from dilated_factory.types import SIZES, accepted_options, names_option
from dilated_factory.wiring import Wiring


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


def decide(request: Request, form: str, **sizes: int) -> Answer:
    """Decide, for the "attention" or the "multihead" form of a type.

    Args:
        sizes: embed_dim and num_heads of the multihead form.

    Raises:
        TypeError, ValueError, NotInstalledError: see ``create_dilated_attention``.
    """
    usable = registry.installed()
    registry.check_name(request.attention_type, usable)
    hardware = request.hardware or Hardware.detect(request.options.get("device"))
    profile, profile_reason = _profile(request, hardware)
    policy = request.policy or (Policy() if profile is None else profile.policy(Policy()))

    name, reasons = _choose_type(request, policy, hardware, usable, sizes.get("embed_dim"))
    registry.check_name(name, usable)
    builder: Callable[..., nn.Module] = getattr(registry.load(usable[name]), form)
    accepted = accepted_options(builder)
    _check_options(name, form, request.options, accepted)

    rules = Rules(name, policy, request.enable_memory_pool, request.lightweight_pool)
    rules.sequence_length = request.sequence_length
    if sizes:
        rules.head_dim = sizes["embed_dim"] // sizes["num_heads"]
    device = torch.device(request.options.get("device") or hardware.device_type)
    # What another's ``**options`` would make of the word is not known.
    offered = names_option(builder, "kernel") or (accepted is None and name in registry.KNOWN)
    kernel, kernel_reason = _foresee_kernel(request, device, rules.head_dim, offered)
    own = names_option(builder, "kernel") and request.options.get("kernel", "auto") == "auto"
    if own and profile is not None and profile.kernels and not _drops(request.options):
        rules.profile = replace(profile, measurements=())  # which copies of the module need not carry

    wiring = Wiring(request, builder, rules, device.type)
    pool_mode, pool_reason = wiring.pool()
    cache, cache_reason = wiring.cache()
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
        buffer_manager=request.buffer_manager,
        sequence_length=request.sequence_length,
        policy=policy,
        profile=None if profile is None else profile.path or "as given",
        unwired=tuple(wiring.unwired),
    )
    follows = rules.allocator is not None or rules.profile is not None
    return Answer(decision, builder, wiring.options, rules if follows else None)


def _profile(request: Request, hardware: Hardware) -> tuple[Profile | None, str]:
    """The profile that counts, and a reason."""
    if request.profile is None:
        return None, "profile: none, as was asked for"
    if isinstance(request.profile, Profile):
        found: Profile | None = request.profile
    elif request.hardware is not None:
        return None, "profile: none, since hardware= describes another machine than the one it would be of"
    else:
        found = users_profile(request.options.get("device") or hardware.device_type)
    if found is None:
        return None, "profile: none that fits this machine (`dilated tune` measures one)"
    thresholds = "" if request.policy is None else "; its pool thresholds yield to policy="
    return (
        found,
        f"profile: {found.path or 'as given'}, measured {found.created or 'at an unknown time'}{thresholds}",
    )


def _choose_type(
    request: Request, policy: Policy, hardware: Hardware, usable: Collection[str], embed_dim: int | None
) -> tuple[str, tuple[str, ...]]:
    if request.attention_type != registry.AUTO:
        return request.attention_type, (f'type: "{request.attention_type}" was asked for',)
    working_set = None
    if embed_dim is not None and request.sequence_length is not None:
        dtype = request.options.get("dtype") or torch.get_default_dtype()
        working_set = policy.live_tensors * request.sequence_length * embed_dim * dtype.itemsize
    return policy.choose_type(
        request.sequence_length,
        installed=usable,
        sharded=request.options.get("group") is not None,
        world_size=hardware.world_size,
        working_set=working_set,
        memory_total=hardware.memory_total,
        allow_sparse=request.allow_sparse,
    )


def _foresee_kernel(request: Request, device: torch.device, head_dim: int | None, offered: bool) -> tuple[str, str]:
    """The kernel's name as far as it can be known before a call, and why."""
    asked = request.options.get("kernel", "auto")
    if not offered:
        return "auto", "kernel: left to the type, which has no kernel option"
    if asked != "auto":
        return str(asked), f'kernel: "{asked}" was asked for'
    if head_dim is None:
        return "auto", "kernel: chosen at each call, from the device, dtype and head_dim of its tensors"
    dtype = request.options.get("dtype") or torch.get_default_dtype()
    name = kernels.choose("auto", device, dtype, head_dim).name
    why = f"kernel: {name}, for {dtype} with head_dim {head_dim} on {device}; chosen again at each call"
    if name == "math":
        refusals = [f"{one}: {no}" for one, no in kernels.survey(device, dtype, head_dim).items() if no]
        why += f" (the fallback; {'; '.join(refusals)})"
    elif request.options.get("dropout"):
        why += '; "math" while training, which alone drops attention weights'
    return name, why


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
