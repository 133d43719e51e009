"""The example shop in two browsers, and what they keep of it."""

from __future__ import annotations

import pytest
from aiohttp import web

from examples import shop
from tests.browser.conftest import Serve
from tests.browser.driver import Browser, chromium

KEY = "A" * 43 + "="
COOKIE = "__Host-SHOP"


async def click(browser: Browser, form: str, **fields: str) -> str:
    """Fill in a form of the page and send it; return the text of the next page."""
    await browser.submit(f'form[action="{form}"]', fields)
    return str(await browser.run("return document.body.innerText"))


async def check_cookie(browser: Browser) -> str:
    """Check what the browser keeps, and return the cookie's value."""
    (cookie,) = (await browser.cookies()).values()
    assert cookie["name"] == COOKIE
    assert (cookie["domain"], cookie["path"]) == ("shop.example.test", "/")
    assert (cookie["secure"], cookie["httpOnly"], cookie["sameSite"]) == (True, True, "Lax")
    assert not cookie["session"]  # it outlives the browser, by its max_age
    assert await browser.run("return document.cookie") == ""
    return str(cookie["value"])


@pytest.mark.parametrize("storage", ["memory", "cookie", "simple", "nacl"])
async def test_log_in_cart_and_log_out(storage: str, browser: Browser, serve: Serve) -> None:
    port = await serve(shop.make_app(storage, KEY, secure=True))
    assert "Your cart is empty" in await browser.open(f"https://shop.example.test:{port}/")
    before = await check_cookie(browser)
    assert "Welcome, Zoë!" in await click(browser, "/login", name="Zoë")
    assert await check_cookie(browser) != before
    assert "Green tea is in your cart." in await click(browser, "/cart/add/tea")
    assert "€ 17.80" in await click(browser, "/cart/add/tea")
    assert "Your cart is empty" in await click(browser, "/cart/remove/tea")
    value = await check_cookie(browser)
    page = await click(browser, "/logout")
    assert "Zoë" not in page
    assert "Visits in this session: 1" in page
    assert await check_cookie(browser) != value


async def test_your_devices(browser: Browser, driver: str, serve: Serve) -> None:
    port = await serve(shop.make_app("memory", KEY, secure=True))
    url = f"https://shop.example.test:{port}/"
    async with chromium(driver) as phone, chromium(driver) as tablet:
        browsers = (browser, phone, tablet)
        for each in browsers:
            await each.open(url)
            page = await click(each, "/login", name="Zoë")
        assert page.count("since ") == 3
        assert page.count("this device") == 1
        assert "Chrome" in page

        assert "That device is logged out." in await click(tablet, "/devices/end")
        pages = [await each.open(url) for each in browsers]
        assert sorted("Zoë" in page for page in pages) == [False, True, True]
        (ended,) = (each for each, page in zip(browsers, pages, strict=True) if "Zoë" not in page)
        await click(ended, "/login", name="Zoë")

        page = await click(tablet, "/devices/end-others")
        assert "Devices that were logged out: 2." in page
        assert page.count("since ") == 1
        assert ["Zoë" in await each.open(url) for each in browsers] == [False, False, True]


async def test_another_host_can_send_no_form(browser: Browser, serve: Serve) -> None:
    port = await serve(shop.make_app("memory", KEY, secure=True))
    url = f"https://shop.example.test:{port}/"
    await browser.open(url)
    await click(browser, "/login", name="Zoë")
    # Of the same site, so that the browser sends the cookie along.
    evil = await serve(web.Application())
    await browser.open(f"https://evil.example.test:{evil}/")
    await browser.run(
        "document.body.innerHTML = `<form method=post action='${arguments[0]}logout'></form>`", url
    )
    await browser.submit("form", {})
    assert "This form is out of date" in await browser.run("return document.body.innerText")
    assert "Zoë" in await browser.open(url)
