"""Sessions in an aiohttp application."""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, TypeAlias

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from . import unavailable
from ._core import Session, log_what_is_missed, unsaved
from .lifecycle import LifecycleStorage
from .log import log
from .server_storage import ServerStorage
from .storage import AbstractStorage

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
_State: TypeAlias = MutableMapping[Any, Any]

SESSION_KEY = "aiohttp_session"
"""Where a request keeps its session."""
STORAGE_KEY = "aiohttp_session_storage"
"""Where a request keeps the storage of its session."""

# Other people's middleware reads these keys, so str they stay; aiohttp 3.14 advises otherwise.
warnings.filterwarnings("ignore", "It is recommended to use web", module=__name__)

_STARTED_KEY = "aiohttp_session_started"  # set when a streamed response has sent its headers

# aiohttp 3.14 warns of each str key when it is first set, by whomever: never of these.
_keys_warned_of: Any = getattr(web.BaseRequest, "_seen_str_keys", None)
if not isinstance(_keys_warned_of, set):
    _keys_warned_of = set()
_keys_warned_of.update((SESSION_KEY, STORAGE_KEY, _STARTED_KEY))


def _find_plain_request() -> type[web.Request] | None:
    """Return the class of the requests whose keys are in a dict ``_state``, if that is so."""
    if "_state" not in getattr(web.Request, "ATTRS", ()):
        return None
    request = object.__new__(web.Request)
    try:
        request._state = {}
        request[SESSION_KEY] = None
    except Exception:  # noqa: BLE001 - they are kept in another way
        return None
    return web.Request if request._state == {SESSION_KEY: None} else None


# Below aiohttp's interface, but by way of the request itself, as with any other, the keys of a
# session take 0.7 µs, a tenth of it.
_PlainRequest = _find_plain_request()
if _PlainRequest is None:
    log.info("This aiohttp keeps the keys of requests in a way that is not known: it is slower")

_NOT_SET_UP = (
    "Install aiohttp_session middleware in your aiohttp.web.Application: "
    "aiohttp_session.setup(app, storage)"
)

_late_saves: set[asyncio.Future[None]] = set()


def _keys(name: str | None) -> tuple[str, str]:
    if name is None:
        return SESSION_KEY, STORAGE_KEY
    return f"{SESSION_KEY}.{name}", f"{STORAGE_KEY}.{name}"


async def get_session(request: web.Request, name: str | None = None) -> Session:
    """Return the session of a request: the same object at each call.

    :param name: which session, if the application was set up with several.
    :raises RuntimeError: if the application has no such session.
    """
    session_key, storage_key = SESSION_KEY, STORAGE_KEY
    if name is not None:
        session_key, storage_key = _keys(name)
    state: _State = request._state if type(request) is _PlainRequest else request
    session: Session | None = state.get(session_key)
    if session is None:
        storage: AbstractStorage | None = state.get(storage_key)
        if storage is None:
            raise RuntimeError(_NOT_SET_UP)
        try:
            session = await storage.load_session(request)
        except Exception as error:
            unavailable.note(error)
            raise
        if not isinstance(session, Session):
            raise _not_a_session(session, storage)
        state[session_key] = session
    return session


async def new_session(request: web.Request, name: str | None = None) -> Session:
    """Give a request a new session, in place of the one it had.

    The record and the cookie of the earlier one are deleted when the response is sent.

    :param name: which session, if the application was set up with several.
    :raises RuntimeError: if the application has no such session.
    """
    session_key, storage_key = _keys(name)
    state: _State = request._state if type(request) is _PlainRequest else request
    storage: AbstractStorage | None = state.get(storage_key)
    if storage is None:
        raise RuntimeError(_NOT_SET_UP)
    session = await storage.new_session()
    if not isinstance(session, Session):
        raise _not_a_session(session, storage)
    if isinstance(storage, LifecycleStorage):
        storage._replace_session(request, session, state.get(session_key))
    state[session_key] = session
    return session


def _not_a_session(session: object, storage: object) -> RuntimeError:
    return RuntimeError(f"The storage {storage!r} must give a Session, not {session!r}")


def session_middleware(storage: AbstractStorage) -> Middleware:
    """Make a middleware that saves a session whenever a request has changed it.

    It can't save what a streamed response changes; `setup` can.

    :raises RuntimeError: if storage is not an `AbstractStorage`.
    """
    return _middleware(storage, None, None)


def setup(app: web.Application, storage: AbstractStorage, *, name: str | None = None) -> None:
    """Give an application sessions.

    A request that fails because its session's store can't be reached or does not answer is
    answered 503 with ``Retry-After`` (RFC 9110), unless a handler or middleware catches the error.

    :param name: for a second session beside the default one, with a storage and a cookie of its
        own; pass it to `get_session` and `new_session`.
    :raises RuntimeError: if storage is not an `AbstractStorage`.
    :raises ValueError: if another session of the application has the same cookie, or one of them
        could take the other's records for its own.
    """
    middleware = _middleware(storage, name, app)
    for other_name, other in installed(app):
        if other_name != name:
            _check_neighbours(other_name, other, name, storage)
    if app.middlewares and not unavailable.answers_in(app):
        app.middlewares.insert(0, unavailable.guard(app))  # outside of all others
    app.middlewares.append(middleware)
    session_key, storage_key = _keys(name)

    async def save_before_headers(request: web.Request, response: web.StreamResponse) -> None:
        # A web.Response was saved by the middleware, or is none of a handler's (error 500).
        if isinstance(response, web.Response) or request.get(storage_key) is not storage:
            return
        if (session := unsaved(request.get(session_key))) is not None:
            with unavailable.noted():
                await storage.save_session(request, response, session)
            if isinstance(session, Session):
                session._was_saved()
            _refresh_header(response, storage.cookie_name)
        request[_STARTED_KEY] = True

    async def finish(app: web.Application) -> None:
        loop = asyncio.get_running_loop()
        saves = [task for task in list(_late_saves) if task.get_loop() is loop]
        await asyncio.gather(*saves, return_exceptions=True)
        if isinstance(storage, ServerStorage):
            await storage.finish()

    app.on_response_prepare.append(save_before_headers)
    app.on_cleanup.insert(0, finish)  # before the application closes its client


def _check_neighbours(
    one_name: str | None, one: AbstractStorage, name: str | None, storage: AbstractStorage
) -> None:
    if one.cookie_name == storage.cookie_name:
        raise ValueError(
            f"The sessions {one_name!r} and {name!r} can't share the cookie "
            f"{storage.cookie_name!r}: give one of the storages another cookie_name"
        )
    if (
        isinstance(one, ServerStorage)
        and isinstance(storage, ServerStorage)
        and one._keys.overlaps(storage._keys)
    ):
        raise ValueError(
            f"Records of the cookie {storage.cookie_name!r} and of {one.cookie_name!r} could be "
            "taken for each other: give one of the storages another cookie_name, or the one with "
            "the shorter name hash_ids=True"
        )


def installed(app: web.Application) -> Iterator[tuple[str | None, AbstractStorage]]:
    """List the names and storages of an application's sessions, in the order of their set-up."""
    for middleware in app.middlewares:
        yield from getattr(middleware, "aiohttp_sessions", ())


def _refresh_header(response: web.StreamResponse, cookie_name: str) -> None:
    """Send a cookie that was set after aiohttp had made headers of the response's cookies."""
    cookie = response.cookies.get(cookie_name)
    if cookie is None:
        return
    lines = response.headers.popall(hdrs.SET_COOKIE, [])
    lines = [line for line in lines if not line.startswith(f"{cookie_name}=")]
    for line in (*lines, cookie.OutputString()):
        response.headers.add(hdrs.SET_COOKIE, line)


def _middleware(
    storage: AbstractStorage, name: str | None, app: web.Application | None
) -> Middleware:
    """Make a session's middleware.

    :param app: that it is set up in, if so.
    """
    if not isinstance(storage, AbstractStorage):
        raise RuntimeError(f"Expected AbstractStorage got {storage!r}")
    log_what_is_missed()
    session_key, storage_key = _keys(name)
    _keys_warned_of.update((session_key, storage_key))
    # The first of all middlewares need not have another around it for that.
    answering = None if app is None or app.middlewares else app
    streams = app is not None

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        state: _State = request._state if type(request) is _PlainRequest else request
        if storage_key in state and _differs(state[storage_key], storage):
            # Two applications, one inside the other, each with a session of its own.
            with _put_aside(request, session_key, storage_key):
                return await middleware(request, handler)
        state[storage_key] = storage
        changed = None
        try:
            try:
                response = await handler(request)
            except web.HTTPException as error:
                if (changed := unsaved(state.get(session_key))) is not None:
                    await _save(storage, changed, request, error, streams=streams)
                    changed = None
                raise
            if type(response) is not web.Response:  # most are just that
                _check_response(response)
            session = state.get(session_key)  # None if the handler did not ask for it
            if session is not None and (changed := unsaved(session)) is not None:
                await _save(storage, changed, request, response, streams=streams)
        except (Exception, asyncio.CancelledError) as error:
            if changed is not None:  # the handler was done: it is the save that failed
                unavailable.note(error)
            else:
                session = request.get(session_key)
                await _save_left(storage, session, request, error, streams=streams)
            unavailable.answer(error, request, answering)
            raise
        return response

    middleware.aiohttp_sessions = [(name, storage)]  # type: ignore[attr-defined]
    unavailable.mark(middleware, answers=answering is not None)
    return middleware


def _check_response(response: object) -> None:
    if not isinstance(response, web.StreamResponse):
        raise RuntimeError(f"Expect response, not {type(response)!r}")


def _differs(outer: AbstractStorage | None, storage: AbstractStorage) -> bool:
    return outer is not None and outer.cookie_name != storage.cookie_name


def _save(
    storage: AbstractStorage,
    session: Session,
    request: web.Request,
    response: web.StreamResponse,
    *,
    streams: bool,
) -> Awaitable[None]:
    if type(response) is not web.Response:
        plain = isinstance(response, web.Response)
        failed = isinstance(response, web.HTTPException)
        if streams and (failed or not plain) and _STARTED_KEY in request:
            return _save_late(storage, session)
        if not plain:
            return _nothing()
    if response.prepared:
        raise RuntimeError("Cannot save session data into prepared response")
    return storage.save_session(request, response, session)


async def _nothing() -> None:
    """Do nothing."""


async def _save_late(storage: AbstractStorage, session: object) -> None:
    """Save what changed after a response's headers had been sent."""
    if not (isinstance(session, Session) and session._needs_save()):
        return
    # The client of a stream leaves when it likes, and may have the handler cancelled.
    task = asyncio.ensure_future(storage._save_late(session))
    _late_saves.add(task)
    task.add_done_callback(_late_saves.discard)
    await asyncio.shield(task)
    session._was_saved()


@contextlib.contextmanager
def _put_aside(request: web.Request, *keys: str) -> Iterator[None]:
    """Keep what an outer application put into a request, while an inner one handles it."""
    outer = {key: request.pop(key) for key in keys if key in request}
    try:
        yield
    finally:
        for key in keys:
            request.pop(key, None)
        request.update(outer)


async def _save_left(
    storage: AbstractStorage,
    session: object,
    request: web.Request,
    error: BaseException,
    *,
    streams: bool,
) -> None:
    """Save the session of a stream that ended as most do: by its client's leaving."""
    if not streams or _STARTED_KEY not in request:
        return
    transport = request.transport
    gone = transport is None or transport.is_closing()
    if isinstance(error, asyncio.CancelledError) or (gone and isinstance(error, ConnectionError)):
        await _save_late(storage, session)
