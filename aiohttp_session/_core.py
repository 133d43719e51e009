"""The one switch between the compiled hot path and its pure-Python reference.

``AIOHTTP_SESSION_NO_EXTENSIONS=1`` in the environment, an interpreter that is not CPython, or an
installation without the extensions gives the pure one. So do extensions that can't be loaded, with
a warning: whoever built them wants to know.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from typing import TYPE_CHECKING

IMPLEMENTATION = "python"
"""Which implementation is in use: ``"cython"`` or ``"python"``."""

if sys.implementation.name == "cpython" and not os.environ.get("AIOHTTP_SESSION_NO_EXTENSIONS"):
    try:
        from . import _cookies_c, _payload_c, _replies_c, _sealing_c, _session_c  # noqa: F401

        IMPLEMENTATION = "cython"
    except ImportError as error:
        twins = ("_cookies_c", "_payload_c", "_replies_c", "_sealing_c", "_session_c")
        names = (f"{__package__}.{name}" for name in twins)
        if any(map(importlib.util.find_spec, names)):
            warnings.warn(
                f"aiohttp-session runs in pure Python, since its extensions can't be used: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

if TYPE_CHECKING or IMPLEMENTATION == "python":
    from ._cookies_py import find_cookie, quote
    from ._payload_py import decode, dumps, encode
    from ._replies_py import read_replies, read_values
    from ._sealing_py import (
        FernetKey,
        decode_base64,
        decode_standard,
        encode_base64,
        encode_standard,
        open_fernet,
        open_siv,
        read_fernet,
        seal_fernet,
        seal_siv,
    )
    from ._session_py import Session, fingerprint, restore
else:
    from ._cookies_c import find_cookie, quote
    from ._payload_c import decode, dumps, encode
    from ._replies_c import read_replies, read_values
    from ._sealing_c import (
        FernetKey,
        decode_base64,
        decode_standard,
        encode_base64,
        encode_standard,
        open_fernet,
        open_siv,
        read_fernet,
        seal_fernet,
        seal_siv,
    )
    from ._session_c import Session, fingerprint, restore

__all__ = (
    "IMPLEMENTATION",
    "FernetKey",
    "Session",
    "decode",
    "decode_base64",
    "decode_standard",
    "dumps",
    "encode",
    "encode_base64",
    "encode_standard",
    "find_cookie",
    "fingerprint",
    "open_fernet",
    "open_siv",
    "quote",
    "read_fernet",
    "read_replies",
    "read_values",
    "restore",
    "seal_fernet",
    "seal_siv",
)
