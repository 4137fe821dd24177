"""What a created module does around its calls: follow their lengths, and hold torch's switch for float32."""

from __future__ import annotations

from dilated_factory.hooks.calls import FollowCalls, Rules
from dilated_factory.hooks.precision import PrecisionOfFloat32

__all__ = ["FollowCalls", "PrecisionOfFloat32", "Rules"]
