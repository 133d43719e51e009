"""How Sphinx builds the documentation; see ``make docs``."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

# The pure twins have the same docstrings, and signatures that can be read.
os.environ["AIOHTTP_SESSION_NO_EXTENSIONS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp_session

project = "aiohttp-session"
author = "the aiohttp-session developers"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx's name for it
version = release = aiohttp_session.__version__

extensions = ["sphinx.ext.autodoc"]
nitpicky = True
default_role = "py:obj"  # of the names in docstrings
# Everything of this package must be found. Others' names are not linked: the build is offline.
nitpick_ignore_regex = [("py:.*", r"(?!aiohttp_session\b).*|.*\.(_CookieParams|\w+Options)")]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "aiohttp-session"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


def setup(app: Any) -> None:
    """Let Sphinx read defaults that are functions, and find names of other modules."""
    app.connect("autodoc-process-signature", _name_functions)
    app.connect("missing-reference", _look_everywhere)


def _name_functions(*event: Any) -> tuple[str | None, str | None]:
    *_, signature, returns = event
    return re.sub(r"<function (\w+)>", r"\1", signature or "") or None, returns


def _look_everywhere(app: Any, env: Any, node: Any, text: Any) -> Any:
    if node.get("reftype") != "obj":
        return None
    node["refspecific"] = True
    target = node["reftarget"]
    return env.domains["py"].resolve_xref(
        env, node["refdoc"], app.builder, "obj", target, node, text
    )
