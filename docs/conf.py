"""Sphinx configuration; `nox -s docs` builds with every package of this repository installed."""

project = "Dilated attention"
author = "The dilated attention authors"
project_copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = project

napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
