"""Copies on other devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def canonical(device: torch.device | str) -> torch.device:
    return torch.device(device)


def moved(value: Any, device: torch.device) -> Any:
    return value.to(device)


def copied(value: Any, device: torch.device) -> tuple[Any, Callable[[], None] | None]:
    return moved(value, device), None
