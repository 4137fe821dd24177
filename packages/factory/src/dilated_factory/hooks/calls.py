"""How a module follows its calls: hooks that look at each one, and switch what goes by its length.

A call costs a comparison where nothing changes. Under torch.compile and export the hooks do nothing: there, pools and
caches step aside. Imports torch and dilated_core.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dilated_core import kernels
from dilated_factory.decision import Decision
from dilated_factory.hooks.layout import look_at_layout
from dilated_factory.hooks.lock import SWITCHING
from dilated_factory.policy import Policy
from dilated_factory.profile import Profile
from dilated_factory.resources.handles import PooledAllocator

logger = logging.getLogger("dilated_factory")


@dataclass
class Rules:
    """What of a module goes by the length of a call, and by which rules.

    Attributes:
        attention_type, enable, lightweight: as ``Policy.choose_pool`` takes them.
        policy: the thresholds.
        profile: whose kernels are taken; None where the kernel is the caller's or the type's own affair.
        allocator: what is switched; None where the pool's mode is settled.
        head_dim: of the module; None where the calls' tensors say it.
        sequence_length: what the caller expects.
    """

    attention_type: str
    policy: Policy
    enable: bool | None = None
    lightweight: bool | None = None
    profile: Profile | None = None
    allocator: PooledAllocator | None = None
    head_dim: int | None = None
    sequence_length: int | None = None

    def kernel(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, length: int, needs: kernels.Needs
    ) -> tuple[str, str]:
        """The kernel that the profile names for such a call, "auto" where it names none, and why."""
        profile = self.profile
        word = str(dtype).removeprefix("torch.")
        name = profile.kernel(word, length) if profile is not None and device.type == profile.device_type else None
        if name is None:
            return "auto", "kernel: chosen at each call, from the device, dtype and head_dim of its tensors"
        refusal = kernels.survey(device, dtype, head_dim, needs).get(name, "there is no such kernel")
        if refusal is not None:
            return "auto", f"kernel: chosen at each call; not {name}, the profile's for {word}: {refusal}"
        return name, f"kernel: {name}, the profile's for {word} at {length:,} tokens"


@dataclass
class FollowCalls:
    """Decide anew where a call is of another class than the one before.

    Classes are those of ``Policy.length_class``, and where a profile chooses kernels also its lengths, the dtype, the
    device and whether there is a mask, which not every kernel takes. What was decided for a class is kept, and logged
    once. Steps of generation, with a cache that has seen tokens, leave the decision as the prompt had it.

    A profile's kernel is on the module for the time of a call, and "auto" else, unless somebody has set one since: then
    that is what is used. Threads that call one module with different dtypes at once must not use a profile's kernels.
    """

    rules: Rules
    decisions: dict[tuple[Any, ...], Decision] = field(default_factory=dict)
    latest: tuple[Any, ...] | None = None
    lent: str | None = None

    def attach(self, module: nn.Module) -> None:
        """Register what is needed of both hooks."""
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        if self.rules.profile is not None:
            module.register_forward_hook(self.after, always_call=True)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook. Leaves arguments that are no tensors for the module to refuse."""
        if torch.compiler.is_compiling():
            return
        query = args[0] if args else kwargs.get("query")
        if not isinstance(query, Tensor) or query.ndim < 3:
            return
        cache = kwargs.get("cache")
        if cache is not None and max(getattr(cache, "lengths", ()), default=0):
            return
        of = self._class(module, query, args, kwargs)
        if of != self.latest:
            look_at_layout(query, None if cache is not None else self.rules.sequence_length)
            self._follow(module, query, of)
        if self.rules.profile is not None and of[-1] is None:
            self.lent = holder_of_kernel(module).kernel = self.decisions[of].kernel

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook that is called however the call ends."""
        if self.lent is not None and not torch.compiler.is_compiling():
            self.lent, holder_of_kernel(module).kernel = None, "auto"

    def _class(
        self, module: nn.Module, query: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """What a decision goes by; last, the kernel that somebody has set. Called at every call, so cheap."""
        rules, profile, length = self.rules, self.rules.profile, query.shape[1]
        if profile is None:
            return (rules.policy.length_class(length),)
        kernel = holder_of_kernel(module).kernel
        device = query.device
        dtype = query.dtype
        here = device.type == profile.device_type  # elsewhere no kernel is taken, nor is every device known
        if here and torch.is_autocast_enabled(device.type) and dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
        passed = sum(rule.from_length <= length for rule in profile.kernels)
        masked = kwargs.get("key_padding_mask") is not None or (len(args) > 3 and isinstance(args[3], Tensor))
        theirs = None if kernel in ("auto", self.lent) else kernel
        return rules.policy.length_class(length), passed, dtype, device, masked, theirs

    def _follow(self, module: nn.Module, query: Tensor, of: tuple[Any, ...]) -> None:
        decided = cast("Decision", module.decision)
        decision = self.decisions.get(of)
        if decision is None:
            decision = self._decide(decided, query, of)
            self.decisions[of] = decision
            if decision.summary() != decided.summary():
                logger.info("at %s tokens: %s", f"{query.shape[1]:,}", decision.summary())
                logger.debug("%s", decision)
        with SWITCHING:
            if self.rules.allocator is not None:
                self.rules.allocator.mode = decision.pool_mode
            module.decision = decision  # type: ignore[assignment]  # any object is an attribute
            self.latest = of

    def _decide(self, decided: Decision, query: Tensor, of: tuple[Any, ...]) -> Decision:
        rules, length = self.rules, query.shape[1]
        pool_mode, kernel = decided.pool_mode, decided.kernel
        anew: dict[str, str] = {}
        if rules.allocator is not None:
            pool_mode, why = rules.policy.choose_pool(
                rules.attention_type, length, enable=rules.enable, lightweight=rules.lightweight
            )
            anew["pool"] = f"pool: {pool_mode}, {why}"
        if rules.profile is not None:
            _, _, dtype, device, masked, theirs = of
            head_dim = query.shape[-1] if rules.head_dim is None else rules.head_dim
            if theirs is not None:
                kernel, anew["kernel"] = theirs, f'kernel: "{theirs}" was set on the module'
            else:
                kernel, anew["kernel"] = rules.kernel(device, dtype, head_dim, length, kernels.Needs(mask=masked))
        reasons = tuple(anew.get(reason.partition(":")[0], reason) for reason in decided.reasons)
        return replace(decided, pool_mode=pool_mode, kernel=kernel, reasons=reasons, sequence_length=length)


def holder_of_kernel(module: nn.Module) -> Any:
    """The module whose ``kernel`` is the choice: an attention, or the one inside a multi-head one; None for neither."""
    for one in (module, getattr(module, "attention", None)):
        if isinstance(getattr(one, "kernel", None), str):
            return one
    return None
