"""Sphinx builds these pages: Markdown by MyST, the API reference from docstrings, formulas as MathML, all offline.

make docs        every warning is an error; the pages land in build/docs
"""

from __future__ import annotations

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "lrmerge"
version = release = installed("lrmerge")
copyright = "the authors of lrmerge"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings", "formulas", "pages"]
exclude_patterns = ["extensions"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# Long unions of types are easier to read under the name that the code gives them.
autodoc_type_aliases = {"Delta": "Delta", "Space": "Space"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"lrmerge {release}"
html_static_path = ["_static"]
html_css_files = ["lrmerge.css"]
html_show_sphinx = False
html_copy_source = False
