"""What a browser makes of the cookies, and which ones it lets others plant."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import web

from aiohttp_session import AbstractStorage, SimpleCookieStorage, get_session, recommended, setup
from aiohttp_session.memory_storage import MemoryStorage
from tests.browser.conftest import Serve
from tests.browser.driver import Browser

HOST = "__Host-session"


def make_app(storage: AbstractStorage) -> web.Application:
    async def log_in(request: web.Request) -> web.Response:
        (await get_session(request))["user"] = request.query.get("user", "ann")
        return web.Response(text="Welcome")

    async def log_out(request: web.Request) -> web.Response:
        (await get_session(request)).invalidate()
        return web.Response(text="Bye")

    async def look(request: web.Request) -> web.Response:
        return web.json_response(
            {
                "session": dict(await get_session(request)),
                "found": storage.load_cookie(request),
                "by_aiohttp": request.cookies.get(storage.cookie_name),
            }
        )

    app = web.Application()
    setup(app, storage)
    app.router.add_get("/log-in", log_in)
    app.router.add_get("/log-out", log_out)
    app.router.add_get("/", look)
    return app


async def look(browser: Browser, port: int) -> Any:
    return json.loads(await browser.open(f"https://app.example.test:{port}/"))


@pytest.mark.parametrize(
    "plant",
    [
        f"x=y {HOST}=EVIL",
        *(f"{blank}{HOST}=EVIL" for blank in "\u2000\xa0\x85"),
        f'x="y" {HOST}=EVIL',
    ],
)
async def test_a_sibling_host_cannot_plant_a_session(
    plant: str, browser: Browser, serve: Serve
) -> None:
    storage = MemoryStorage(cookie_name=HOST, secure=True)
    port = await serve(make_app(storage))
    await browser.open(f"https://evil.example.test:{port}/")
    await browser.run("document.cookie = arguments[0]", f"{plant}; Domain=example.test; Path=/")
    seen = await look(browser, port)
    assert seen["by_aiohttp"] == "EVIL"  # the door is there
    assert seen["found"] is None
    await browser.open(f"https://app.example.test:{port}/log-in")
    seen = await look(browser, port)
    assert seen["session"] == {"user": "ann"}
    assert seen["found"] not in {None, "EVIL"}


@pytest.mark.parametrize("prefix", ["__Host-", "__host-", "__Host-Http-"])
async def test_a_sibling_host_cannot_set_a_prefixed_cookie_itself(
    prefix: str, browser: Browser, serve: Serve
) -> None:
    storage = MemoryStorage(cookie_name=f"{prefix}session", secure=True)
    port = await serve(make_app(storage))
    await browser.open(f"https://evil.example.test:{port}/")
    for text in (f"{prefix}session=EVIL", f"={prefix}session=EVIL"):
        await browser.run("document.cookie = arguments[0]", f"{text}; Domain=example.test; Secure")
    assert (await look(browser, port))["found"] is None


async def test_a_recommended_cookie_is_kept_and_deleted(browser: Browser, serve: Serve) -> None:
    port = await serve(make_app(MemoryStorage(**recommended())))
    await browser.open(f"https://app.example.test:{port}/log-in")
    cookie = (await browser.cookies())["__Host-id"]
    assert (cookie["domain"], cookie["path"], cookie["sameSite"]) == (
        "app.example.test",
        "/",
        "Lax",
    )
    assert cookie["secure"]
    assert cookie["httpOnly"]
    assert (await look(browser, port))["session"] == {"user": "ann"}
    assert await browser.run("return document.cookie") == ""
    await browser.open(f"https://app.example.test:{port}/log-out")
    assert await browser.cookies() == {}


@pytest.mark.parametrize("samesite", ["None", "Strict"])
async def test_a_partitioned_cookie_is_kept_apart_and_deleted(
    samesite: str, browser: Browser, serve: Serve
) -> None:
    storage = MemoryStorage(
        cookie_name="__Host-embedded", secure=True, samesite=samesite, partitioned=True
    )
    port = await serve(make_app(storage))
    await browser.open(f"https://app.example.test:{port}/log-in")
    cookie = (await browser.cookies())["__Host-embedded"]
    assert cookie["sameSite"] == samesite
    assert "example.test" in json.dumps(cookie["partitionKey"])
    await browser.open(f"https://app.example.test:{port}/log-out")
    assert await browser.cookies() == {}


async def test_a_cookie_that_is_too_large_is_dropped_and_logged(
    browser: Browser, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    port = await serve(make_app(SimpleCookieStorage(secure=True)))
    url = f"https://app.example.test:{port}/log-in?user="
    await browser.open(url + "x" * 3000)
    assert "AIOHTTP_SESSION" in await browser.cookies()
    assert not caplog.records
    await browser.open(f"https://app.example.test:{port}/log-out")
    await browser.open(url + "x" * 5000)
    kept = (await browser.cookies()).get("AIOHTTP_SESSION", {"value": "{}"})
    assert "xxx" not in kept["value"]
    assert ["Browsers drop cookies" in record.getMessage() for record in caplog.records] == [True]
