"""What a request gets whose session's store can't be reached."""

from __future__ import annotations

import gc
import sys
from typing import Any
from weakref import ref

import pytest
from aiohttp import ClientPayloadError, web
from aiohttp.typedefs import Middleware
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_session import (
    SimpleCookieStorage,
    StoreUnavailableError,
    get_session,
    session_middleware,
    setup,
)
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.stores.outage import CircuitBreaker
from tests.contract import NAME, Handler
from tests.waiting import until

ERRORS = [ConnectionRefusedError("hidden"), TimeoutError("hidden"), StoreUnavailableError("hidden")]
COOKIES = {NAME: "0123456789abcdef"}

# What aiohttp answers to a TimeoutError; in Python 3.10 asyncio has one of its own.
TIMED_OUT = 504 if sys.version_info >= (3, 11) else 500


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


def fail(storage: MemoryStorage, verb: str, error: Exception) -> None:
    async def raise_it(*_: object) -> None:
        raise error

    setattr(storage.store, verb, raise_it)


async def load(request: web.Request) -> web.Response:
    session = await get_session(request)
    return web.json_response(dict(session))


async def change(request: web.Request) -> web.Response:
    (await get_session(request))["a"] = 1
    return web.Response()


async def change_and_redirect(request: web.Request) -> web.Response:
    await change(request)
    raise web.HTTPFound("/elsewhere")


async def change_and_stream(request: web.Request) -> web.StreamResponse:
    await change(request)
    response = web.StreamResponse()
    await response.prepare(request)
    return response


class View(web.View):
    async def get(self) -> web.Response:
        return await load(self.request)


def make_app(storage: MemoryStorage, handler: Any, *middlewares: Middleware) -> web.Application:
    app = web.Application(middlewares=middlewares)
    setup(app, storage)
    app.router.add_get("/", handler)
    return app


async def status(aiohttp_client: AiohttpClient, app: web.Application, path: str = "/") -> int:
    """Visit, and check that a 503 says when to come back, and sets no cookie."""
    client = await aiohttp_client(app, cookies=COOKIES)
    async with client.get(path, allow_redirects=False) as response:
        if response.status == 503:
            assert response.headers["Retry-After"] == "1"
            assert "Set-Cookie" not in response.headers
            assert await response.text() == "503: Service Unavailable"
        else:
            assert "Retry-After" not in response.headers
        return response.status


@web.middleware
async def idle(request: web.Request, handler: Handler) -> web.StreamResponse:
    return await handler(request)


def catching(kind: type[Exception], caught: list[Exception]) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except kind as error:
            caught.append(error)
            return web.Response(status=418)

    return middleware


@pytest.mark.parametrize("middlewares", [(), (idle,)], ids=["alone", "with another"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("verb", "handler"),
    [
        ("read", load),
        ("read", View),
        ("create", change),
        ("create", change_and_redirect),
        ("create", change_and_stream),
    ],
    ids=["load", "view", "save", "save of a redirect", "save of a stream"],
)
async def test_it_is_answered_503(
    verb: str,
    handler: Any,
    error: Exception,
    middlewares: tuple[Middleware, ...],
    storage: MemoryStorage,
    aiohttp_client: AiohttpClient,
) -> None:
    app = make_app(storage, handler, *middlewares)
    fail(storage, verb, error)
    assert await status(aiohttp_client, app) == 503


@pytest.mark.parametrize("middlewares", [(), (idle,)], ids=["alone", "with another"])
@pytest.mark.parametrize(("verb", "handler"), [("read", load), ("create", change)])
async def test_nothing_of_it_is_left_to_the_garbage_collector(
    verb: str,
    handler: Handler,
    middlewares: tuple[Middleware, ...],
    storage: MemoryStorage,
    aiohttp_client: AiohttpClient,
) -> None:
    # At thousands of them a second it would be busy with nothing else.
    class LateError(TimeoutError):
        def __init__(self) -> None:
            errors.append(ref(self))

    errors: list[ref[LateError]] = []

    async def time_out(*_: object) -> None:
        raise LateError

    app = make_app(storage, handler, *middlewares)
    setattr(storage.store, verb, time_out)
    client = await aiohttp_client(app, cookies=COOKIES)
    gc.disable()
    try:
        for _ in range(2):
            async with client.get("/") as response:
                assert response.status == 503
        await until(lambda: errors[0]() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("handler", [load, change])
async def test_a_store_that_fails_otherwise_is_an_error(
    handler: Handler, storage: MemoryStorage, aiohttp_client: AiohttpClient
) -> None:
    app = make_app(storage, handler)
    fail(storage, "read", ValueError())
    fail(storage, "create", ValueError())
    assert await status(aiohttp_client, app) == 500


@pytest.mark.parametrize(
    ("error", "expected"), [(TimeoutError(), TIMED_OUT), (ConnectionRefusedError(), 500)]
)
async def test_an_error_of_the_handlers_own_stays_what_it_is(
    error: Exception, expected: int, storage: MemoryStorage, aiohttp_client: AiohttpClient
) -> None:
    async def handler(request: web.Request) -> web.Response:
        await get_session(request)
        raise error

    assert await status(aiohttp_client, make_app(storage, handler)) == expected


async def test_an_error_that_has_no_room_for_a_mark_stays_what_it_is(
    storage: MemoryStorage, aiohttp_client: AiohttpClient
) -> None:
    class FullError(ConnectionError):
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    fail(storage, "read", FullError())
    assert await status(aiohttp_client, make_app(storage, load)) == 500


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_a_handler_may_catch_it(
    error: Exception, storage: MemoryStorage, aiohttp_client: AiohttpClient
) -> None:
    async def handler(request: web.Request) -> web.Response:
        with pytest.raises(type(error)) as info:
            await get_session(request)
        assert info.value is error
        return web.Response(status=418)

    fail(storage, "read", error)
    assert await status(aiohttp_client, make_app(storage, handler)) == 418


@pytest.mark.parametrize("is_inner", [False, True])
@pytest.mark.parametrize(("verb", "handler"), [("read", load), ("create", change)])
async def test_a_middleware_may_catch_it(
    verb: str,
    handler: Handler,
    is_inner: bool,
    storage: MemoryStorage,
    aiohttp_client: AiohttpClient,
) -> None:
    caught: list[Exception] = []
    app = make_app(storage, handler, *[] if is_inner else [catching(OSError, caught)])
    if is_inner:
        app.middlewares.append(catching(OSError, caught))
    error = TimeoutError()
    fail(storage, verb, error)
    # One that is inside of the session's own sees no save.
    assert await status(aiohttp_client, app) == (503 if is_inner and verb == "create" else 418)
    assert caught == ([] if is_inner and verb == "create" else [error])


async def test_a_middleware_put_around_later_gets_the_answer_and_the_error_in_it(
    storage: MemoryStorage, aiohttp_client: AiohttpClient
) -> None:
    caught: list[Exception] = []
    app = make_app(storage, load)
    app.middlewares.insert(0, catching(web.HTTPServiceUnavailable, caught))
    error = TimeoutError()
    fail(storage, "read", error)
    assert await status(aiohttp_client, app) == 418
    assert caught[0].__cause__ is error


@pytest.mark.parametrize("name", [None, "other"])
@pytest.mark.parametrize("middlewares", [(), (idle,)], ids=["alone", "with another"])
async def test_each_of_several_sessions(
    name: str | None,
    middlewares: tuple[Middleware, ...],
    storage: MemoryStorage,
    aiohttp_client: AiohttpClient,
) -> None:
    async def handler(request: web.Request) -> web.Response:
        await get_session(request, name)
        raise AssertionError

    other = MemoryStorage(cookie_name="OTHER")
    app = make_app(storage, handler, *middlewares)
    setup(app, other, name="other")
    assert len(app.middlewares) == 2 + 2 * len(middlewares)
    cookies = {**COOKIES, "OTHER": "0123456789abcdef"}
    fail(storage if name is None else other, "read", TimeoutError())
    client = await aiohttp_client(app, cookies=cookies)
    async with client.get("/") as response:
        assert response.status == 503


async def test_an_application_in_another_without_sessions(
    storage: MemoryStorage, aiohttp_client: AiohttpClient
) -> None:
    root = web.Application(middlewares=[idle])
    root.add_subapp("/inner/", make_app(storage, load, idle))
    fail(storage, "read", TimeoutError())
    assert await status(aiohttp_client, root, "/inner/") == 503


@pytest.mark.parametrize("shared", [True, False])
async def test_an_application_in_another_with_sessions(
    shared: bool, storage: MemoryStorage, aiohttp_client: AiohttpClient
) -> None:
    """The outer one's middlewares see the error itself."""
    caught: list[Exception] = []
    outer = storage if shared else MemoryStorage(cookie_name="OUTER")
    for catch in (True, False):
        root = web.Application(middlewares=[catching(TimeoutError, caught)] if catch else [])
        setup(root, outer)
        root.add_subapp("/inner/", make_app(storage, load, idle))
        fail(storage, "read", TimeoutError())
        assert await status(aiohttp_client, root, "/inner/") == (418 if catch else 503)
    assert len(caught) == 1


async def test_the_middleware_alone_answers_nothing(
    storage: MemoryStorage, aiohttp_client: AiohttpClient
) -> None:
    app = web.Application(middlewares=[session_middleware(storage)])
    app.router.add_get("/", load)
    fail(storage, "read", TimeoutError())
    assert await status(aiohttp_client, app) == TIMED_OUT


async def test_a_stream_that_has_begun_is_cut(
    storage: MemoryStorage, aiohttp_client: AiohttpClient
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first")
        await load(request)
        raise AssertionError

    client = await aiohttp_client(make_app(storage, handler), cookies=COOKIES)
    fail(storage, "read", TimeoutError())
    async with client.get("/") as response:
        assert response.status == 200
        assert await response.content.readexactly(5) == b"first"
        with pytest.raises(ClientPayloadError):
            await response.read()


async def test_a_request_that_leaves_its_session_alone_is_served(
    storage: MemoryStorage, aiohttp_client: AiohttpClient
) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response()

    fail(storage, "read", TimeoutError())
    assert await status(aiohttp_client, make_app(storage, handler)) == 200


async def test_nobody_loses_a_session_to_an_outage(
    storage: MemoryStorage, aiohttp_client: AiohttpClient
) -> None:
    store = storage.store
    await store.create(f"{NAME}_{COOKIES[NAME]}", b'{"created":1,"session":{"a":0}}', None)
    storage.store = breaker = CircuitBreaker(store)  # type: ignore[assignment]
    client = await aiohttp_client(make_app(storage, change), cookies=COOKIES)

    async def time_out(key: str) -> bytes | None:
        raise TimeoutError

    read = store.read
    store.read = time_out  # type: ignore[method-assign]
    for _ in range(3):
        async with client.get("/") as response:
            assert response.status == 503
            assert "Set-Cookie" not in response.headers
    assert breaker.is_down
    store.read = read  # type: ignore[method-assign]
    record = await store.read(f"{NAME}_{COOKIES[NAME]}")
    assert record == b'{"created":1,"session":{"a":0}}'


async def test_a_storage_in_the_cookie_has_nothing_to_wait_for(
    aiohttp_client: AiohttpClient,
) -> None:
    app = web.Application()
    setup(app, SimpleCookieStorage())
    app.router.add_get("/", change)
    assert await status(aiohttp_client, app) == 200
