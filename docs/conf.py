"""Settings of the documentation, which `make docs` builds."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from sphinx.application import Sphinx

from adapters.errors import __version__

project = "Fine-tuning DeepFloyd IF"
author = "the contributors"
project_copyright = ""
version = release = __version__

extensions = [
    "myst_nb",
    "generated",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "html_image"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/docs/test_notebooks.py executes them

autodoc_typehints = "none"  # the texts say what matters of them
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
napoleon_use_rtype = False

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False


def keep_attribute_texts(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Keep napoleon from taking the words before an attribute's first colon for its type.

    It looks for a colon in the first line alone, so that line ends after its first word.
    """
    if what in ("attribute", "property", "data") and lines and " " in lines[0]:
        first, rest = lines[0].split(" ", 1)
        lines[:1] = [first, rest]


def setup(app: Sphinx) -> None:
    """Connect the above to run before napoleon."""
    app.connect("autodoc-process-docstring", keep_attribute_texts, priority=100)
