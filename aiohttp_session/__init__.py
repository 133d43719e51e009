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
from .owasp import recommended
from .owners import SessionInfo
from .saving import ConflictError
from .sealed_storage import CookieStorage
from .server_storage import ServerStorage
from .simple_storage import SimpleCookieStorage
from .storage import AbstractStorage, SessionData, _CookieParams
from .stores import Store, StoreUnavailableError, UnsettledError

__version__ = "3.0.0"

__all__ = (
    "IMPLEMENTATION",
    "SESSION_KEY",
    "STORAGE_KEY",
    "AbstractStorage",
    "ConflictError",
    "CookieStorage",
    "Handler",
    "ServerStorage",
    "Session",
    "SessionData",
    "SessionInfo",
    "SimpleCookieStorage",
    "Store",
    "StoreUnavailableError",
    "UnsettledError",
    "_CookieParams",
    "get_session",
    "new_session",
    "recommended",
    "session_middleware",
    "setup",
)
