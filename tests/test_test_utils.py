"""The helpers for tests of applications, used as an application's tests would."""

from __future__ import annotations

from typing import Any, TypeAlias

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, make_mocked_request
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_session import (
    AbstractStorage,
    Session,
    SimpleCookieStorage,
    get_session,
    session_middleware,
    setup,
)
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from aiohttp_session.test_utils import find_storage, read_session, session_cookies, set_session
from tests.contract import KEY
from tests.stores import MakeStorage, make_storage

__all__ = ("make_storage",)

Client: TypeAlias = "TestClient[web.Request, web.Application]"
DATA = {"user": "ann", "cart": ["tea", {"n": 2}], 'ä;",\\ ': "ö"}


class TheirStorage(AbstractStorage):
    """A storage as somebody else writes one."""

    def __init__(self) -> None:
        super().__init__(cookie_name="theirs")
        self.rows: dict[str, Any] = {}

    async def load_session(self, request: web.Request) -> Session:
        row = self.load_cookie(request)
        if row not in self.rows:
            return Session(None, data=None, new=True)
        return Session(row, data=self.rows[row], new=False)

    async def save_session(
        self, request: web.Request, response: web.StreamResponse, session: Session
    ) -> None:
        row = session.identity or str(len(self.rows))
        self.rows[row] = self._get_session_data(session)
        self.save_cookie(response, "" if session.empty else row)


STORAGES: dict[str, Any] = {
    "simple": SimpleCookieStorage,
    "fernet": lambda: EncryptedCookieStorage(KEY),
    "siv": lambda: EncryptedCookieStorage(
        KEY, cipher="aes-256-gcm-siv", cookie_name="__Host-s", secure=True
    ),
    "nacl": lambda: NaClCookieStorage(KEY, path="/shop"),
    "memory": lambda: MemoryStorage(domain="example.com", hash_ids=True),
    "theirs": TheirStorage,
}


@pytest.fixture(params=[*STORAGES])
def storage(request: pytest.FixtureRequest) -> AbstractStorage:
    made: AbstractStorage = STORAGES[request.param]()
    return made


def make_app(storage: AbstractStorage) -> web.Application:
    async def show(request: web.Request) -> web.Response:
        return web.json_response(dict(await get_session(request)))

    async def add(request: web.Request) -> web.Response:
        (await get_session(request))["added"] = True
        raise web.HTTPFound("/shop/show")

    async def log_out(request: web.Request) -> web.Response:
        (await get_session(request)).invalidate()
        return web.Response()

    app = web.Application()
    setup(app, storage)
    for handler in (show, add, log_out):
        app.router.add_get(f"/shop/{handler.__name__}", handler)
    return app


async def test_a_client_arrives_with_a_session(
    storage: AbstractStorage, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(storage))
    await set_session(client, DATA)
    assert await (await client.get("/shop/show")).json() == DATA
    assert await read_session(client.app, client) == DATA


async def test_a_request_arrives_with_a_session(
    storage: AbstractStorage, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(storage))
    cookies = await session_cookies(storage, DATA)
    assert set(cookies) == {storage.cookie_name}
    assert await (await client.get("/shop/show", cookies=cookies)).json() == DATA
    assert await read_session(storage, cookies) == DATA
    assert (await read_session(storage, client)).new


@pytest.mark.parametrize("redirects", [True, False])
async def test_what_a_response_left(
    storage: AbstractStorage, aiohttp_client: AiohttpClient, redirects: bool
) -> None:
    client = await aiohttp_client(make_app(storage))
    await set_session(client, {"user": "ann"})
    response = await client.get("/shop/show")
    assert await read_session(storage, response) == {"user": "ann"}
    if not (redirects and storage.cookie_params["secure"]):  # the redirect goes without it
        response = await client.get("/shop/add", allow_redirects=redirects)
        assert await read_session(client.app, response) == {"user": "ann", "added": True}
        assert await read_session(storage, client) == {"user": "ann", "added": True}


async def test_a_session_that_has_ended(
    storage: AbstractStorage, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(storage))
    await set_session(client, {"user": "ann"})
    response = await client.get("/shop/log_out")
    assert (await read_session(storage, response)).empty
    assert (await read_session(storage, client)).empty
    assert await (await client.get("/shop/show")).json() == {}


async def test_one_session_takes_the_place_of_another(
    storage: AbstractStorage, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(storage))
    await set_session(client, {"user": "ann"})
    await set_session(client, {"user": "bob"})
    assert await (await client.get("/shop/show")).json() == {"user": "bob"}
    assert await read_session(storage, client) == {"user": "bob"}


async def test_without_a_server(storage: AbstractStorage) -> None:
    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        session["seen"] = session["user"]
        return web.Response()

    cookies = await session_cookies(storage, {"user": "ann"})
    morsel = web.Response()
    morsel.set_cookie(storage.cookie_name, cookies[storage.cookie_name])
    header = f"{storage.cookie_name}={morsel.cookies[storage.cookie_name].coded_value}"
    request = make_mocked_request("GET", "/", headers={"Cookie": header})
    response = await session_middleware(storage)(request, handler)
    assert await read_session(storage, response) == {"user": "ann", "seen": "ann"}


async def test_server_stores(make_storage: MakeStorage, aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(make_app(make_storage(max_age=100)))
    await set_session(client, DATA, max_age=5000)
    session = await read_session(client.app, client)
    assert session == DATA
    assert (session.max_age, session.new) == (5000, False)


async def test_named_sessions(aiohttp_client: AiohttpClient) -> None:
    user, admin = MemoryStorage(), MemoryStorage(cookie_name="ADMIN")
    app = web.Application()
    setup(app, user)
    setup(app, admin, name="admin")
    client = await aiohttp_client(app)
    await set_session(client, {"a": 1})
    await set_session(client, {"b": 2}, name="admin")
    assert await read_session(app, client) == {"a": 1}
    assert await read_session(app, client, name="admin") == {"b": 2}
    assert set(await session_cookies(app, {"c": 3}, name="admin")) == {"ADMIN"}
    assert (find_storage(app), find_storage(app, "admin")) == (user, admin)
    with pytest.raises(LookupError, match="no session 'other'"):
        await read_session(app, client, name="other")
    with pytest.raises(LookupError, match=r"no session None: aiohttp_session\.setup"):
        await session_cookies(web.Application(), {})
