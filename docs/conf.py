import sys
from pathlib import Path

import lbw_optax

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "lbw_optax"
author = "The lbw_optax developers"
release = version = lbw_optax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "law_constants",
]
exclude_patterns = ["_build", "_ext"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# A name in single backticks in a docstring is code.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Only the examples in docstrings: tests/test_docs.py runs the blocks of the pages.
doctest_test_doctest_blocks = "default"

html_theme = "sphinx_book_theme"
html_title = "lbw_optax"
html_copy_source = False


def setup(app):
    """Keeps napoleon from reading "Word: text" below a constant as its type."""
    kept = {}

    def keep(app, what, name, obj, options, lines):
        if what == "attribute":
            kept[name] = list(lines)

    def restore(app, what, name, obj, options, lines):
        if what == "attribute":
            lines[:] = kept.pop(name)

    app.connect("autodoc-process-docstring", keep, priority=400)
    app.connect("autodoc-process-docstring", restore, priority=600)
