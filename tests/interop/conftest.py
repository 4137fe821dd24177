"""Where the peers' sources are, by option or environment variable; and the largest deviations found, at the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCES = {
    "torchscale": "a checkout of github.com/microsoft/torchscale (PyPI's 0.3.0 has no dilated attention)",
    "gigapath": "a checkout of github.com/prov-gigapath/prov-gigapath",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for name, what in SOURCES.items():
        variable = f"{name.upper()}_SOURCE"
        parser.addoption(f"--{name}", default=os.environ.get(variable), metavar="PATH", help=f"{what} (or {variable})")


def checkout(config: pytest.Config, name: str) -> Path:
    path = config.getoption(f"--{name}")
    if not path:
        pytest.skip(f"needs --{name}=PATH, {SOURCES[name]}")
    return Path(path).resolve()


@pytest.fixture(scope="module")
def torchscale_checkout(request: pytest.FixtureRequest) -> Path:
    return checkout(request.config, "torchscale")


@pytest.fixture(scope="module")
def gigapath_checkout(request: pytest.FixtureRequest) -> Path:
    return checkout(request.config, "gigapath")


WORST: dict[str, float] = {}


@pytest.fixture
def within() -> Callable[[str, float, float], None]:
    """Asserts that a deviation is within its tolerance, and keeps the largest of its kind for the summary."""

    def check(kind: str, deviation: float, tolerance: float) -> None:
        WORST[kind] = max(deviation, WORST.get(kind, 0.0))
        assert deviation <= tolerance, kind

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WORST:
        terminalreporter.section("largest deviations, relative to the peer's largest magnitude")
    for kind, deviation in WORST.items():
        terminalreporter.write_line(f"{deviation:9.1e}  {kind}")
