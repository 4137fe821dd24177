"""Where the peers' sources are, by option or environment variable; and the largest deviations found, at the end.

With ``--record=FOLDER``, a run in which nothing failed and nothing was left out writes them there, as interop.json and
interop.md.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dilated_core import measure

SOURCES = {
    "torchscale": "a checkout of github.com/microsoft/torchscale (PyPI's 0.3.0 has no dilated attention)",
    "gigapath": "a checkout of github.com/prov-gigapath/prov-gigapath",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for name, what in SOURCES.items():
        variable = f"{name.upper()}_SOURCE"
        parser.addoption(f"--{name}", default=os.environ.get(variable), metavar="PATH", help=f"{what} (or {variable})")
    parser.addoption(
        "--record", type=Path, metavar="FOLDER", help="write the largest deviations there, as JSON and page"
    )


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    if WORST:
        terminalreporter.section("largest deviations, relative to the peer's largest magnitude")
    for kind, deviation in WORST.items():
        terminalreporter.write_line(f"{deviation:9.1e}  {kind}")
    folder = config.getoption("--record")
    if folder is None:
        return
    if exitstatus or terminalreporter.stats.get("skipped") or terminalreporter.stats.get("deselected"):
        terminalreporter.write_line("not recorded: a test failed or was left out")
        return
    record(folder, {name: Path(config.getoption(f"--{name}")) for name in SOURCES})
    terminalreporter.write_line(f"recorded in {folder / 'interop.json'}")


def record(folder: Path, checkouts: dict[str, Path]) -> None:
    """Write what was found, of which versions, with what makes it again."""
    peers = {name: importlib.metadata.version(name) for name in ("torchscale", "dilated-attention-pytorch")}
    for name, path in checkouts.items():
        asked = ["git", "-C", str(path), "rev-parse", "HEAD"]
        peers[f"{name}, main branch"] = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    command = "nox -s interop -- --torchscale=TORCHSCALE --gigapath=PROV-GIGAPATH --record=docs/benchmarks"
    environment = {**measure.environment(), "command": command}
    found = {"environment": environment, "peers": peers, "deviations": WORST}
    page = [
        "# Ours beside the peers' own code",
        "",
        "{date}, Python {python}, torch {torch}, {processor}.".format(**environment),
        "",
        "Largest differences over all tests of a kind, relative to the peer's largest magnitude. The peers run their",
        "own code on the CPU, with flash-attn's function replaced by the same formula. Versions: "
        + "; ".join(f"{name} `{version}`" for name, version in peers.items())
        + ".",
        "",
        "| compared with | largest difference |",
        "|---|---|",
        *(f"| {kind} | {deviation:.1e} |" for kind, deviation in WORST.items()),
        "",
        f"Raw data: [interop.json](interop.json). Command, from the repository's root: `{command}`.",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "interop.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "interop.md").write_text("\n".join(page) + "\n")
