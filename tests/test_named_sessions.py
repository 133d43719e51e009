"""Several sessions in one application."""

from __future__ import annotations

from typing import Any, TypeAlias

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_session import get_session, new_session, setup
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memory_storage import MemoryStorage
from tests.conftest import Clock
from tests.contract import KEY

Client: TypeAlias = "TestClient[web.Request, web.Application]"


async def change(request: web.Request) -> web.Response:
    """Do to each session what the query says."""
    for name, value in request.query.items():
        session = await get_session(request, None if name == "user" else name)
        session["value"] = value
    return web.Response()


async def renew(request: web.Request) -> web.Response:
    await new_session(request, request.query["name"])
    return web.Response()


async def log_out(request: web.Request) -> web.Response:
    (await get_session(request, request.query["name"])).invalidate()
    return web.Response()


async def show(request: web.Request) -> web.Response:
    sessions = {name: dict(await get_session(request, name)) for name in (None, "admin")}
    return web.json_response({str(name): contents for name, contents in sessions.items()})


async def stream(request: web.Request) -> web.StreamResponse:
    await change(request)
    response = web.StreamResponse()
    await response.prepare(request)
    (await get_session(request, "admin"))["late"] = True
    return response


def make_app() -> web.Application:
    app = web.Application()
    for handler in (change, renew, log_out, show, stream):
        app.router.add_get(f"/{handler.__name__}", handler)
    return app


def set_up(app: web.Application) -> MemoryStorage:
    admin = MemoryStorage(cookie_name="ADMIN", max_age=100)
    setup(app, EncryptedCookieStorage(KEY))
    setup(app, admin, name="admin")
    return admin


async def contents(client: Client, path: str = "/show") -> Any:
    return await (await client.get(path)).json()


async def test_each_has_its_own_cookie_store_and_contents(aiohttp_client: AiohttpClient) -> None:
    app = make_app()
    admin = set_up(app)
    client = await aiohttp_client(app)
    assert set((await client.get("/change?user=1")).cookies) == {"AIOHTTP_SESSION"}
    assert len(admin) == 0
    assert set((await client.get("/change?admin=2")).cookies) == {"ADMIN"}
    assert len(admin) == 1
    assert await contents(client) == {"None": {"value": "1"}, "admin": {"value": "2"}}
    response = await client.get("/change?user=3&admin=4")
    assert set(response.cookies) == {"AIOHTTP_SESSION", "ADMIN"}
    assert await contents(client) == {"None": {"value": "3"}, "admin": {"value": "4"}}


async def test_one_ends_and_the_other_stays(aiohttp_client: AiohttpClient, clock: Clock) -> None:
    app = make_app()
    admin = set_up(app)
    client = await aiohttp_client(app)
    for path in ("/log_out?name=admin", "/renew?name=admin"):
        await client.get("/change?user=1&admin=2")
        assert set((await client.get(path)).cookies) == {"ADMIN"}
        assert len(admin) == 0
        assert await contents(client) == {"None": {"value": "1"}, "admin": {}}


async def test_each_has_a_max_age_of_its_own(aiohttp_client: AiohttpClient, clock: Clock) -> None:
    app = make_app()
    set_up(app)
    client = await aiohttp_client(app)
    await client.get("/change?user=1&admin=2")
    clock.now += 101
    assert await contents(client) == {"None": {"value": "1"}, "admin": {}}


async def test_a_stream_saves_all_of_them(aiohttp_client: AiohttpClient) -> None:
    app = make_app()
    set_up(app)
    client = await aiohttp_client(app)
    response = await client.get("/stream?user=1&admin=2")
    await response.read()
    assert len(response.headers.getall("Set-Cookie")) == 2
    assert await contents(client) == {
        "None": {"value": "1"},
        "admin": {"value": "2", "late": True},
    }


async def test_a_sub_application_has_those_of_its_parent(aiohttp_client: AiohttpClient) -> None:
    app = make_app()
    set_up(app)
    app.add_subapp("/inner/", make_app())
    client = await aiohttp_client(app)
    await client.get("/inner/change?user=1&admin=2")
    assert await contents(client) == {"None": {"value": "1"}, "admin": {"value": "2"}}


async def test_a_sub_application_may_add_one(aiohttp_client: AiohttpClient) -> None:
    app, inner = make_app(), make_app()
    setup(app, MemoryStorage())
    setup(inner, MemoryStorage(cookie_name="ADMIN"), name="admin")
    app.add_subapp("/inner/", inner)
    client = await aiohttp_client(app)
    await client.get("/inner/change?user=1&admin=2")
    shown = await contents(client, "/inner/show")
    assert shown == {"None": {"value": "1"}, "admin": {"value": "2"}}
    assert (await client.get("/change?admin=3")).status == 500


@pytest.mark.parametrize("page", ["change", "stream"])
async def test_a_sub_application_with_another_cookie_is_apart(
    aiohttp_client: AiohttpClient, page: str
) -> None:
    @web.middleware
    async def count(request: web.Request, handler: Any) -> Any:
        session = await get_session(request)
        session["visits"] = session.get("visits", 0) + 1
        response = await handler(request)
        assert (await get_session(request)) is session
        return response

    outer, inner = MemoryStorage(), MemoryStorage(cookie_name="INNER")
    app, subapp = make_app(), make_app()
    setup(app, outer)
    app.middlewares.append(count)
    setup(app, MemoryStorage(cookie_name="ADMIN"), name="admin")
    setup(subapp, inner)
    app.add_subapp("/inner/", subapp)
    client = await aiohttp_client(app)
    await client.get("/change")
    await (await client.get(f"/inner/{page}?user=1")).read()
    await (await client.get(f"/inner/{page}?user=2")).read()
    assert (await contents(client, "/inner/show"))["None"] == {"value": "2"}
    assert (await contents(client))["None"] == {"visits": 5}
    assert (len(outer), len(inner)) == (1, 1)


async def test_parent_and_child_with_one_cookie_share_the_session(
    aiohttp_client: AiohttpClient,
) -> None:
    app, inner = make_app(), make_app()
    setup(app, EncryptedCookieStorage(KEY))
    setup(inner, EncryptedCookieStorage(KEY))
    app.add_subapp("/inner/", inner)
    client = await aiohttp_client(app)
    response = await client.get("/inner/change?user=1")
    assert len(response.headers.getall("Set-Cookie")) == 1
    response = await client.get("/inner/log_out?name=admin")
    assert response.status == 500


@pytest.mark.parametrize("names", [(None, "admin"), ("admin", None), ("a", "b")])
@pytest.mark.parametrize("same_storage", [True, False])
def test_two_sessions_with_one_cookie_are_refused(
    names: tuple[str | None, str | None], same_storage: bool
) -> None:
    app = web.Application()
    storage = MemoryStorage()
    setup(app, storage, name=names[0])
    with pytest.raises(ValueError, match="can't share the cookie 'AIOHTTP_SESSION'"):
        setup(app, storage if same_storage else MemoryStorage(), name=names[1])
    assert len(app.middlewares) == 1


def test_one_session_set_up_twice_is_no_error() -> None:
    app = web.Application()
    setup(app, MemoryStorage())
    setup(app, MemoryStorage())


@pytest.mark.parametrize("get", [get_session, new_session])
async def test_a_name_that_was_not_set_up_is_an_error(
    aiohttp_client: AiohttpClient, get: Any
) -> None:
    raised: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        with pytest.raises(RuntimeError, match="Install aiohttp_session middleware") as error:
            await get(request, "other")
        raised.append(str(error.value))
        return web.Response()

    app = web.Application()
    setup(app, MemoryStorage())
    app.router.add_get("/", handler)
    client = await aiohttp_client(app)
    assert (await client.get("/")).status == 200
    assert raised
