"""The README's examples run, and do what it says."""

from __future__ import annotations

import inspect
import logging
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_session import AbstractStorage, get_session, setup
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.lifecycle import LifecycleStorage
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.server_storage import ServerStorage
from tests.conftest import Clock

README = Path(__file__).parents[1] / "README.rst"
BLOCK = re.compile(r"^\.\. code-block:: python\n\n((?:(?:    .*)?\n)+)", re.MULTILINE)

Client: TypeAlias = "TestClient[Any, Any]"
MakeClient = Callable[..., Any]


@pytest.fixture(scope="module")
def example(implementation: str) -> dict[str, Any]:
    """Everything that the examples define, having run from top to bottom."""
    text = README.read_text("utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count(".. code-block:: python")
    names: dict[str, Any] = {"__name__": "readme"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        code = compile("\n" * line + textwrap.dedent(block[1]), str(README), "exec")
        exec(code, names)
        if "first_app" not in names:
            names["first_app"], names["first_key"] = names["app"], names["key"]
    return names


@pytest.fixture
def visit(aiohttp_client: AiohttpClient) -> MakeClient:
    """Serve handlers under their names, and one that shows the session."""

    async def make(storage: AbstractStorage, *handlers: Any) -> Client:
        app = web.Application()
        setup(app, storage)
        for handler in handlers:
            app.router.add_route("*", f"/{handler.__name__}", handler)
        app.router.add_get("/", show)
        return await aiohttp_client(app)

    return make


async def show(request: web.Request) -> web.Response:
    session = await get_session(request)
    return web.json_response({"items": dict(session), "identity": session.identity})


async def put(request: web.Request) -> web.Response:
    session = await get_session(request)
    session.update(request.query)
    return web.Response()


async def look(client: Client, path: str = "/") -> Any:
    async with client.get(path) as response:
        assert response.status == 200
        return await response.json()


async def test_the_first_example_counts_visits(
    aiohttp_client: AiohttpClient, example: dict[str, Any]
) -> None:
    client = await aiohttp_client(example["first_app"])
    for number in (1, 2, 3):
        async with client.get("/") as response:
            assert await response.text() == f"Visit number {number}"


@pytest.mark.parametrize(
    "kind", ["redis", "memcached", "nacl", "fast cookie", "simple", "anything else"]
)
async def test_storages_are_made(example: dict[str, Any], kind: str) -> None:
    storage = example["make_storage"](kind)
    assert isinstance(storage, AbstractStorage)
    assert isinstance(storage, RedisStorage) == (kind == "redis")


def test_every_option_is_in_the_table() -> None:
    storages = (
        AbstractStorage,
        LifecycleStorage,
        ServerStorage,
        EncryptedCookieStorage,
        MemoryStorage,
        RedisStorage,
    )
    options = {
        name
        for storage in storages
        for name, parameter in inspect.signature(storage).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name not in {"store", "redis_pool"}
    }
    text = README.read_text("utf-8")
    table = text[text.index("\nOptions\n") : text.index("\nLife and safety")]
    assert set(re.findall(r"^``(\w+)``  ", table, re.MULTILINE)) == options


async def test_log_in_renews_the_id(visit: MakeClient, example: dict[str, Any]) -> None:
    client = await visit(MemoryStorage(), put, example["log_in"])
    await client.get("/put?cart=tea")
    before = await look(client)
    await client.post("/log_in", data={"name": "Zoë"})
    after = await look(client)
    assert after["items"] == {"cart": "tea", "user": "Zoë"}
    assert after["identity"] != before["identity"]


@pytest.mark.parametrize(("name", "left"), [("log_out", {}), ("start_over", {"user": "guest"})])
async def test_log_out_deletes_the_record(
    visit: MakeClient, example: dict[str, Any], name: str, left: dict[str, str]
) -> None:
    storage = MemoryStorage()
    client = await visit(storage, put, example[name])
    await client.get("/put?user=Zoe")
    await client.get(f"/{name}")
    assert (await look(client))["items"] == left
    assert len(storage) == len(left)


async def test_own_max_age_is_remembered(
    visit: MakeClient, example: dict[str, Any], clock: Clock
) -> None:
    client = await visit(MemoryStorage(max_age=60), put, example["remember_me"])
    await client.get("/put?user=Zoe")
    await client.get("/remember_me")
    clock.now += 29 * 24 * 60 * 60
    assert (await look(client))["items"] == {"user": "Zoe"}


async def test_a_stream_is_saved(visit: MakeClient, example: dict[str, Any]) -> None:
    client = await visit(MemoryStorage(), example["stream"])
    await client.get("/stream")
    assert (await look(client))["items"] == {"downloads": 1, "finished": True}


async def test_a_stream_is_saved_in_a_cookie_as_far_as_it_can(
    visit: MakeClient, example: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    client = await visit(EncryptedCookieStorage(example["key"]), example["stream"])
    with caplog.at_level(logging.WARNING):
        await client.get("/stream")
    assert (await look(client))["items"] == {"downloads": 1}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_several_sessions(aiohttp_client: AiohttpClient, example: dict[str, Any]) -> None:
    client = await aiohttp_client(example["app"])
    async with client.get("/admin") as response:
        assert await response.text() == "Welcome, admin"
        assert list(response.cookies) == ["ADMIN"]
    async with client.get("/") as response:
        assert await response.text() == "Visit number 1"
        assert list(response.cookies) == ["AIOHTTP_SESSION"]


async def test_the_test_of_an_application_passes(
    aiohttp_client: AiohttpClient, example: dict[str, Any]
) -> None:
    await example["test_log_out"](aiohttp_client)


@pytest.mark.parametrize("name", ["SignedCookieStorage", "DictStore"])
async def test_a_storage_of_your_own(visit: MakeClient, example: dict[str, Any], name: str) -> None:
    if name == "DictStore":
        storage = ServerStorage(example[name]({}), max_age=60)
    else:
        storage = example[name](b"secret", max_age=60)
    client = await visit(storage, put, example["log_in"], example["log_out"])
    await client.get("/put?cart=tea")
    await client.post("/log_in", data={"name": "Zoë"})
    assert (await look(client))["items"] == {"cart": "tea", "user": "Zoë"}
    await client.get("/log_out")
    assert (await look(client))["items"] == {}


@pytest.mark.parametrize("cookie", ["", ".", "é.é", "e30=.\udc80", "\ud800.x", '"e30=.abc"'])
def test_a_signed_cookie_of_somebody_else(example: dict[str, Any], cookie: str) -> None:
    assert example["SignedCookieStorage"](b"secret").open(cookie) is None


async def test_an_id_from_a_header(visit: MakeClient, example: dict[str, Any]) -> None:
    client = await visit(example["BearerStorage"](), put)
    async with client.get("/put?user=Zoe") as response:
        token = response.headers["X-Session"]
        assert not response.cookies
    async with client.get("/", headers={"Authorization": f"Bearer {token}"}) as response:
        assert (await response.json())["items"] == {"user": "Zoe"}
    assert (await look(client))["items"] == {}
