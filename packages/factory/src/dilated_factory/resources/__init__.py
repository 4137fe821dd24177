"""What created modules share, and how they get it: memory pools, buffer managers and a pattern cache."""

from __future__ import annotations

from dilated_factory.resources.shared import SharedResources, shared_resources

__all__ = ["SharedResources", "shared_resources"]
