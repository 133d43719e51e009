"""User sessions for aiohttp.web."""

from ._core import IMPLEMENTATION, Session
from .middleware import (
    SESSION_KEY,
    STORAGE_KEY,
    Handler,
    get_session,
    new_session,
    session_middleware,
    setup,
)
from .simple_storage import SimpleCookieStorage
from .storage import AbstractStorage, ConflictError, SessionData, _CookieParams

__version__ = "2.13.0.dev0"

__all__ = (
    "IMPLEMENTATION",
    "SESSION_KEY",
    "STORAGE_KEY",
    "AbstractStorage",
    "ConflictError",
    "Handler",
    "Session",
    "SessionData",
    "SimpleCookieStorage",
    "_CookieParams",
    "get_session",
    "new_session",
    "session_middleware",
    "setup",
)
