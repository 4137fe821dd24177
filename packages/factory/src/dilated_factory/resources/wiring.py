"""How a module follows its calls: a hook that looks at each one, and switches what goes by its length.

The hook costs a comparison where nothing changes. Under torch.compile and export it is nothing: there, pools and caches
step aside. Imports torch and dilated_core.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dilated_core import kernels
from dilated_factory.decision import Decision
from dilated_factory.policy import Policy
from dilated_factory.profile import Profile
from dilated_factory.resources.handles import PooledAllocator

logger = logging.getLogger("dilated_factory")

# Held for a few assignments that belong together, by threads that call one module, or set one switch of the process.
_SWITCHING = threading.Lock()


def _forked() -> None:
    """A child of a fork does not have the thread that may hold the lock."""
    global _SWITCHING
    _SWITCHING = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

# More query heads than any model has.
MANY_HEADS = 256


@dataclass
class Rules:
    """What of a module goes by the length of a call, and by which rules.

    Attributes:
        attention_type, enable, lightweight: as `Policy.choose_pool` takes them.
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
    """A forward pre-hook: decides anew where a call is of another class than the one before.

    Classes are those of `Policy.length_class`, and where a profile chooses kernels also its lengths, the dtype, the
    device and whether there is a mask, which not every kernel takes. What was decided for a class is kept, and logged
    once. A kernel that was set on the module after it was created is left alone.
    """

    rules: Rules
    decisions: dict[tuple[Any, ...], Decision] = field(default_factory=dict)
    latest: tuple[Any, ...] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See nn.Module.register_forward_pre_hook. Leaves arguments that are no tensors for the module to refuse."""
        if torch.compiler.is_compiling():
            return
        query = args[0] if args else kwargs.get("query")
        if not isinstance(query, Tensor) or query.ndim < 3:
            return
        of = self._class(query, args, kwargs)
        if of != self.latest:
            # One step of generation has one token, whatever was expected.
            _look_at_layout(query, None if kwargs.get("cache") is not None else self.rules.sequence_length)
            self._follow(module, query, of)

    def _class(self, query: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What a decision goes by. Called at every call, so cheap."""
        rules, profile, length = self.rules, self.rules.profile, query.shape[1]
        if profile is None:
            return (rules.policy.length_class(length),)
        device = query.device
        dtype = query.dtype
        here = device.type == profile.device_type  # elsewhere no kernel is taken, nor is every device known
        if here and torch.is_autocast_enabled(device.type) and dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
        passed = sum(rule.from_length <= length for rule in profile.kernels)
        masked = kwargs.get("key_padding_mask") is not None or (len(args) > 3 and isinstance(args[3], Tensor))
        return rules.policy.length_class(length), passed, dtype, device, masked

    def _follow(self, module: nn.Module, query: Tensor, of: tuple[Any, ...]) -> None:
        with _SWITCHING:  # another thread sets the kernel and the decision together
            decided = cast("Decision", module.decision)
            kernel = "auto" if self.rules.profile is None else holder_of_kernel(module).kernel
            if self._is_callers(kernel, decided):
                # Their word is final: from now on only the pool goes by the calls.
                decided = _with_kernel_of_the_callers(decided, kernel)
                self.rules.profile, of = None, of[:1]
        decision = self.decisions.get(of)
        if decision is None:
            decision = self._decide(decided, query, of)
            self.decisions[of] = decision
            if decision.summary() != decided.summary():
                logger.info("at %s tokens: %s", f"{query.shape[1]:,}", decision.summary())
                logger.debug("%s", decision)
        with _SWITCHING:
            if self.rules.allocator is not None:
                self.rules.allocator.mode = decision.pool_mode
            if self.rules.profile is not None:
                holder_of_kernel(module).kernel = decision.kernel
            module.decision = decision  # type: ignore[assignment]  # any object is an attribute
            self.latest = of

    def _is_callers(self, kernel: str, decided: Decision) -> bool:
        """Whether somebody set it since: until the first call it is "auto", and then what was decided."""
        return kernel != "auto" and (self.latest is None or kernel != decided.kernel)

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
            _, _, dtype, device, masked = of
            head_dim = query.shape[-1] if rules.head_dim is None else rules.head_dim
            kernel, anew["kernel"] = rules.kernel(device, dtype, head_dim, length, kernels.Needs(mask=masked))
        reasons = tuple(anew.get(reason.partition(":")[0], reason) for reason in decided.reasons)
        return replace(decided, pool_mode=pool_mode, kernel=kernel, reasons=reasons, sequence_length=length)


def _with_kernel_of_the_callers(decision: Decision, kernel: str) -> Decision:
    """The decision with a kernel that was set on the module since."""
    why = f'kernel: "{kernel}" was set on the module'
    reasons = tuple(why if reason.startswith("kernel:") else reason for reason in decision.reasons)
    return replace(decision, kernel=kernel, reasons=reasons)


def _look_at_layout(query: Tensor, expected: int | None) -> None:
    """Warn where the sequence seems to be in the place of the heads, or of the batch."""
    batch, length = query.shape[:2]
    if query.ndim == 4:
        heads = query.shape[2]
        if (heads == expected and length != expected) or (heads > MANY_HEADS and heads > length):
            warnings.warn(
                f"query: expected (batch, seq, heads, head_dim), got {tuple(query.shape)}, which is {heads:,} heads of "
                f"{length:,} tokens; if it is (batch, heads, seq, head_dim), write query.transpose(1, 2), and key and "
                "value alike",
                stacklevel=6,
            )
    elif batch == expected and length != expected:
        warnings.warn(
            f"query: expected (batch, seq, embed_dim), got {tuple(query.shape)}, which is {batch:,} sequences of "
            f"{length:,} tokens, where sequence_length={expected} was given; if it is (seq, batch, embed_dim), write "
            "query.transpose(0, 1)",
            stacklevel=6,
        )


def holder_of_kernel(module: nn.Module) -> Any:
    """The module whose `kernel` is the choice: an attention, or the one inside a multi-head one; None for neither."""
    for one in (module, getattr(module, "attention", None)):
        if isinstance(getattr(one, "kernel", None), str):
            return one
    return None


# By the name of a switch: what it was before, and then each call under way with its precision, the latest last. Calls
# of several threads end in any order, and after the last one it is what it was before the first.
_IN_FORCE: dict[str, list[tuple[object, str]]] = {}


@dataclass
class PrecisionOfFloat32:
    """A pair of hooks: float32 matrix products in that precision during a call, torch's own switch restored after it.

    The switch is `torch.backends.cuda.matmul.fp32_precision`, or on a CPU that of `torch.backends.mkldnn.matmul`. It is
    the process's: other threads compute so too while the call runs. The backward pass runs outside of the call.
    """

    precision: str
    entered: list[tuple[str, object]] = field(default_factory=list)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "fp32_precision: a compiled graph cannot switch it; leave it out, and set "
                "torch.backends.cuda.matmul.fp32_precision around the compiled call"
            )
        query = args[0] if args else kwargs.get("query")
        name = "mkldnn" if isinstance(query, Tensor) and query.device.type == "cpu" else "cuda"
        switch, call = getattr(torch.backends, name).matmul, object()
        with _SWITCHING:
            in_force = _IN_FORCE.setdefault(name, [])
            if not in_force:
                in_force.append((None, switch.fp32_precision))
            in_force.append((call, self.precision))
            self.entered.append((name, call))
            switch.fp32_precision = self.precision

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook that is called however the call ends."""
        with _SWITCHING:
            if not self.entered:
                return
            name, call = self.entered.pop()
            in_force = [each for each in _IN_FORCE.pop(name) if each[0] is not call]
            getattr(torch.backends, name).matmul.fp32_precision = in_force[-1][1]
            if len(in_force) > 1:
                _IN_FORCE[name] = in_force

    def attach(self, module: nn.Module) -> None:
        """Register both."""
        module.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True)
        module.register_forward_hook(self.leave, always_call=True)
