"""Float32 matrix products in a given precision for the time of a call, by torch's own switch. Imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dilated_factory.hooks.lock import SWITCHING

# By the name of a switch: what it was before, and then each call under way with its precision, the latest last. Calls
# of several threads end in any order, and after the last one it is what it was before the first.
_IN_FORCE: dict[str, list[tuple[object, str]]] = {}


@dataclass
class PrecisionOfFloat32:
    """A pair of hooks: float32 matrix products in that precision during a call, torch's own switch restored after it.

    The switch is ``torch.backends.cuda.matmul.fp32_precision``, or on a CPU that of ``torch.backends.mkldnn.matmul``.
    It is the process's: other threads compute so too while the call runs. The backward pass runs outside of the call.
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
        with SWITCHING:
            in_force = _IN_FORCE.setdefault(name, [])
            if not in_force:
                in_force.append((None, switch.fp32_precision))
            in_force.append((call, self.precision))
            self.entered.append((name, call))
            switch.fp32_precision = self.precision

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook that is called however the call ends."""
        with SWITCHING:
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
