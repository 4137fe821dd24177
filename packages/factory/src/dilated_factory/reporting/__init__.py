"""What a model's attentions were decided to do, and what their pools and caches did: one call, read only."""

from __future__ import annotations

from dilated_factory.reporting.facts import ModuleReport, OwnReport, Report, ResourcesReport
from dilated_factory.reporting.gather import report

__all__ = ["ModuleReport", "OwnReport", "Report", "ResourcesReport", "report"]
