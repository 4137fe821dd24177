"""Every drawing by its name, and how what they draw is compared with the pictures in docs."""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import style
from recorded import RECORDS, ROOT

PICTURES = Path("docs") / "how-it-works" / "pictures"
COMPUTED = (
    "three_steps",
    "branches",
    "merging",
    "backward",
    "ring_traffic",
    "ring_rows",
    "pool_life",
    "pool_streams",
    "layout_algebra",
    "layout_rectangles",
)
Draw = Callable[[Path], list[Path]]  # from the folder that stands for the repository to the pictures written


def drawings() -> dict[str, Draw]:
    """Every drawing by its name."""
    computed = {name: _computed(name) for name in COMPUTED}
    return computed | {record.name: record.draw for record in RECORDS}


def _computed(name: str) -> Draw:
    def draw(folder: Path) -> list[Path]:
        import matplotlib

        path = folder / PICTURES / f"{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # whatever the matplotlibrc of this machine's user says
            style.save(import_module(name).draw(), path)
        return [path]

    return draw


def differences(names: Sequence[str]) -> list[str]:
    """Draw into a temporary folder and say where docs has something else, a line each.

    With all names, also which pictures in docs nothing draws.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        known = drawings()
        drawn = {path.relative_to(folder) for name in names for path in known[name](Path(folder))}
        for place in sorted(drawn):
            kept, new = ROOT / place, Path(folder) / place
            if not kept.exists():
                found.append(f"{place}: not in docs; draw it")
            elif size(kept) != size(new):
                found.append(f"{place}: {size(kept)} in docs, {size(new)} when drawn again")
            elif maker(kept) == maker(new) != "" and kept.read_bytes() != new.read_bytes():
                found.append(f"{place}: not what is drawn now; draw it again")
        if set(names) == set(known):
            kept_places = {path.relative_to(ROOT) for path in _pictures()}
            found += [f"{place}: nothing draws it" for place in sorted(kept_places - drawn)]
    return found


def _pictures() -> list[Path]:
    """Every picture below docs, but for what Sphinx built."""
    paths = [path for kind in ("svg", "png") for path in (ROOT / "docs").rglob(f"*.{kind}")]
    return [path for path in paths if "_build" not in path.parts]


def size(path: Path) -> tuple[str, str]:
    """Width and height, as the file says."""
    if path.suffix == ".png":
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        return f"{width} px", f"{height} px"
    tag = re.search(r"<svg[^>]*>", path.read_text())
    sides = dict(re.findall(r' (width|height)="([^"]+)"', tag[0] if tag else ""))
    return sides["width"], sides["height"]


def maker(path: Path) -> str:
    """The version of matplotlib that drew an SVG; "" for other files, of which bytes are not compared."""
    match = re.search(r"Matplotlib v[\w.+]+", path.read_text()) if path.suffix == ".svg" else None
    return match[0] if match else ""
