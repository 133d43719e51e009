"""Responses that send their headers before the handler ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from aiohttp import ClientError, web
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_session import (
    AbstractStorage,
    Session,
    SimpleCookieStorage,
    get_session,
    new_session,
    session_middleware,
    setup,
)
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from aiohttp_session.server_storage import ServerStorage
from tests.contract import KEY, NAME, spy
from tests.stores import MakeStorage, YieldingStorage, make_storage, stored
from tests.waiting import PATIENCE

__all__ = ("make_storage",)

Action = Callable[[Session], object]
Client: TypeAlias = "TestClient[web.Request, web.Application]"


def nothing(session: Session) -> None:
    pass


def put(**items: Any) -> Action:
    return lambda session: session.update(items)


class Stream:
    """An application with a page that streams, and one that tells what the session is."""

    def __init__(self, storage: AbstractStorage | None, kind: str = "stream") -> None:
        self.before: Action = nothing
        self.after: Callable[[web.Request], Awaitable[None]] | None = None
        self.app = web.Application()
        if storage is not None:
            setup(self.app, storage)
        self.app.router.add_get("/stream", getattr(self, f"_{kind}"))
        self.app.router.add_get("/show", self._show)
        self.app.router.add_get("/set", self._set)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        self.before(await get_session(request))
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        if self.after is not None:
            await self.after(request)
        await response.write_eof()
        return response

    async def _file(self, request: web.Request) -> web.StreamResponse:
        self.before(await get_session(request))
        return web.FileResponse(Path(__file__))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        self.before(await get_session(request))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        return response

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        self.before(await get_session(request))
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(message.data)
            (await get_session(request))["message"] = message.data
        return socket

    async def _show(self, request: web.Request) -> web.Response:
        return web.json_response(dict(await get_session(request)))

    async def _set(self, request: web.Request) -> web.Response:
        (await get_session(request)).update(request.query)
        return web.Response()


async def show(client: Client) -> Any:
    return await (await client.get("/show")).json()


async def shows(client: Client, expected: Any) -> bool:
    """Tell whether the session has these contents, now or once the handler has ended."""
    for _ in range(PATIENCE * 100):
        if await show(client) == expected:
            return True
        await asyncio.sleep(0.01)
    return False


async def is_deleted(storage: ServerStorage, identity: str) -> None:
    """Wait until the record of a session is deleted: the response ends before the save."""
    for _ in range(PATIENCE * 100):
        if await stored(storage, identity) is None:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the record is not deleted")


def cookie_of(client: Client) -> str | None:
    morsel = client.session.cookie_jar.filter_cookies(client.make_url("/")).get(NAME)
    return None if morsel is None else morsel.value


def later(action: Action) -> Callable[[web.Request], Awaitable[None]]:
    async def after(request: web.Request) -> None:
        action(await get_session(request))

    return after


COOKIE_STORAGES: dict[str, Callable[[], AbstractStorage]] = {
    "simple": SimpleCookieStorage,
    "fernet": lambda: EncryptedCookieStorage(KEY),
    "siv": lambda: EncryptedCookieStorage(KEY, cipher="aes-256-gcm-siv"),
    "nacl": lambda: NaClCookieStorage(KEY),
}


@pytest.mark.parametrize("kind", ["stream", "file", "events"])
@pytest.mark.parametrize("storage", [*COOKIE_STORAGES, "memory"])
async def test_a_change_before_the_headers_is_on_the_wire(
    storage: str, kind: str, aiohttp_client: AiohttpClient
) -> None:
    page = Stream(COOKIE_STORAGES.get(storage, YieldingStorage)(), kind)
    page.before = put(a=1)
    client = await aiohttp_client(page.app)
    response = await client.get("/stream")
    assert response.status == 200
    assert len(response.headers.getall("Set-Cookie")) == 1
    assert await show(client) == {"a": 1}
    page.before = nothing
    assert "Set-Cookie" not in (await client.get("/stream")).headers
    page.before = Session.invalidate
    assert (await client.get("/stream")).cookies[NAME]["max-age"] == "0" or storage == "simple"
    assert await show(client) == {}


@pytest.mark.parametrize("storage", [*COOKIE_STORAGES, "memory"])
async def test_a_web_socket_saves_with_its_handshake(
    storage: str, aiohttp_client: AiohttpClient
) -> None:
    page = Stream(COOKIE_STORAGES.get(storage, YieldingStorage)(), "socket")
    page.before = put(a=1)
    client = await aiohttp_client(page.app)
    async with client.ws_connect("/stream") as socket:
        # By the time of the first frame, another request has the session.
        assert await show(client) == {"a": 1}
        await socket.send_str("hello")
        await socket.receive_str()
    expected = {"a": 1, "message": "hello"} if storage == "memory" else {"a": 1}
    assert await shows(client, expected)


async def test_each_change_is_saved_once(
    make_storage: MakeStorage, aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage()
    page = Stream(storage)
    page.before, page.after = put(a=1), later(put(b=2))
    client = await aiohttp_client(page.app)
    calls = spy(monkeypatch, storage)
    await (await client.get("/stream")).read()
    assert calls == ["create", "swap"]
    assert await show(client) == {"a": 1, "b": 2}
    page.before, page.after = put(a=3), None
    calls.clear()
    await (await client.get("/stream")).read()
    assert calls == ["read", "swap"]
    page.before, page.after = nothing, later(lambda session: session.get("a"))
    calls.clear()
    await (await client.get("/stream")).read()
    assert calls == ["read"]


async def test_a_later_change_is_saved_under_the_id_that_the_client_has(
    make_storage: MakeStorage, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    page = Stream(make_storage())
    client = await aiohttp_client(page.app)
    await client.get("/set?a=1")
    before = cookie_of(client)
    page.after = later(put(b=2))
    response = await client.get("/stream")
    await response.read()
    assert "Set-Cookie" not in response.headers
    assert cookie_of(client) == before
    assert await show(client) == {"a": "1", "b": 2}
    assert not caplog.records


async def test_invalidating_later_deletes_the_record(
    make_storage: MakeStorage, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    storage = make_storage()
    page = Stream(storage)
    client = await aiohttp_client(page.app)
    await client.get("/set?a=1")
    page.after = later(Session.invalidate)
    await (await client.get("/stream")).read()
    await is_deleted(storage, str(cookie_of(client)))
    assert await show(client) == {}
    assert not caplog.records


async def test_a_new_session_later_deletes_the_old_record(
    make_storage: MakeStorage, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    async def renew(request: web.Request) -> None:
        (await new_session(request))["b"] = "secret"

    storage = make_storage()
    page = Stream(storage)
    client = await aiohttp_client(page.app)
    await client.get("/set?a=1")
    page.after = renew
    await (await client.get("/stream")).read()
    await is_deleted(storage, str(cookie_of(client)))
    assert await show(client) == {}
    assert [("secret" in r.getMessage(), r.levelno) for r in caplog.records] == [
        (False, logging.WARNING)
    ]


async def test_a_later_change_of_a_session_that_was_ended_is_dropped(
    make_storage: MakeStorage, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    async def end_elsewhere(request: web.Request) -> None:
        session = await get_session(request)
        await storage.store.delete(f"{NAME}_{session.identity}")
        session["b"] = 2

    storage = make_storage()
    page = Stream(storage)
    client = await aiohttp_client(page.app)
    await client.get("/set?a=1")
    page.after = end_elsewhere
    await (await client.get("/stream")).read()
    assert await show(client) == {}
    assert ["changes are dropped" in record.getMessage() for record in caplog.records] == [True]


async def test_an_id_that_should_change_later_stays_and_keeps_the_data(
    make_storage: MakeStorage, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    def log_in(session: Session) -> None:
        session["user"] = "ann"
        session.regenerate_id()

    page = Stream(make_storage())
    client = await aiohttp_client(page.app)
    await client.get("/set?a=1")
    before = cookie_of(client)
    page.after = later(log_in)
    await (await client.get("/stream")).read()
    assert cookie_of(client) == before
    assert await show(client) == {"a": "1", "user": "ann"}
    assert ["id was to change" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("storage", [*COOKIE_STORAGES, "memory"])
async def test_a_later_change_that_cannot_be_kept_is_logged(
    storage: str, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    page = Stream(COOKIE_STORAGES.get(storage, YieldingStorage)())
    client = await aiohttp_client(page.app)
    if storage != "memory":
        await client.get("/set?a=1")
    contents = await show(client)
    page.after = later(put(secret="word"))
    response = await client.get("/stream")
    assert await response.read() == b"begun"
    assert await show(client) == contents
    assert ["headers are sent" in record.getMessage() for record in caplog.records] == [True]
    assert "word" not in caplog.text


@pytest.mark.parametrize("error", [ValueError, ConnectionError])
async def test_an_error_in_mid_stream_keeps_what_was_saved_before(
    make_storage: MakeStorage, aiohttp_client: AiohttpClient, error: type[Exception]
) -> None:
    async def fail(request: web.Request) -> None:
        (await get_session(request))["b"] = 2
        raise error

    page = Stream(make_storage())
    page.before, page.after = put(a=1), fail
    client = await aiohttp_client(page.app)
    response = await client.get("/stream")
    await response.content.read(5)
    response.close()
    assert await show(client) == {"a": 1}


async def test_an_http_exception_in_mid_stream_saves_under_the_id_that_the_client_has(
    make_storage: MakeStorage, aiohttp_client: AiohttpClient
) -> None:
    begun = asyncio.Event()

    async def fail(request: web.Request) -> None:
        await begun.wait()
        session = await get_session(request)
        session["b"] = 2
        session.regenerate_id()
        raise web.HTTPBadRequest

    page = Stream(make_storage())
    page.before, page.after = put(a=1), fail
    client = await aiohttp_client(page.app)
    response = await client.get("/stream")
    begun.set()
    await response.content.read(5)
    response.close()
    assert await shows(client, {"a": 1, "b": 2})


async def test_what_changed_before_the_client_left_is_saved(
    make_storage: MakeStorage, aiohttp_client: AiohttpClient
) -> None:
    async def wait(request: web.Request) -> None:
        session = await get_session(request)
        session["b"] = 2
        while True:  # until aiohttp raises ConnectionResetError
            await asyncio.sleep(0.001)
            await request.writer.write(b".")

    page = Stream(make_storage())
    page.before, page.after = put(a=1), wait
    client = await aiohttp_client(page.app)
    response = await client.get("/stream")
    await response.content.read(5)
    response.close()
    assert await shows(client, {"a": 1, "b": 2})


async def test_what_changed_before_a_cancellation_is_saved(
    make_storage: MakeStorage, aiohttp_client: AiohttpClient
) -> None:
    tasks: list[asyncio.Task[Any]] = []

    async def wait(request: web.Request) -> None:
        (await get_session(request))["b"] = 2
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        await asyncio.Event().wait()

    page = Stream(make_storage())
    page.before, page.after = put(a=1), wait
    client = await aiohttp_client(page.app)
    response = await client.get("/stream")
    await response.content.read(5)
    tasks[0].cancel()
    await asyncio.wait(tasks)
    response.close()
    assert await show(client) == {"a": 1, "b": 2}


async def test_the_middleware_alone_saves_no_stream(aiohttp_client: AiohttpClient) -> None:
    page = Stream(None)
    page.app.middlewares.append(session_middleware(YieldingStorage()))
    page.before, page.after = put(a=1), later(put(b=2))
    client = await aiohttp_client(page.app)
    assert "Set-Cookie" not in (await client.get("/stream")).headers


async def test_a_web_response_that_was_prepared_is_an_error(
    aiohttp_client: AiohttpClient,
) -> None:
    raised: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        (await get_session(request))["a"] = 1
        response = web.Response()
        await response.prepare(request)
        return response

    @web.middleware
    async def note(request: web.Request, handler: Any) -> Any:
        try:
            return await handler(request)
        except RuntimeError as error:
            raised.append(str(error))
            raise

    app = web.Application(middlewares=[note])
    setup(app, YieldingStorage())
    app.router.add_get("/", handler)
    client = await aiohttp_client(app)
    with contextlib.suppress(ClientError):  # what the client sees is aiohttp's
        (await client.get("/")).close()
    assert raised == ["Cannot save session data into prepared response"]


async def test_somebody_who_saves_on_an_unprepared_stream_sets_one_cookie(
    make_storage: MakeStorage, aiohttp_client: AiohttpClient
) -> None:
    storage = make_storage()

    async def handler(request: web.Request) -> web.StreamResponse:
        session = await get_session(request)
        session["a"] = 1
        response = web.WebSocketResponse()
        response.set_cookie("other", "1")
        await storage.save_session(request, response, session)
        await response.prepare(request)
        await response.close()
        return response

    page = Stream(storage)
    page.app.router.add_get("/own", handler)
    client = await aiohttp_client(page.app)
    async with client.ws_connect("/own") as socket:
        lines = socket._response.headers.getall("Set-Cookie")
    assert [line.partition("=")[0] for line in lines] == ["other", NAME]
    assert await show(client) == {"a": 1}


async def test_a_save_that_fails_before_the_headers_sets_no_cookie(
    aiohttp_client: AiohttpClient,
) -> None:
    storage = YieldingStorage()
    page = Stream(storage)
    page.before = put(a=object())
    client = await aiohttp_client(page.app)
    with contextlib.suppress(ClientError):  # what the client sees is aiohttp's
        (await client.get("/stream")).close()
    assert cookie_of(client) is None
    assert len(storage.store) == 0


async def test_a_stream_of_a_sub_application(
    make_storage: MakeStorage, aiohttp_client: AiohttpClient
) -> None:
    storage = make_storage()
    page = Stream(storage)
    inner = Stream(None)
    inner.before, inner.after = put(a=1), later(put(b=2))
    page.app.add_subapp("/inner/", inner.app)
    client = await aiohttp_client(page.app)
    response = await client.get("/inner/stream")
    await response.read()
    assert len(response.headers.getall("Set-Cookie")) == 1
    assert await show(client) == {"a": 1, "b": 2}
