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
        ({"cookie_name": "__Host-s"}, "drop.*needs secure=True, path='/' and no domain"),
        ({"cookie_name": "__Host-s", "secure": True, "path": "/a"}, "path='/'"),
        ({"cookie_name": "__Host-s", "secure": True, "domain": "a.b"}, "no domain"),
        ({"cookie_name": "__host-s"}, "'__host-s' needs secure=True"),
        ({"cookie_name": "__Secure-s"}, "'__Secure-s' needs secure=True"),
        ({"cookie_name": "__SECURE-s"}, "needs secure=True"),
        ({"cookie_name": "__Http-s", "secure": True, "httponly": False}, "and httponly=True"),
        ({"cookie_name": "__Http-s"}, "needs secure=True and"),
        (
            {"cookie_name": "__Host-Http-s", "secure": True, "httponly": False},
            "httponly=True, path",
        ),
        ({"samesite": "lax "}, "ignore samesite='lax '.*'Strict', 'Lax' and 'None'"),
        ({"samesite": "Foo"}, "'Foo'"),
        ({"samesite": True}, "samesite=True"),
        ({"samesite": "None"}, "drop a cookie with samesite='None'"),
        ({"samesite": "none"}, "has not secure=True"),
    ],
)
def test_options_that_browsers_refuse_are_warned_of_at_the_first_cookie(
    options: Any, message: str
) -> None:
    storage = make_quietly(**options)
    response = web.Response()
    with pytest.warns(UserWarning, match=message):
        storage.save_cookie(response, "x")
    assert storage.cookie_name in response.cookies  # it is sent all the same
    storage.save_cookie(response, "")  # and this is not said again, which would be an error here
    storage.cookie_params["path"] = "/changed"
    storage.save_cookie(response, "x")


def make_quietly(**options: Any) -> SimpleCookieStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return SimpleCookieStorage(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"cookie_name": "__Host-s", "secure": True},
        {"cookie_name": "__Secure-s", "secure": True, "path": "/a", "domain": "a.b"},
        {"cookie_name": "__Http-s", "secure": True, "domain": "a.b"},
        {"cookie_name": "__Host-Http-s", "secure": True},
        {"cookie_name": "__Hosts"},
        {"samesite": "strict"},
        {"samesite": "None", "secure": True},
        {"samesite": None},
        {"samesite": ""},
        {"partitioned": True, "secure": True},
    ],
)
def test_options_that_browsers_take_are_taken(options: Any) -> None:
    make_quietly(**options).save_cookie(web.Response(), "x")


def test_what_is_mended_before_the_first_cookie_is_no_matter() -> None:
    storage = make_quietly(cookie_name="__Host-s", samesite="None")
    storage.cookie_params["secure"] = True
    storage.save_cookie(web.Response(), "x")


def test_what_is_spoilt_later_is_warned_of() -> None:
    storage = make_quietly(partitioned=True, secure=True)
    storage.save_cookie(web.Response(), "x")
    storage.cookie_params["secure"] = False
    with pytest.warns(UserWarning, match="partitioned=True"):
        storage.save_cookie(web.Response(), "x")


def test_a_partitioned_cookie_must_be_secure() -> None:
    with pytest.raises(ValueError, match="partitioned=True needs secure=True"):
        SimpleCookieStorage(partitioned=True)


ENDS = [";", "\r", "\n", "\x00", "\x1f", "\x7f"]


@pytest.mark.parametrize("option", ["domain", "path"])
@pytest.mark.parametrize("character", [*ENDS, "\t", "\x80", "\xe4", "\u2000"])
def test_attributes_end_where_they_should(option: str, character: str) -> None:
    text = f"/a{character} Path=/evil"
    with pytest.raises(ValueError, match=f"{option} must be printable ASCII") as caught:
        SimpleCookieStorage(**{option: text})  # type: ignore[arg-type]
    assert ascii(text).strip("'")[:3] in ascii(str(caught.value))


@pytest.mark.parametrize(
    "name", ["", "a b", "a=b", *(f"a{end}" for end in [*ENDS, "\t", "\u2000"])]
)
def test_names_that_no_cookie_can_have(name: str) -> None:
    with pytest.raises(ValueError, match="cookie_name must be a name without"):
        SimpleCookieStorage(cookie_name=name)


@pytest.mark.parametrize("options", [{"path": None}, {"path": "/a b,c"}, {"domain": ".a.b"}])
def test_odd_attributes_that_are_harmless(options: Any) -> None:
    make_quietly(**options).save_cookie(web.Response(), "x")


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
