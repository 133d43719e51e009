"""Cookie options that browsers have opinions about."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_session import SimpleCookieStorage, get_session, setup
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memory_storage import MemoryStorage
from tests.contract import KEY, NAME, Browser


@pytest.mark.parametrize("options", [{}, {"max_age": 100}, {"samesite": "None"}])
async def test_a_partitioned_cookie(aiohttp_client: AiohttpClient, options: Any) -> None:
    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        session["a"] = 1
        if "end" in request.query:
            session.invalidate()
        return web.Response()

    app = web.Application()
    setup(app, MemoryStorage(partitioned=True, secure=True, **options))
    app.router.add_get("/", handler)
    client = await aiohttp_client(app)
    for path in ("/", "/?end=1"):
        response = await client.get(path, headers={"Cookie": f"{NAME}=x"})
        words = response.headers["Set-Cookie"].split("; ")
        assert words[1:] == sorted(words[1:], key=str.lower)
        assert {"Partitioned", "Secure"} <= set(words)


@pytest.mark.parametrize("value", ["x", "ä", "a b", 'q"\\;'])
def test_a_partitioned_cookie_of_any_value_stays_so_when_it_is_set_again(value: str) -> None:
    storage = SimpleCookieStorage(partitioned=True, secure=True)
    response, plain = web.Response(), web.Response()
    for _ in range(2):
        storage.save_cookie(response, value)
        plain.set_cookie(NAME, value, httponly=True, path="/", secure=True)
    text = response.cookies[NAME].OutputString()
    assert text == plain.cookies[NAME].OutputString().replace("; Path", "; Partitioned; Path")


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda cookies: cookies.copy()])
def test_a_copy_of_a_partitioned_cookie_is_one(duplicate: Callable[[Any], Any]) -> None:
    response = web.Response()
    SimpleCookieStorage(partitioned=True, secure=True).save_cookie(response, "x")
    assert duplicate(response.cookies[NAME]) == response.cookies[NAME]
    copied = duplicate(response.cookies[NAME]).OutputString()
    assert copied == f"{NAME}=x; HttpOnly; Partitioned; Path=/; Secure"


def test_an_unpartitioned_cookie_says_nothing_of_it() -> None:
    response = web.Response()
    SimpleCookieStorage().save_cookie(response, "x")
    assert "Partitioned" not in response.cookies[NAME].OutputString()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cookie_name": "__Host-s"}, "needs secure=True, path='/' and no domain"),
        ({"cookie_name": "__Host-s", "secure": True, "path": "/a"}, "path='/'"),
        ({"cookie_name": "__Host-s", "secure": True, "domain": "a.b"}, "no domain"),
        ({"cookie_name": "__host-s"}, "'__host-s' needs secure=True"),
        ({"cookie_name": "__Secure-s"}, "'__Secure-s' needs secure=True"),
        ({"cookie_name": "__SECURE-s"}, "needs secure=True"),
        ({"samesite": "lax "}, "'Strict', 'Lax', 'None' or None, not 'lax '"),
        ({"samesite": "yes"}, "not 'yes'"),
        ({"partitioned": True}, "partitioned=True needs secure=True"),
    ],
)
def test_options_that_browsers_refuse_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimpleCookieStorage(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"cookie_name": "__Host-s", "secure": True},
        {"cookie_name": "__Secure-s", "secure": True, "path": "/a", "domain": "a.b"},
        {"cookie_name": "__Hosts"},
        {"samesite": "strict"},
        {"samesite": "None", "secure": True},
        {"samesite": None},
        {"samesite": ""},
        {"partitioned": True, "secure": True},
    ],
)
def test_options_that_browsers_take_are_taken(options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SimpleCookieStorage(**options)


@pytest.mark.parametrize("samesite", ["None", "none"])
def test_samesite_none_without_secure_is_warned_about(samesite: str) -> None:
    with pytest.warns(UserWarning, match="samesite='None'"):
        SimpleCookieStorage(samesite=samesite)


def test_the_limit_counts_name_value_and_attributes(caplog: pytest.LogCaptureFixture) -> None:
    attributes = "; HttpOnly; Path=/"
    room = 4096 - len(f"{NAME}={attributes}")
    SimpleCookieStorage().save_cookie(web.Response(), "x" * room)
    assert not caplog.records
    SimpleCookieStorage().save_cookie(web.Response(), "x" * (room + 1))
    assert [(r.levelno, r.name) for r in caplog.records] == [(logging.ERROR, "aiohttp_session")]
    assert "4097 bytes" in caplog.text
    assert "RedisStorage" in caplog.text
    assert "xxx" not in caplog.text


async def test_it_is_reported_once_a_minute_for_each_storage(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 5.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    browsers = [Browser(EncryptedCookieStorage(KEY)) for _ in range(2)]
    counts = []
    for now in (5.0, 6.0, 64.9, 65.0, 66.0, 200.0):  # noqa: B007 - the clock reads it
        caplog.clear()
        for browser in browsers:
            response = await browser.set(a="x" * 4000)
            assert NAME in response.cookies  # it is sent all the same
        counts.append(len(caplog.records))
    assert counts == [2, 0, 0, 2, 0, 2]
