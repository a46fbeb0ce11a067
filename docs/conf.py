"""Sphinx configuration. `make docs` builds the manual offline; warnings are errors."""

from __future__ import annotations

import hashlib
import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "_ext"), str(ROOT / "tests")]  # the tests have the data of one table

# Notebooks call `gpt2`, which is in the same directory as the interpreter. They run on CPU, so that a build does not
# look for accelerators and gives the same output everywhere.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes longer than running these small models.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["COLUMNS"] = "100"
# Notebooks set FORCE_COLOR. Without this, rich would print colors, and every update of a progress bar as a line.
os.environ["TTY_COMPATIBLE"] = "0"


def _sources_digest() -> str:
    """Return a digest of this project's packages, whose changes must execute the notebooks again."""
    digest = hashlib.sha256()
    for package in ("bridge", "gpt2_torch", "gpt2_jax"):
        for file in sorted((ROOT / package).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


project = "gpt2-bridge"
author = "the gpt2-bridge maintainers"
copyright = author
version = release = installed_version("gpt2-bridge")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings", "generated", "figures"]
exclude_patterns = ["_build", "_ext", "_generated"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

html_theme = "furo"
html_title = "gpt2-bridge"
html_copy_source = False
html_show_sourcelink = False
html_static_path: list[str] = []
html_extra_path = ["_generated/extra"]  # copied to the root of the manual; `figures` fills it after this file is read
(HERE / html_extra_path[0]).mkdir(parents=True, exist_ok=True)

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Tutorials are executed, each in an empty directory. The cache is keyed by the notebook's text; the directory's name
# adds the packages' text, so that a change to the code executes them again.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "executed" / _sources_digest())
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 900  # on a busy machine
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": True, "exclude-members": "__new__, __init__"}
autodoc_preserve_defaults = True
autodoc_mock_imports = ["lm_eval"]  # gpt2_jax.harness imports it
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # "Attributes:" describes fields that autodoc lists too
default_role = "code"
suppress_warnings = ["ref.python"]  # short names in signatures: both backends have a Decoder
