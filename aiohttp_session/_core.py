"""The one switch between the compiled hot path and its pure-Python reference.

``AIOHTTP_SESSION_NO_EXTENSIONS=1`` in the environment, an interpreter that is not CPython, or an
installation without the extensions gives the pure one. So do extensions that can't be loaded, with
a warning: whoever built them wants to know.

What is compiled is what the reference implementations name in their ``__all__``, and nothing else.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import warnings

from . import (
    _cookies_py,
    _futures_py,
    _payload_py,
    _records_py,
    _replies_py,
    _sealing_py,
    _session_py,
)
from ._cookies_py import *  # noqa: F403
from ._futures_py import *  # noqa: F403
from ._payload_py import *  # noqa: F403
from ._records_py import *  # noqa: F403
from ._replies_py import *  # noqa: F403
from ._sealing_py import *  # noqa: F403
from ._session_py import *  # noqa: F403
from .log import log

IMPLEMENTATION = "python"
"""Which implementation is in use: ``"cython"`` or ``"python"``."""

TWINS = {
    "_cookies_c": _cookies_py,
    "_futures_c": _futures_py,
    "_payload_c": _payload_py,
    "_records_c": _records_py,
    "_replies_c": _replies_py,
    "_sealing_c": _sealing_py,
    "_session_c": _session_py,
}
"""The reference implementation of each extension."""

_is_missed = False

if sys.implementation.name == "cpython" and not os.environ.get("AIOHTTP_SESSION_NO_EXTENSIONS"):
    _names = {f"{__package__}.{name}": pure.__all__ for name, pure in TWINS.items()}
    try:
        for _name in _names:
            importlib.import_module(_name)
    except ImportError as error:
        _is_missed = not any(map(importlib.util.find_spec, _names))
        if not _is_missed:
            warnings.warn(
                f"aiohttp-session runs in pure Python, since its extensions can't be used: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
    else:
        IMPLEMENTATION = "cython"
        for _name, _exported in _names.items():
            globals().update({name: getattr(sys.modules[_name], name) for name in _exported})


@functools.cache
def log_what_is_missed() -> None:
    """Say, once, that there are no extensions though this interpreter could use them."""
    if _is_missed:
        log.info(
            "aiohttp-session runs in pure Python, which is slower: it was installed without its "
            "extensions (AIOHTTP_SESSION_REQUIRE_EXTENSIONS=1 pip install --no-cache-dir ...)"
        )
