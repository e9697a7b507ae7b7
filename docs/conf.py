"""Settings of the documentation, which `make docs` builds."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

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

myst_enable_extensions = ["colon_fence", "deflist"]
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
