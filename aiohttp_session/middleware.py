"""Sessions in an aiohttp application."""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from aiohttp import web
from aiohttp.typedefs import Middleware

from ._core import Session
from .storage import AbstractStorage, LifecycleStorage, ServerStorage

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

SESSION_KEY = "aiohttp_session"
"""Where a request keeps its session."""
STORAGE_KEY = "aiohttp_session_storage"
"""Where a request keeps the storage of its session."""

# Other people's middleware reads these keys, so str they stay; aiohttp 3.14 advises otherwise.
if hasattr(web, "NotAppKeyWarning"):
    warnings.filterwarnings("ignore", category=web.NotAppKeyWarning, module=__name__)


def _keys(name: str | None) -> tuple[str, str]:
    if name is None:
        return SESSION_KEY, STORAGE_KEY
    return f"{SESSION_KEY}.{name}", f"{STORAGE_KEY}.{name}"


async def get_session(request: web.Request, name: str | None = None) -> Session:
    """Return the session of a request: the same object at each call.

    :param name: which session, if the application was set up with several.
    :raises RuntimeError: if the application was not set up with such a session.
    """
    session_key, storage_key = _keys(name)
    session = request.get(session_key)
    if session is None:
        storage = _storage(request, storage_key)
        session = _checked(await storage.load_session(request), storage)
        request[session_key] = session
    return session


async def new_session(request: web.Request, name: str | None = None) -> Session:
    """Give a request a new session, in place of the one that it had.

    The record and the cookie of the earlier one are deleted when the response is sent.

    :param name: which session, if the application was set up with several.
    :raises RuntimeError: if the application was not set up with such a session.
    """
    session_key, storage_key = _keys(name)
    storage = _storage(request, storage_key)
    session = _checked(await storage.new_session(), storage)
    if isinstance(storage, LifecycleStorage):
        storage._replace_session(request, session, request.get(session_key))
    request[session_key] = session
    return session


def _storage(request: web.Request, key: str) -> AbstractStorage:
    storage = request.get(key)
    if storage is None:
        raise RuntimeError(
            "Install aiohttp_session middleware in your aiohttp.web.Application: "
            "aiohttp_session.setup(app, storage)"
        )
    return storage  # type: ignore[no-any-return]


def _checked(session: object, storage: object) -> Session:
    if not isinstance(session, Session):
        raise RuntimeError(f"The storage {storage!r} must give a Session, not {session!r}")
    return session


def session_middleware(storage: AbstractStorage) -> Middleware:
    """Make a middleware that saves the session of each request that changed it.

    It can't save what a streamed response changes; `setup` can.

    :raises RuntimeError: if storage is not an `AbstractStorage`.
    """
    return _middleware(storage, None, streams=False)


def setup(app: web.Application, storage: AbstractStorage, *, name: str | None = None) -> None:
    """Give an application sessions.

    :param name: for a second session beside the default one, with a storage and a cookie of its
        own; pass it to `get_session` and `new_session`.
    :raises RuntimeError: if storage is not an `AbstractStorage`.
    """
    app.middlewares.append(_middleware(storage, name, streams=True))
    session_key, storage_key = _keys(name)

    async def save_before_headers(request: web.Request, response: web.StreamResponse) -> None:
        # A web.Response was saved by the middleware, or is none of a handler's (error 500).
        if isinstance(response, web.Response) or request.get(storage_key) is not storage:
            return
        session = request.get(session_key)
        if not (isinstance(session, Session) and session._needs_save()):
            return
        await storage.save_session(request, response, session)
        session._was_saved()
        # aiohttp has made headers of the cookies before it sends this signal.
        cookie = response.cookies.get(storage.cookie_name)
        if cookie is not None:
            response.headers.add("Set-Cookie", cookie.OutputString())

    app.on_response_prepare.append(save_before_headers)
    if isinstance(storage, ServerStorage):

        async def finish(app: web.Application) -> None:
            await storage.finish()

        app.on_cleanup.insert(0, finish)  # before the application closes its client


def _middleware(storage: AbstractStorage, name: str | None, *, streams: bool) -> Middleware:
    if not isinstance(storage, AbstractStorage):
        raise RuntimeError(f"Expected AbstractStorage got {storage!r}")
    session_key, storage_key = _keys(name)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[storage_key] = storage
        raised = None
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = raised = error
        if not isinstance(response, web.StreamResponse):
            raise RuntimeError(f"Expect response, not {type(response)!r}")
        session = request.get(session_key)
        if session is not None and _needs_save(session):
            if isinstance(response, web.Response):
                if response.prepared:
                    raise RuntimeError("Cannot save session data into prepared response")
                await storage.save_session(request, response, session)
            elif streams and response.prepared:
                await storage._save_late(session)
        if raised is not None:
            raise raised
        return response

    return middleware


def _needs_save(session: object) -> bool:
    if isinstance(session, Session):
        return session._needs_save()
    # Somebody's own object in place of a session, as get_session allows.
    return bool(getattr(session, "_changed", False))
