"""One call that picks, builds and explains a dilated attention; and the models made of them.

The names below are imported when first used, so ``import dilated_factory`` itself costs nothing and the command
line can answer without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dilated_factory.create import (
        DecidedModule,
        create_dilated_attention,
        create_multihead_dilated_attention,
    )
    from dilated_factory.decision import Decision
    from dilated_factory.hardware import Hardware
    from dilated_factory.interop.transformers import register_transformers
    from dilated_factory.models import (
        DilatedTransformerDecoderLayer,
        DilatedTransformerEncoderLayer,
        LongNet,
        LongNetLM,
    )
    from dilated_factory.policy import Policy
    from dilated_factory.profile import Profile
    from dilated_factory.registry import NotInstalledError
    from dilated_factory.reporting import Report, report
    from dilated_factory.resources import SharedResources, shared_resources
    from dilated_factory.tuning import tune

__all__ = [
    "DecidedModule",
    "Decision",
    "DilatedTransformerDecoderLayer",
    "DilatedTransformerEncoderLayer",
    "Hardware",
    "LongNet",
    "LongNetLM",
    "NotInstalledError",
    "Policy",
    "Profile",
    "Report",
    "SharedResources",
    "create_dilated_attention",
    "create_multihead_dilated_attention",
    "register_transformers",
    "report",
    "shared_resources",
    "tune",
]

_HOMES = {
    "DecidedModule": "create",
    "Decision": "decision",
    "DilatedTransformerDecoderLayer": "models",
    "DilatedTransformerEncoderLayer": "models",
    "Hardware": "hardware",
    "LongNet": "models",
    "LongNetLM": "models",
    "NotInstalledError": "registry",
    "Policy": "policy",
    "Profile": "profile",
    "Report": "reporting",
    "SharedResources": "resources",
    "create_dilated_attention": "create",
    "create_multihead_dilated_attention": "create",
    "register_transformers": "interop.transformers",
    "report": "reporting",
    "shared_resources": "resources",
    "tune": "tuning",
}


if not TYPE_CHECKING:  # checkers read the imports above, and so still see a misspelled name

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
