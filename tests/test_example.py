"""The example application, on every storage."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from typing import Any
from uuid import uuid4

import pytest
from aiohttp import CookieJar
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from benchmarks.servers import HOST, free_port
from examples import shop
from tests.waiting import PATIENCE

KEY = "A" * 43 + "="


@pytest.fixture(params=["cookie", "simple", "nacl", "memory", "redis", "memcached"])
async def client(
    request: pytest.FixtureRequest, aiohttp_client: AiohttpClient
) -> TestClient[Any, Any]:
    where = request.param
    if where in {"redis", "memcached"}:
        where = f"{where}://{HOST}:{request.getfixturevalue(where + '_server').port}"
    return await aiohttp_client(shop.make_app(where, KEY))


async def read(client: TestClient[Any, Any]) -> str:
    async with client.get("/") as response:
        assert response.status == 200
        return await response.text()


async def send(client: TestClient[Any, Any], path: str, **form: str) -> str:
    """Send a form as it is on the page, and return the next page."""
    page = await read(client)
    token = re.search(r'name="csrf" value="([^"]+)"', page)
    assert token is not None
    assert f'action="{path}"' in page
    async with client.post(path, data={"csrf": token[1], **form}) as response:
        assert response.status == 200
        return await response.text()


async def test_visits_are_counted(client: TestClient[Any, Any]) -> None:
    for visits in (1, 2, 3):
        assert f"Visits in this session: <b>{visits}</b>" in await read(client)


async def test_log_in_and_out(client: TestClient[Any, Any]) -> None:
    page = await send(client, "/login", name=" <i>Zoë</i> ")
    assert "Welcome, &lt;i&gt;Zoë&lt;/i&gt;!" in page
    assert "<i>" not in page
    page = await read(client)
    assert "Welcome" not in page
    assert "<b>&lt;i&gt;Zoë" in page
    page = await send(client, "/logout")
    assert "Zoë" not in page
    assert "Visits in this session: <b>1</b>" in page


async def test_nobody_logs_in_without_a_name(client: TestClient[Any, Any]) -> None:
    page = await send(client, "/login", name="  ")
    assert "Please tell us your name." in page
    assert "Log in" in page


async def test_cart(client: TestClient[Any, Any]) -> None:
    assert "Your cart is empty" in await read(client)
    for product in ("tea", "tea", "pot"):
        page = await send(client, f"/cart/add/{product}")
        assert f"{shop.PRODUCTS[product].name} is in your cart." in page
    assert "<td>Total<td><td>€ 66.80" in await send(client, "/login", name="Zoë")
    assert "<td>Total<td><td>€ 49.00" in await send(client, "/cart/remove/tea")
    assert "Your cart is empty" in await send(client, "/cart/remove/pot")


@pytest.mark.parametrize("token", ["", "forged", "é"])
@pytest.mark.parametrize("path", ["/login", "/logout", "/cart/add/tea", "/devices/end-others"])
async def test_forged_forms_are_refused(
    aiohttp_client: AiohttpClient, path: str, token: str
) -> None:
    client = await aiohttp_client(shop.make_app("memory", KEY))
    for _ in ("without a session", "with one"):
        async with client.post(path, data={"csrf": token, "name": "Zoë"}) as response:
            assert response.status == 403
        await read(client)
    assert "Zoë" not in await read(client)  # nor in a token: those are ASCII


async def test_unknown_products_are_not_sold(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(shop.make_app("memory", KEY))
    token = re.search(r'name="csrf" value="([^"]+)"', await read(client))
    assert token is not None
    async with client.post("/cart/add/gold", data={"csrf": token[1]}) as response:
        assert response.status == 404


LISTS = ("memory", "redis", "memcached")


@pytest.fixture
def name() -> str:
    """Name a customer whom no other test knows: they share the servers."""
    return f"Zoë {uuid4().hex[:8]}"


@pytest.mark.parametrize("client", LISTS, indirect=True)
async def test_your_devices(client: TestClient[Any, Any], name: str) -> None:
    assert "Your devices" not in await read(client)
    client.session.headers["User-Agent"] = "<b>Phone</b>"
    page = await send(client, "/login", name=name)
    assert "<h2>Your devices</h2>" in page
    assert page.count("this device") == 1
    assert "&lt;b&gt;Phone&lt;/b&gt;" in page
    assert "/devices/end" not in page  # there is no other


@pytest.fixture
async def devices(
    client: TestClient[Any, Any], name: str, aiohttp_client: AiohttpClient
) -> list[TestClient[Any, Any]]:
    """Three browsers of a customer's."""
    browsers = [client, *[await aiohttp_client(client.server) for _ in range(2)]]
    for number, browser in enumerate(browsers):
        browser.session.headers["User-Agent"] = f"Browser {number}"
        await send(browser, "/login", name=name)
    return browsers


@pytest.mark.parametrize("client", LISTS, indirect=True)
async def test_a_device_is_logged_out(devices: list[TestClient[Any, Any]], name: str) -> None:
    first, second, third = devices
    page = await read(first)
    assert page.count("this device") == 1
    row = re.search(r'<td>Browser 1<td>.*?name="handle" value="([^"]+)"', page)
    assert row is not None
    assert "logged out." in await send(first, "/devices/end", handle=row[1])
    assert name not in await read(second)
    assert name in await read(third)
    assert "logged out before." in await send(first, "/devices/end", handle=row[1])


@pytest.mark.parametrize("client", LISTS, indirect=True)
async def test_all_other_devices_are_logged_out(
    devices: list[TestClient[Any, Any]], name: str
) -> None:
    page = await send(devices[1], "/devices/end-others")
    assert "Devices that were logged out: 2." in page
    assert "/devices/end" not in page
    assert [name in await read(device) for device in devices] == [False, True, False]


@pytest.mark.parametrize("client", LISTS, indirect=True)
async def test_no_device_of_somebody_else_is_logged_out(
    devices: list[TestClient[Any, Any]], name: str, aiohttp_client: AiohttpClient
) -> None:
    row = re.search(r'name="handle" value="([^"]+)"', await read(devices[0]))
    assert row is not None
    eves: list[TestClient[Any, Any]] = []
    for _ in range(2):
        eves.append(await aiohttp_client(devices[0].server))
        await send(eves[-1], "/login", name=f"Eve of {name}")
    assert "before." in await send(eves[0], "/devices/end", handle=row[1])
    assert [name in await read(device) for device in devices] == [True] * 3


@pytest.mark.parametrize("client", ["cookie", "simple", "nacl", "memory"], indirect=True)
@pytest.mark.parametrize("path", ["/devices/end", "/devices/end-others"])
async def test_nobody_ends_devices_that_are_not_listed(
    client: TestClient[Any, Any], path: str
) -> None:
    page = await read(client)
    assert "Your devices" not in page
    token = re.search(r'name="csrf" value="([^"]+)"', page)
    assert token is not None
    async with client.post(path, data={"csrf": token[1], "handle": "x"}) as response:
        assert response.status == 404


@pytest.mark.parametrize("client", ["cookie", "simple", "nacl"], indirect=True)
async def test_a_cookie_lists_no_devices(client: TestClient[Any, Any], name: str) -> None:
    assert "Your devices" not in await send(client, "/login", name=name)


async def test_a_planted_id_is_worth_nothing_after_the_log_in(
    aiohttp_client: AiohttpClient,
) -> None:
    app = shop.make_app("memory", KEY)
    user = await aiohttp_client(app, cookie_jar=CookieJar(unsafe=True))
    await read(user)
    (planted,) = user.session.cookie_jar
    await send(user, "/login", name="Zoë")
    assert "Zoë" in await read(user)
    user.session.cookie_jar.clear()
    async with user.get("/", headers={"Cookie": f"SHOP={planted.value}"}) as response:
        assert "Zoë" not in await response.text()


def test_says_where_it_listens() -> None:
    port = free_port()
    command = [sys.executable, "-m", "examples.shop", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = f"http://{HOST}:{port}"
            assert url in process.stdout.readline()
            with urllib.request.urlopen(url) as response:
                assert response.headers["Set-Cookie"].startswith("SHOP=")
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("arguments", [["--storage", "sqlite"], ["--key", "short"]])
def test_wrong_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["shop.py", *arguments])
    with pytest.raises(SystemExit):
        shop.main()
    assert "shop.py: error: " in capsys.readouterr().err
