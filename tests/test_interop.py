"""The reference package and this one, side by side over HTTP, with one key and one server."""

from __future__ import annotations

import base64
import contextlib
import html
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import aiomcache
import pytest
from cryptography.fernet import Fernet
from nacl.secret import SecretBox
from redis.asyncio import Redis

import aiohttp_session
from benchmarks import reference
from benchmarks.servers import HOST, Server

KINDS = ("simple", "fernet", "nacl", "redis", "memcached")
SERVE = Path(__file__).parent / "interop" / "serve.py"
SECRET = bytes(range(32))
KEY = base64.urlsafe_b64encode(SECRET).decode("ascii")
ITEMS = {
    "text": "naïve ☃ 𝄞 \x00\x7f\n",
    "quotes": "a\"b\\c;d, e=f'",
    "surrogate": "\ud800",
    "numbers": [0.1, 1e300, -5e-324, 2**63, -(2**63), 2**200, float("inf"), True, None],
    "nested": {"list": [1, [2, {"ключ": []}]], "empty": {}},
    "": 0,
}


class Package(NamedTuple):
    """A package at work, on ports of its own."""

    version: str
    implementation: str | None
    port: int
    shops: dict[str, int]


@contextlib.contextmanager
def serve(python: str, config: dict[str, str], **environment: str) -> Iterator[Package]:
    """Run both applications on a package of another interpreter."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "AIOHTTP_SESSION"))}
    process = subprocess.Popen(
        [python, str(SERVE), json.dumps(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**env, **environment},
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "serve.py did not start; its errors are on stderr"
            yield Package(**json.loads(line))
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def config(redis_server: Server, memcached_server: Server) -> dict[str, str]:
    return {
        "key": KEY,
        "redis": f"redis://{HOST}:{redis_server.port}",
        "memcached": f"memcached://{HOST}:{memcached_server.port}",
    }


@pytest.fixture(scope="module")
def theirs(config: dict[str, str]) -> Iterator[Package]:
    with serve(reference.python(), config) as package:
        assert package.version == "2.12.1"
        yield package


@pytest.fixture(scope="module")
def ours(config: dict[str, str], implementation: str) -> Iterator[Package]:
    environment = {"PYTHONPATH": str(Path(aiohttp_session.__file__).parents[1])}
    if implementation == "python":
        environment["AIOHTTP_SESSION_NO_EXTENSIONS"] = "1"
    with serve(sys.executable, config, **environment) as package:
        assert package.version == aiohttp_session.__version__
        assert package.implementation == implementation
        yield package


@pytest.fixture(params=["ours to theirs", "theirs to ours"])
def packages(
    request: pytest.FixtureRequest, ours: Package, theirs: Package
) -> tuple[Package, Package]:
    """The package that a user begins with, and the one that it is exchanged for."""
    return (ours, theirs) if request.param == "ours to theirs" else (theirs, ours)


class Browser:
    """Keeps cookies as they were written, and sends them to either package."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http
        self.cookies: dict[str, str] = {}
        self.set_cookie: str | None = None

    async def visit(self, method: str, url: str, **options: Any) -> str:
        """Return the body of the answer, after redirects."""
        header = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        headers = {"Cookie": header} if header else {}
        async with self._http.request(
            method, url, headers=headers, allow_redirects=False, **options
        ) as response:
            self._keep(response.headers.getall("Set-Cookie", []))
            text = await response.text()
        if response.status == 303:
            return await self.visit("GET", str(response.url.join(response.url.with_path("/"))))
        assert response.status == 200, text
        return text

    def _keep(self, lines: list[str]) -> None:
        assert len(lines) <= 1, lines
        self.set_cookie = lines[0] if lines else None
        for line in lines:
            pair, _, attributes = line.partition(";")
            name, _, value = pair.partition("=")
            self.cookies[name] = value
            if "Max-Age=0" in attributes:
                del self.cookies[name]

    async def ask(
        self, package: Package, kind: str, method: str = "GET", path: str = "/", **options: Any
    ) -> Any:
        """Do something with the session, and return its state."""
        max_age = options.pop("lives", None)
        url = f"http://{HOST}:{package.port}/{kind}/{max_age}{path}"
        return json.loads(await self.visit(method, url, **options))


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http:
        yield Browser(http)


@pytest.mark.parametrize("kind", KINDS)
class TestSessions:
    async def test_read_by_the_other(
        self, browser: Browser, packages: tuple[Package, Package], kind: str
    ) -> None:
        before, after = packages
        written = await browser.ask(before, kind, "PUT", json={"items": ITEMS})
        assert written["new"]
        read = await browser.ask(after, kind)
        assert read["items"] == ITEMS
        assert not read["new"]
        assert read["created"] == written["created"]
        assert browser.set_cookie is None

    async def test_written_in_turns(
        self, browser: Browser, packages: tuple[Package, Package], kind: str
    ) -> None:
        before, after = packages
        await browser.ask(before, kind, "PUT", json={"items": ITEMS})
        identities = set()
        for package, number in ((after, 1), (before, 2), (after, 3)):
            state = await browser.ask(package, kind, "PUT", json={"items": {"last": number}})
            identities.add(state["identity"])
            state = await browser.ask(package, kind, "POST", "/nested")
        state = await browser.ask(before, kind)
        nested = {"list": [*ITEMS["nested"]["list"], "more", "more", "more"], "empty": {}}  # type: ignore[index]
        assert state["items"] == {**ITEMS, "last": 3, "nested": nested}
        assert len(identities) == 1

    async def test_invalidated(
        self, browser: Browser, packages: tuple[Package, Package], kind: str
    ) -> None:
        before, after = packages
        await browser.ask(before, kind, "PUT", json={"items": ITEMS})
        stolen = dict(browser.cookies)
        await browser.ask(before, kind, "DELETE")
        state = await browser.ask(after, kind)
        assert (state["items"], state["new"], state["identity"]) == ({}, True, None)
        if kind in {"redis", "memcached"}:
            browser.cookies = stolen
            state = await browser.ask(after, kind)
            assert (state["items"], state["new"], state["identity"]) == ({}, True, None)

    async def test_cookies_alike(
        self, browser: Browser, ours: Package, theirs: Package, kind: str
    ) -> None:
        """All attributes, in order, when a session is saved, and when one that lives 100 s is."""
        for lives, body in (
            (None, {"items": {"a": 1}}),
            (100, {"items": {"a": 1}}),
            (100, {"items": {"a": 1}, "max_age": 50}),
        ):
            attributes = []
            for package in (ours, theirs):
                browser.cookies.clear()
                await browser.ask(package, kind, "PUT", lives=lives, json=body)
                assert browser.set_cookie is not None
                tail = browser.set_cookie.partition(";")[2]
                attributes.append(
                    re.sub(r"\w{3}, \d\d-\w{3}-\d{4} \d\d:\d\d:\d\d GMT", "DATE", tail)
                )
            assert attributes[0] == attributes[1]
            assert ("expires=DATE" in attributes[0]) == (lives is not None)

    async def test_max_age_of_one_session(
        self, browser: Browser, packages: tuple[Package, Package], kind: str
    ) -> None:
        before, after = packages
        body = {"items": {"a": 1}, "max_age": 50}
        await browser.ask(before, kind, "PUT", lives=100, json=body)
        assert (await browser.ask(after, kind, lives=100))["items"] == {"a": 1}


PAYLOADS = {
    "fresh": {"created": "NOW", "session": {"a": 1}},
    "expired": {"created": 1_000_000_000, "session": {"a": 1}},
    "from the future": {"created": 9_000_000_000, "session": {"a": 1}},
    "of unknown age": {"session": {"a": 1}},
    "with more members": {"created": "NOW", "session": {"a": 1}, "more": [1], "issued": 5},
    "of null": {"created": "NOW", "session": None},
    "emptied": {},
}


@pytest.mark.parametrize("lives", [None, 100])
@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
@pytest.mark.parametrize("kind", KINDS)
async def test_payloads_understood_alike(
    browser: Browser,
    ours: Package,
    theirs: Package,
    config: dict[str, str],
    kind: str,
    payload: dict[str, Any],
    lives: int | None,
) -> None:
    now = int(time.time())
    text = json.dumps({k: now if v == "NOW" else v for k, v in payload.items()})
    name = f"{kind.upper()}_{lives}"
    browser.cookies[name] = await store(kind, config, name, text)
    states = [await browser.ask(package, kind, lives=lives) for package in (ours, theirs)]
    for state in states:
        # A time of its own, made a moment ago.
        state["created"] = "now" if now <= state["created"] <= time.time() else state["created"]
    if kind == "nacl" and lives and payload.get("created") == 9_000_000_000:
        # Sealed in the future, and nothing else says when: refused here, for the clock may have
        # Nothing else says when it was sealed: refused here.
        assert (states[0]["items"], states[0]["new"]) == ({}, True)
        return
    assert states[0] == states[1]


async def store(kind: str, config: dict[str, str], name: str, text: str) -> str:
    """Store a payload as some other program would; return the cookie as it is written."""
    if kind == "simple":
        return json.dumps(text)  # quoted with backslashes, as in the header
    if kind == "fernet":
        return Fernet(KEY).encrypt(text.encode("utf-8")).decode("ascii")
    if kind == "nacl":
        return base64.b64encode(SecretBox(SECRET).encrypt(text.encode("utf-8"))).decode("ascii")
    if kind == "redis":
        async with Redis.from_url(config["redis"]) as redis:
            await redis.set(f"{name}_some-id", text)
    else:
        memcached = aiomcache.Client(HOST, int(config["memcached"].rpartition(":")[2]))
        await memcached.set(f"{name}_some-id".encode("ascii"), text.encode("utf-8"))
        await memcached.close()
    return "some-id"


@pytest.mark.parametrize(("body", "ttl"), [({}, 100), ({"max_age": 50}, 50)])
async def test_records_in_redis_expire_alike(
    browser: Browser,
    ours: Package,
    theirs: Package,
    config: dict[str, str],
    body: dict[str, int],
    ttl: int,
) -> None:
    async with Redis.from_url(config["redis"], decode_responses=True) as redis:
        for package in (ours, theirs):
            await redis.flushdb()
            browser.cookies.clear()
            await browser.ask(package, "redis", "PUT", lives=100, json={"items": {"a": 1}, **body})
            (key,) = await redis.keys()
            assert key == f"REDIS_100_{browser.cookies['REDIS_100']}"
            assert ttl // 2 < await redis.ttl(key) <= ttl


async def test_records_in_redis_stay_without_max_age(
    browser: Browser, ours: Package, theirs: Package, config: dict[str, str]
) -> None:
    async with Redis.from_url(config["redis"], decode_responses=True) as redis:
        for package in (ours, theirs):
            await redis.flushdb()
            browser.cookies.clear()
            await browser.ask(package, "redis", "PUT", json={"items": {"a": 1}})
            (key,) = await redis.keys()
            assert await redis.ttl(key) == -1


@pytest.mark.parametrize("kind", KINDS)
class TestShop:
    """The example application, with the package exchanged under a user."""

    async def test_users_stay_logged_in(
        self, browser: Browser, packages: tuple[Package, Package], kind: str
    ) -> None:
        before, after = packages
        page = await browse(browser, before, kind, "/cart/add/tea")
        page = await browse(browser, before, kind, "/login", name="Zoë <b>")
        assert "Welcome, Zoë <b>!" in page
        page = await browse(browser, after, kind, "/cart/add/pot")
        assert "Welcome" not in page
        assert "Teapot is in your cart." in page
        page = await browse(browser, after, kind, "/cart/add/tea")
        page = await browse(browser, before, kind, "/cart/remove/pot")
        for package in packages:
            page = await browse(browser, package, kind)
            assert "Zoë <b>" in page
            assert "Total € 17.80" in page
        assert "Visits in this session: 12" in page

    async def test_users_stay_logged_out(
        self, browser: Browser, packages: tuple[Package, Package], kind: str
    ) -> None:
        before, after = packages
        await browse(browser, before, kind, "/login", name="Zoë")
        assert "Log out" in await browse(browser, after, kind)
        stolen = dict(browser.cookies)
        await browse(browser, after, kind, "/logout")
        if kind in {"redis", "memcached"}:
            browser.cookies = stolen
        assert "Log out" not in await browse(browser, before, kind)


async def browse(
    browser: Browser, package: Package, kind: str, path: str | None = None, **form: str
) -> str:
    """Open the shop, send a form if a path is given, and return the text of the page."""
    shop = f"http://{HOST}:{package.shops[kind]}"
    page = await browser.visit("GET", shop)
    if path is not None:
        token = re.search(r'name="csrf" value="([^"]+)"', page)
        assert token is not None
        page = await browser.visit("POST", shop + path, data={"csrf": token[1], **form})
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", page)))
