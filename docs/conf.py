"""Sphinx configuration; `nox -s docs` builds with every package of this repository installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "site"))

project = "Dilated attention"
author = "The dilated attention authors"
project_copyright = author

extensions = [
    "mathml",  # site/mathml.py
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = project
html_static_path = ["site/static"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"

napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3


def one_name_each(app, what, name, obj, options, lines):
    """One line for each name of napoleon's ``:ivar a, b: words``, of which Sphinx takes ``a,`` for a type."""
    found = []
    for line in lines:
        names, mark, words = line.removeprefix(":ivar ").partition(": ")
        if line.startswith(":ivar ") and mark and ", " in names:
            found += [f":ivar {one}: {words}" for one in names.split(", ")]
        else:
            found.append(line)
    lines[:] = found


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", one_name_each, priority=600)
