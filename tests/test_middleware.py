"""The middleware: when a session is loaded and saved, and what handlers can rely on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import ClientError, web
from aiohttp.test_utils import make_mocked_request
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_session import (
    SESSION_KEY,
    STORAGE_KEY,
    AbstractStorage,
    Session,
    SimpleCookieStorage,
    get_session,
    new_session,
    session_middleware,
    setup,
)
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.server_storage import ServerStorage
from aiohttp_session.stores.memory import MemoryStore
from tests.contract import NAME, Browser, Handler, make_request, spy


class OwnStorage(AbstractStorage):
    """A storage of somebody's own, that notes what it is asked for."""

    def __init__(self, session: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.session = Session("own", data=None, new=False) if session is None else session
        self.loads = 0
        self.saved: list[Any] = []

    async def new_session(self) -> Session:
        return self.session

    async def load_session(self, request: web.Request) -> Session:
        self.loads += 1
        return self.session

    async def save_session(
        self, request: web.Request, response: web.StreamResponse, session: Session
    ) -> None:
        self.saved.append(session)
        self.save_cookie(response, "saved")


def answer(act: Callable[[Session], object] = lambda session: None) -> Handler:
    """Make a handler that does this to its session."""

    async def handler(request: web.Request) -> web.Response:
        act(await get_session(request))
        return web.Response()

    return handler


def put(session: Session) -> None:
    session["a"] = 1


Install = Callable[[web.Application, AbstractStorage], None]


def by_middleware(app: web.Application, storage: AbstractStorage) -> None:
    app.middlewares.append(session_middleware(storage))


both_ways = pytest.mark.parametrize("install", [setup, by_middleware])


# Getting a session


@pytest.mark.parametrize("get", [get_session, new_session])
async def test_without_the_middleware_there_is_no_session(get: Any) -> None:
    with pytest.raises(RuntimeError, match="Install aiohttp_session middleware"):
        await get(make_mocked_request("GET", "/"))


async def test_a_handler_that_asks_for_no_session_loads_and_saves_none() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert SESSION_KEY not in request
        return web.Response()

    storage = OwnStorage()
    response = await Browser(storage).visit(handler)
    assert (storage.loads, storage.saved) == (0, [])
    assert not response.cookies


async def test_it_is_the_same_session_at_each_call() -> None:
    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        assert await get_session(request) is session
        assert request[SESSION_KEY] is session
        assert request[STORAGE_KEY] is storage
        return web.Response()

    storage = OwnStorage()
    await Browser(storage).visit(handler)
    assert storage.loads == 1


class OwnRequest(web.Request):
    """A request that sees to its keys itself, in capitals."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key.upper())

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key.upper(), value)


async def test_a_request_of_ones_own_class_keeps_the_session_its_own_way() -> None:
    request = make_request()
    request.__class__ = OwnRequest

    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        assert await get_session(request) is session is request[SESSION_KEY]
        assert {*request} == {SESSION_KEY.upper(), STORAGE_KEY.upper()}
        session["a"] = 1
        return web.Response()

    storage = OwnStorage()
    await session_middleware(storage)(request, handler)
    assert storage.saved == [storage.session]


@pytest.mark.parametrize(
    "held", [{}, {"a": 1}, "text", 0, False, Session(None, data=None, new=True)]
)
async def test_whatever_the_request_holds_is_the_session(held: Any) -> None:
    request = make_mocked_request("GET", "/")
    request["aiohttp_session"] = held
    assert await get_session(request) is held


async def test_none_is_no_session() -> None:
    request = make_mocked_request("GET", "/")
    request["aiohttp_session"] = None
    request["aiohttp_session_storage"] = storage = OwnStorage()
    assert await get_session(request) is storage.session


async def test_the_new_session_is_the_session_from_then_on() -> None:
    async def handler(request: web.Request) -> web.Response:
        old = await get_session(request)
        session = await new_session(request)
        assert session is not old
        assert session.new
        assert request[SESSION_KEY] is session
        assert await get_session(request) is session
        return web.Response()

    await Browser(SimpleCookieStorage()).visit(handler)


@pytest.mark.parametrize("get", [get_session, new_session])
@pytest.mark.parametrize("wrong", [{}, "text", 7, object])
async def test_a_storage_that_gives_no_session(get: Any, wrong: Any) -> None:
    async def handler(request: web.Request) -> web.Response:
        await get(request)
        raise AssertionError

    with pytest.raises(RuntimeError, match="Session"):
        await Browser(OwnStorage(wrong)).visit(handler)


@pytest.mark.parametrize("install", [setup, by_middleware])
@pytest.mark.parametrize("wrong", [None, object(), {}, SimpleCookieStorage])
def test_what_is_no_storage_is_refused(install: Any, wrong: Any) -> None:
    app = web.Application()
    with pytest.raises(RuntimeError, match="Expected AbstractStorage got"):
        install(app, wrong)
    assert not app.middlewares


@both_ways
def test_the_middleware_is_a_function_that_takes_attributes(install: Install) -> None:
    app = web.Application()
    install(app, SimpleCookieStorage())
    middleware: Any = app.middlewares[-1]
    assert type(middleware).__name__ == "function"
    middleware.note = "somebody's"
    assert middleware.note == "somebody's"
    assert middleware.__middleware_version__ == 1


# Saving it


async def test_a_session_that_was_only_read_is_not_saved() -> None:
    storage = OwnStorage(Session("own", data={"created": 1, "session": {"a": [1]}}, new=False))
    await Browser(storage).visit(answer(lambda session: session["a"][0]))
    assert storage.saved == []


@pytest.mark.parametrize(
    "change",
    [put, lambda s: s.changed(), lambda s: s.invalidate(), lambda s: s["nested"].append(1)],
)
async def test_a_changed_session_is_saved_once(change: Callable[[Session], object]) -> None:
    data = {"created": 1, "session": {"nested": []}}
    storage = OwnStorage(Session("own", data=data, new=False))
    response = await Browser(storage).visit(answer(change))
    assert storage.saved == [storage.session]
    assert response.cookies[NAME].value == "saved"


@pytest.mark.parametrize("get", [get_session, new_session])
async def test_new_session_works_with_a_storage_of_ones_own(get: Any) -> None:
    async def handler(request: web.Request) -> web.Response:
        put(await get(request))
        return web.Response()

    storage = OwnStorage()
    await Browser(storage).visit(handler)
    assert storage.saved == [{"a": 1}]


async def test_an_object_of_ones_own_in_place_of_the_session() -> None:
    class Own:
        _changed = False

    async def handler(request: web.Request) -> web.Response:
        request[SESSION_KEY] = held
        return web.Response()

    storage = OwnStorage()
    held: Any = {"a": "plain dict"}
    await Browser(storage).visit(handler)
    held = Own()
    await Browser(storage).visit(handler)
    assert storage.saved == []
    held._changed = True
    await Browser(storage).visit(handler)
    assert storage.saved == [held]


@pytest.mark.parametrize("error", [web.HTTPFound("/"), web.HTTPNotFound(), web.HTTPOk()])
async def test_a_raised_http_exception_goes_on_with_the_session_saved(
    error: web.HTTPException,
) -> None:
    async def handler(request: web.Request) -> web.Response:
        put(await get_session(request))
        raise error

    storage = OwnStorage()
    with pytest.raises(web.HTTPException) as caught:
        await Browser(storage).visit(handler)
    assert caught.value is error
    assert caught.value.cookies[NAME].value == "saved"
    assert storage.saved == [storage.session]


async def test_a_returned_http_exception_takes_the_session() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        put(await get_session(request))
        return web.HTTPFound("/")

    response = await Browser(OwnStorage()).visit(handler)
    assert response.cookies[NAME].value == "saved"


async def test_a_raised_http_exception_without_a_session_goes_on() -> None:
    async def handler(request: web.Request) -> web.Response:
        raise error

    error = web.HTTPFound("/")
    with pytest.raises(web.HTTPFound) as caught:
        await Browser(OwnStorage()).visit(handler)
    assert caught.value is error
    assert not error.cookies


@pytest.mark.parametrize("error", [LookupError("x"), asyncio.CancelledError(), ConnectionError()])
async def test_another_exception_saves_nothing(error: BaseException) -> None:
    async def handler(request: web.Request) -> web.Response:
        put(await get_session(request))
        raise error

    storage = OwnStorage()
    with pytest.raises(type(error)) as caught:
        await Browser(storage).visit(handler)
    assert caught.value is error
    assert storage.saved == []


@pytest.mark.parametrize("wrong", [None, "text", 7, web.Response])
async def test_a_handler_that_returns_no_response(wrong: Any) -> None:
    async def handler(request: web.Request) -> web.Response:
        put(await get_session(request))
        return wrong  # type: ignore[no-any-return]

    storage = OwnStorage()
    with pytest.raises(RuntimeError, match="Expect response, not"):
        await Browser(storage).visit(handler)
    assert storage.saved == []


@both_ways
async def test_a_prepared_response_cannot_take_a_changed_session(
    install: Install, aiohttp_client: AiohttpClient
) -> None:
    errors = []

    @web.middleware
    async def outer(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except RuntimeError as error:
            errors.append(str(error))
            raise

    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        response = web.Response(text="answered")
        await response.prepare(request)
        await response.write_eof()
        if "change" in request.query:
            put(session)
        return response

    storage = OwnStorage()
    app = web.Application(middlewares=[outer])
    install(app, storage)
    app.router.add_get("/", handler)
    client = await aiohttp_client(app)
    async with client.get("/") as response:
        assert await response.text() == "answered"
    assert errors == []
    async with client.get("/", params={"change": "1"}) as response:
        pass
    assert errors == ["Cannot save session data into prepared response"]
    assert storage.saved == []


async def test_the_middleware_alone_saves_no_stream_and_no_websocket(
    aiohttp_client: AiohttpClient,
) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        put(await get_session(request))
        response = web.StreamResponse()
        if "prepared" in request.query:
            await response.prepare(request)
        return response

    async def websocket(request: web.Request) -> web.WebSocketResponse:
        put(await get_session(request))
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.close()
        return socket

    storage = OwnStorage()
    app = web.Application(middlewares=[session_middleware(storage)])
    app.router.add_get("/stream", stream)
    app.router.add_get("/websocket", websocket)
    client = await aiohttp_client(app)
    for path in ("/stream", "/stream?prepared=1"):
        async with client.get(path) as response:
            assert "Set-Cookie" not in response.headers
    async with client.ws_connect("/websocket") as socket:
        await socket.receive()
    assert storage.saved == []


async def test_a_stream_takes_whatever_cookie_the_storage_sets(
    aiohttp_client: AiohttpClient,
) -> None:
    class Own:
        _changed = True

    class NoCookie(OwnStorage):
        def save_cookie(self, *args: Any, **options: Any) -> None:
            pass

    async def handler(request: web.Request) -> web.StreamResponse:
        request[SESSION_KEY] = Own()
        response = web.StreamResponse()
        await response.prepare(request)
        del request[SESSION_KEY]
        return response

    for storage, cookies in ((OwnStorage(), 1), (NoCookie(), 0)):
        app = web.Application()
        setup(app, storage)
        app.router.add_get("/", handler)
        client = await aiohttp_client(app)
        async with client.get("/") as response:
            assert len(response.headers.getall("Set-Cookie", [])) == cookies
        assert len(storage.saved) == 1


async def test_a_stream_that_its_client_leaves_saves_nothing_if_nothing_changed(
    aiohttp_client: AiohttpClient,
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await get_session(request)
        await web.StreamResponse().prepare(request)
        raise asyncio.CancelledError

    storage = OwnStorage()
    app = web.Application()
    setup(app, storage)
    app.router.add_get("/", handler)
    client = await aiohttp_client(app)
    async with client.get("/") as response:
        with pytest.raises(ClientError):
            await response.read()
    assert (storage.loads, storage.saved) == (1, [])


async def test_other_peoples_middleware_may_save_the_session_itself() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        put(await get_session(request))
        response = web.WebSocketResponse()
        session = request["aiohttp_session"]
        await request["aiohttp_session_storage"].save_session(request, response, session)
        return response

    browser = Browser(MemoryStorage())
    await browser.visit(handler)
    assert await browser.load() == {"a": 1}


# Over HTTP


@both_ways
async def test_a_visit_counter(install: Install, aiohttp_client: AiohttpClient) -> None:
    async def count(request: web.Request) -> web.Response:
        session = await get_session(request)
        session["visits"] = session.get("visits", 0) + 1
        if "redirect" in request.query:
            raise web.HTTPFound("/")
        return web.Response(text=str(session["visits"]))

    async def logout(request: web.Request) -> web.Response:
        (await get_session(request)).invalidate()
        return web.Response(status=204)

    app = web.Application()
    install(app, MemoryStorage(max_age=100))
    app.router.add_get("/", count)
    app.router.add_get("/logout", logout)
    client = await aiohttp_client(app)
    for path, visits in (("/", "1"), ("/", "2"), ("/?redirect=1", "4"), ("/", "5")):
        async with client.get(path) as response:
            assert await response.text() == visits
    async with client.get("/logout") as response:
        assert response.cookies[NAME]["max-age"] == "0"
    async with client.get("/") as response:
        assert await response.text() == "1"
    async with client.get("/nowhere") as response:
        assert response.status == 404
        assert "Set-Cookie" not in response.headers


# A store in trouble


class SlowStore(MemoryStore):
    """Waits at every verb until it is let go."""

    def __init__(self) -> None:
        super().__init__(max_records=10)
        self.asked = asyncio.Event()
        self.go = asyncio.Event()

    async def read(self, key: str) -> bytes | None:
        self.asked.set()
        await self.go.wait()
        return await super().read(key)

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        self.asked.set()
        await self.go.wait()
        await super().create(key, payload, ttl)


async def test_requests_wait_for_a_slow_store() -> None:
    store = SlowStore()
    browser = Browser(ServerStorage(store))
    visit = asyncio.create_task(browser.set(a=1))
    await store.asked.wait()
    assert not visit.done()
    store.go.set()
    await visit
    assert await browser.load() == {"a": 1}


async def test_a_request_cancelled_while_the_store_is_slow_leaves_no_trace() -> None:
    store = SlowStore()
    browser = Browser(ServerStorage(store))
    saving = asyncio.create_task(browser.set(a=1))
    await store.asked.wait()
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert browser.cookie is None
    store.go.set()
    await browser.set(a=2)
    store.go.clear()
    store.asked.clear()
    loading = asyncio.create_task(browser.set(a=3))
    await store.asked.wait()
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    store.go.set()
    assert await browser.load() == {"a": 2}


async def test_a_cancelled_handler_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(request: web.Request) -> web.Response:
        put(await get_session(request))
        await asyncio.Event().wait()
        raise AssertionError

    storage = MemoryStorage()
    calls = spy(monkeypatch, storage)
    task = asyncio.create_task(Browser(storage).visit(handler))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls == []


@both_ways
@pytest.mark.parametrize("verb", ["read", "swap"])
async def test_a_store_that_fails_is_an_error_without_a_cookie(
    verb: str, install: Install, aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*args: object) -> None:
        raise ConnectionError("the store is down")

    storage = MemoryStorage()
    app = web.Application()
    install(app, storage)
    app.router.add_get("/", answer(put))
    client = await aiohttp_client(app)
    async with client.get("/") as response:
        assert response.status == 200
    monkeypatch.setattr(storage.store, verb, refuse)
    async with client.get("/") as response:
        assert response.status == (503 if install is setup else 500)
        assert response.headers.get("Retry-After") == ("1" if install is setup else None)
        assert "Set-Cookie" not in response.headers
        assert "down" not in await response.text()
    monkeypatch.undo()
    async with client.get("/") as response:
        assert response.status == 200


async def test_a_storage_that_fails_while_an_http_exception_is_raised() -> None:
    class Failing(OwnStorage):
        async def save_session(self, *args: Any) -> None:
            raise OSError("disk full")

    async def handler(request: web.Request) -> web.Response:
        put(await get_session(request))
        raise web.HTTPFound("/")

    with pytest.raises(OSError, match="disk full"):
        await Browser(Failing()).visit(handler)


async def test_a_request_may_be_loaded_by_hand() -> None:
    storage = SimpleCookieStorage()
    session = await storage.load_session(make_request(f'{NAME}="{{\\"session\\":{{\\"a\\":1}}}}"'))
    assert session == {"a": 1}


SETS_THE_KEYS = """
import asyncio
import subprocess
import sys
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from aiohttp_session import SimpleCookieStorage, get_session, setup

async def handler(request):
    for name, suffix in ((None, ""), ("admin", ".admin")):
        request["aiohttp_session" + suffix] = await get_session(request, name)
        storage = request["aiohttp_session_storage" + suffix]
        request["aiohttp_session_storage" + suffix] = storage
    return web.Response()

async def visit(request):
    app = web.Application()
    setup(app, SimpleCookieStorage())
    setup(app, SimpleCookieStorage(cookie_name="ADMIN"), name="admin")
    outer, inner = app.middlewares
    await outer(request, lambda request: inner(request, handler))

asyncio.run(visit(make_mocked_request("GET", "/")))
print("no warning")
"""


def test_whoever_sets_the_keys_again_is_not_warned_of_them() -> None:
    command = [sys.executable, "-W", "error", "-c", SETS_THE_KEYS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "no warning\n", done.stderr
