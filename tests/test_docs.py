"""The examples of the documentation run, and do what it says."""

from __future__ import annotations

import ast
import asyncio
import functools
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

import aiohttp_session
from aiohttp_session import AbstractStorage, get_session, setup
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.lifecycle import LifecycleStorage
from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.server_storage import ServerOptions, ServerStorage
from tests.conftest import Clock
from tests.contract import KEY
from tests.test_private_doors import DOORS

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT).with_suffix("")): path
    for path in [ROOT / "README.rst", *sorted((ROOT / "docs").rglob("*.rst"))]
}
SOURCES = sorted(Path(aiohttp_session.__file__).parent.rglob("*.py"))
LINE = 88  # characters that fit in the width of a page
BLOCK = re.compile(r"^\.\. code-block:: python\n\n((?:(?:    .*)?\n)+)", re.MULTILINE)

Client: TypeAlias = "TestClient[Any, Any]"
MakeClient = Callable[..., Any]
Example = Callable[[str], Any]


@pytest.fixture(scope="module")
def page(implementation: str) -> Callable[[str], dict[str, Any]]:
    """Run the examples of a page from top to bottom; return all that they define."""

    @functools.cache
    def run(name: str) -> dict[str, Any]:
        path = PAGES[name]
        text = path.read_text("utf-8")
        blocks = list(BLOCK.finditer(text))
        assert len(blocks) == text.count(".. code-block:: python")
        names: dict[str, Any] = {"__name__": "docs"}
        for block in blocks:
            line = text.count("\n", 0, block.start(1))
            exec(compile("\n" * line + _code(block[1]), str(path), "exec"), names)
        return names

    return run


def _code(block: str) -> str:
    return textwrap.dedent(block)


@pytest.fixture
def example(page: Callable[[str], dict[str, Any]]) -> Example:
    """Return what an example defines: ``guides/login:log_in``."""

    def find(place: str) -> Any:
        name, _, defined = place.partition(":")
        return page(f"docs/{name}")[defined]

    return find


@pytest.mark.parametrize("name", PAGES)
def test_every_example_runs(page: Callable[[str], dict[str, Any]], name: str) -> None:
    page(name)


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


@pytest.mark.parametrize("name", ["README", "docs/index"])
async def test_the_first_example_counts_visits(aiohttp_client: AiohttpClient, name: str) -> None:
    names: dict[str, Any] = {"__name__": "docs"}
    exec(_code(BLOCK.findall(PAGES[name].read_text("utf-8"))[0]), names)
    client = await aiohttp_client(names["app"])
    for number in (1, 2, 3):
        async with client.get("/") as response:
            assert await response.text() == f"Visit number {number}"


@pytest.mark.parametrize("name", PAGES)
def test_code_fits_its_box(name: str) -> None:
    blocks = re.findall(r"::(?: python)?\n\n((?:(?:    .*)?\n)+)", PAGES[name].read_text("utf-8"))
    lines = [line for block in blocks for line in _code(block).split("\n")]
    assert [line for line in lines if len(line) > LINE] == []


def test_the_reference_has_every_public_name() -> None:
    text = PAGES["docs/reference/api"].read_text("utf-8")
    described = set(
        re.findall(r"^\.\. (?:auto\w+|py:\w+):: (?:[\w.]+\.)?(\w+)$", text, re.MULTILINE)
    )
    assert set(aiohttp_session.__all__) - described == {"_CookieParams"}
    imported = {
        name.strip()
        for path in PAGES.values()
        for names in re.findall(r"from aiohttp_session[\w.]* import (.*)", path.read_text("utf-8"))
        for name in names.split(",")
    }
    assert imported - described == set()


def test_the_reference_has_every_environment_variable() -> None:
    text = PAGES["docs/reference/messages"].read_text("utf-8")
    described = set(re.findall(r"^``(AIOHTTP_SESSION_\w+)``", text, re.MULTILINE))
    places = [ROOT / "Makefile", ROOT / "setup.py", *(ROOT / "tests").glob("*.py"), *SOURCES]
    used = {
        name
        for path in places
        for name in re.findall(r"\bAIOHTTP_SESSION_[A-Z_]+\b", path.read_text("utf-8"))
    }
    assert used == described


def test_the_reference_has_every_log_message() -> None:
    text = PAGES["docs/reference/messages"].read_text("utf-8").partition("\nLog messages\n")[2]
    rows: list[tuple[str, str]] = []
    for level, message in re.findall(
        r"^(error|warning|info|debug|) {2,8}(.{1,51})", text, re.MULTILINE
    ):
        if level:
            rows.append((level, message.strip()))
        elif message.strip():
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {message.strip()}")
    used = [entry for path in SOURCES for entry in _logged(path)]
    for level, message in used:
        assert [row for row in rows if row[0] == level and message.startswith(row[1])], message
    for level, message in rows:
        assert [entry for entry in used if entry[0] == level and entry[1].startswith(message)]


def _logged(path: Path) -> list[tuple[str, str]]:
    """Return the levels of a module's log messages, and what they begin with."""
    tree = ast.parse(path.read_text("utf-8"))
    constants = {
        ast.unparse(node.targets[0]): node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name, text = ast.unparse(node.func), node.args[0]
        level = name.removeprefix("log.")
        if name == "RateLimited":
            level = ast.unparse(node.args[0]).removeprefix("logging.").lower()
            text = constants.get(ast.unparse(node.args[1]).removeprefix("self."), node.args[1])
        elif name in {"log_once", "warn_once"}:
            level = "info" if name == "log_once" else "warning"
        elif name == "log.log" or not name.startswith("log."):
            continue
        if isinstance(text, ast.JoinedStr):
            text = text.values[0]
        assert isinstance(text, ast.Constant), ast.unparse(node)
        message = str(text.value).replace("store%s", "store")
        if message != "%s":  # said elsewhere
            found.append((level, message))
    return found


def test_the_page_on_private_doors_has_every_one() -> None:
    text = PAGES["docs/internals"].read_text("utf-8")
    names = {name.rpartition(".")[2] for doors in DOORS.values() for name in doors}
    assert {name for name in names if not re.search(rf"\b{name}``", text)} == set()


def test_every_option_is_described() -> None:
    storages = (
        *(AbstractStorage, LifecycleStorage, ServerStorage, EncryptedCookieStorage),
        *(NaClCookieStorage, MemoryStorage, RedisStorage, MemcachedStorage),
    )
    for storage in storages:
        described = "".join(cls.__doc__ or "" for cls in storage.__mro__)
        for name, parameter in inspect.signature(storage).parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD:
                assert f":param {name}:" in described, (storage, name)


async def test_log_in_renews_the_id(visit: MakeClient, example: Example) -> None:
    client = await visit(MemoryStorage(), put, example("guides/login:log_in"))
    await client.get("/put?cart=tea")
    before = await look(client)
    await client.post("/log_in", data={"name": "Zoë"})
    after = await look(client)
    assert after["items"] == {"cart": "tea", "user": "Zoë"}
    assert after["identity"] != before["identity"]


@pytest.mark.parametrize(("name", "left"), [("log_out", {}), ("start_over", {"user": "guest"})])
async def test_log_out_deletes_the_record(
    visit: MakeClient, example: Example, name: str, left: dict[str, str]
) -> None:
    storage = MemoryStorage()
    client = await visit(storage, put, example(f"guides/login:{name}"))
    await client.get("/put?user=Zoe")
    await client.get(f"/{name}")
    assert (await look(client))["items"] == left
    assert len(storage) == len(left)


async def test_own_max_age_is_remembered(visit: MakeClient, example: Example, clock: Clock) -> None:
    client = await visit(MemoryStorage(max_age=60), put, example("guides/expiry:remember_me"))
    await client.get("/put?user=Zoe")
    await client.get("/remember_me")
    clock.now += 29 * 24 * 60 * 60
    assert (await look(client))["items"] == {"user": "Zoe"}


async def test_a_stream_is_saved(visit: MakeClient, example: Example) -> None:
    client = await visit(MemoryStorage(), example("guides/streams:stream"))
    await client.get("/stream")
    assert (await look(client))["items"] == {"downloads": 1, "finished": True}


async def test_a_stream_is_saved_in_a_cookie_as_far_as_it_can(
    visit: MakeClient, example: Example, caplog: pytest.LogCaptureFixture
) -> None:
    client = await visit(EncryptedCookieStorage(KEY), example("guides/streams:stream"))
    with caplog.at_level(logging.WARNING):
        await client.get("/stream")
    assert (await look(client))["items"] == {"downloads": 1}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_what_concurrent_requests_choose_is_kept(visit: MakeClient, example: Example) -> None:
    loaded, chosen = asyncio.Event(), asyncio.Event()

    async def slowly(request: web.Request) -> Any:
        await get_session(request)
        loaded.set()
        await chosen.wait()
        return await example("guides/concurrency:choose_theme")(request)

    choose_language = example("guides/concurrency:choose_language")
    client = await visit(example("guides/concurrency:storage"), put, slowly, choose_language)
    await client.get("/put?user=Zoe")
    slow = asyncio.ensure_future(client.get("/slowly?to=dark"))
    await loaded.wait()
    await client.get("/choose_language?to=fr")
    chosen.set()
    await slow
    assert (await look(client))["items"] == {"user": "Zoe", "language": "fr", "theme": "dark"}


async def test_several_sessions(aiohttp_client: AiohttpClient, example: Example) -> None:
    client = await aiohttp_client(example("guides/several:app"))
    async with client.get("/admin") as response:
        assert await response.text() == "Welcome, admin"
        assert list(response.cookies) == ["ADMIN"]


async def test_the_test_of_an_application_passes(
    aiohttp_client: AiohttpClient, example: Example
) -> None:
    await example("guides/testing:test_log_out")(aiohttp_client)


async def test_the_test_of_expiry_passes(
    aiohttp_client: AiohttpClient, example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    await example("guides/testing:test_an_idle_session_expires")(aiohttp_client, monkeypatch)


async def test_the_devices_of_a_user(
    aiohttp_client: AiohttpClient, visit: MakeClient, example: Example
) -> None:
    names = ("log_in", "devices", "end_device", "change_password")
    handlers = [example(f"guides/users:{name}") for name in names]
    storage = example("guides/users:storage")
    phone = await visit(storage, *handlers)
    tablet = await visit(storage, *handlers)
    for client, agent in ((phone, "phone"), (tablet, "tablet")):
        await client.post("/log_in", data={"name": "Zoë"}, headers={"User-Agent": agent})
    devices = await look(phone, "/devices")
    assert {device["agent"] for device in devices} == {"phone", "tablet"}
    (handle,) = [device["handle"] for device in devices if device["agent"] == "tablet"]
    async with phone.post("/end_device", data={"handle": handle}) as response:
        assert response.status == 200
    assert (await look(tablet))["items"] == {}
    async with phone.post("/end_device", data={"handle": handle}) as response:
        assert response.status == 404
    await tablet.post("/log_in", data={"name": "Zoë"})
    async with phone.get("/change_password") as response:
        assert await response.text() == "Other devices logged out: 1"
    assert (await look(tablet))["items"] == {}
    assert (await look(phone))["items"] == {"agent": "phone"}


async def test_ending_sessions_in_cookies(
    aiohttp_client: AiohttpClient, example: Example, clock: Clock
) -> None:
    app = web.Application()
    setup(app, EncryptedCookieStorage(KEY))
    app.middlewares.append(example("guides/users:refuse_ended"))
    app.router.add_post("/log_in", example("guides/users:log_in_anywhere"))
    app.router.add_get("/", show)
    client = await aiohttp_client(app)
    clock.now += 1
    await client.post("/log_in", data={"name": "Zoë"})
    assert (await look(client))["items"] == {"since": clock.now}
    clock.now += 1
    example("guides/users:end_all")("Zoë")
    assert (await look(client))["items"] == {}
    clock.now += 1
    await client.post("/log_in", data={"name": "Zoë"})
    assert (await look(client))["items"] == {"since": clock.now}


_EVERY: ServerOptions = {
    "max_age": 60,
    "hash_ids": True,
    "on_conflict": "merge",
    "lifetime": 600,
    "touch_after": 9,
}


@pytest.mark.parametrize(
    ("name", "options"),
    [("SignedCookieStorage", {}), ("DictStore", {"max_age": 60}), ("DictStore", _EVERY)],
    ids=["SignedCookieStorage", "DictStore", "DictStore with every option"],
)
async def test_a_storage_of_your_own(
    visit: MakeClient, example: Example, name: str, options: ServerOptions
) -> None:
    if name == "DictStore":
        store = example(f"guides/stores:{name}")({})
        storage = ServerStorage(store, **options)
    else:
        storage = example(f"guides/stores:{name}")(b"secret", max_age=60)
    client = await visit(
        storage, put, example("guides/login:log_in"), example("guides/login:log_out")
    )
    await client.get("/put?cart=tea")
    await client.post("/log_in", data={"name": "Zoë"})
    assert (await look(client))["items"] == {"cart": "tea", "user": "Zoë"}
    await client.get("/log_out")
    assert (await look(client))["items"] == {}


@pytest.mark.parametrize("cookie", ["", ".", "é.é", "e30=.\udc80", "\ud800.x", '"e30=.abc"'])
def test_a_signed_cookie_of_somebody_else(example: Example, cookie: str) -> None:
    assert example("guides/stores:SignedCookieStorage")(b"secret").open(cookie) is None


async def test_an_id_from_a_header(visit: MakeClient, example: Example) -> None:
    client = await visit(example("guides/headers:BearerStorage")(), put)
    async with client.get("/put?user=Zoe") as response:
        token = response.headers["X-Session"]
        assert not response.cookies
    async with client.get("/", headers={"Authorization": f"Bearer {token}"}) as response:
        assert (await response.json())["items"] == {"user": "Zoe"}
    assert (await look(client))["items"] == {}


async def test_a_cookie_is_read_without_the_package(example: Example, clock: Clock) -> None:
    storage = EncryptedCookieStorage(KEY, cipher="aes-256-gcm-siv", cookie_name="sid")
    open_cookie = example("reference/formats:open_cookie")
    opened = open_cookie(KEY, "sid", storage.seal(b"payload"))
    assert opened == (int(clock.now), b"payload")


async def test_a_page_for_an_outage(aiohttp_client: AiohttpClient, example: Example) -> None:
    storage = example("production/outage:storage")
    app = example("production/outage:make_app")(storage)
    app.router.add_get("/", show)
    client = await aiohttp_client(app, cookies={storage.cookie_name: "0123456789abcdef"})
    assert (await look(client))["items"] == {}

    async def time_out(key: str) -> bytes | None:
        raise TimeoutError

    storage.store.store.read = time_out
    for _ in range(2):
        async with client.get("/") as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
            assert "try again" in await response.text()
    await storage.finish()
