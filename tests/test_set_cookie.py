"""Cookies out: the text on the wire is that of ``response.set_cookie``."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from email.utils import formatdate
from http.cookies import CookieError, Morsel, SimpleCookie
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_session import SimpleCookieStorage, get_session, setup
from aiohttp_session._set_cookie import CookieWriter
from tests.conftest import Clock

pytestmark = pytest.mark.filterwarnings("ignore:Browsers ignore samesite")

EPOCH = "Thu, 01 Jan 1970 00:00:00 GMT"

Action = Callable[[web.Response], object]


def make(**options: Any) -> SimpleCookieStorage:
    return SimpleCookieStorage(**{"cookie_name": "N", **options})


def by_aiohttp(
    response: web.Response, name: str, value: str, params: Any, max_age: int | None = None
) -> None:
    """Set a cookie as `save_cookie` promises to, with the means of aiohttp."""
    params = {**params}
    if max_age is not None:
        date = formatdate(int(time.time() + max_age), usegmt=True)
        expires = f"{date[:7]}-{date[8:11]}-{date[12:]}"
        params |= {"max_age": max_age, "expires": expires}
    if value:
        response.set_cookie(name, value, **params)
    else:
        response.cookies.pop(name, None)
        response.set_cookie(name, "", **{**params, "max_age": 0, "expires": EPOCH})


def outcome(*actions: Action) -> object:
    """Return the cookies that these actions leave on a response, or their exception."""
    response = web.Response()
    try:
        for action in actions:
            action(response)
        return [
            (name, cookie.value, cookie.OutputString()) for name, cookie in response.cookies.items()
        ]
    except (CookieError, ValueError, TypeError, OverflowError) as error:
        return type(error), str(error)


# Text


def test_a_cookie_and_its_deletion_on_the_wire(clock: Clock) -> None:
    clock.now = 0
    storage = make(secure=True, samesite="Lax")
    response = web.Response()
    storage.save_cookie(response, "gAAA==", max_age=10)
    assert response.cookies["N"].OutputString() == (
        'N="gAAA=="; expires=Thu, 01-Jan-1970 00:00:10 GMT; HttpOnly; Max-Age=10; Path=/;'
        " SameSite=Lax; Secure"
    )
    make(httponly=False).save_cookie(response, "")
    assert response.cookies["N"].OutputString() == (
        'N=""; expires=Thu, 01 Jan 1970 00:00:00 GMT; Max-Age=0; Path=/'
    )


_option_values: dict[str, st.SearchStrategy[Any]] = {
    "domain": st.none() | st.sampled_from(["", "example.org", "a;b", "\xe4", "a\x01"]),
    "max_age": st.none() | st.integers(-5, 5),
    "path": st.sampled_from(["/", "/a b", "", "/;", "/\u20ac", "/\r\n"]),
    "secure": st.none() | st.booleans(),
    "httponly": st.booleans(),
    "samesite": st.sampled_from([None, "", "Lax", "Strict", "odd"]),
}
_params = st.fixed_dictionaries({}, optional=_option_values)
_values = st.text(max_size=20) | st.text("aZ09-_=", max_size=20) | st.text("a\x1f\x7f\xe4\ud800")
_max_ages = st.none() | st.integers(-10, 10**10)


@settings(settings.get_profile("texts"))
@given(value=_values, params=_params, max_age=_max_ages)
def test_it_writes_what_aiohttp_writes(
    value: str, params: Any, max_age: int | None, clock: Clock
) -> None:
    storage = make()
    storage._cookie_params = params
    assert outcome(lambda r: storage.save_cookie(r, value, max_age=max_age)) == outcome(
        lambda r: by_aiohttp(r, "N", value, params, max_age)
    )


@given(
    before=st.tuples(st.sampled_from(["N", "M"]), _values, _params),
    saves=st.lists(st.tuples(_values, _params, _max_ages), min_size=1, max_size=3),
)
def test_on_top_of_earlier_cookies_and_with_options_that_change(
    before: tuple[str, str, Any], saves: list[tuple[str, Any, int | None]], clock: Clock
) -> None:
    storage = make()
    name, first, first_params = before

    def by_storage(response: web.Response) -> None:
        response.set_cookie(name, first, **first_params)
        response.set_cookie("last", "x")
        for value, params, max_age in saves:
            storage.cookie_params.update(params)
            storage.save_cookie(response, value, max_age=max_age)

    def by_hand(response: web.Response) -> None:
        response.set_cookie(name, first, **first_params)
        response.set_cookie("last", "x")
        params = dict(make().cookie_params)
        for value, changes, max_age in saves:
            params.update(changes)
            by_aiohttp(response, "N", value, params, max_age)

    assert outcome(by_storage) == outcome(by_hand)


@pytest.mark.parametrize("name", ["path", "Expires", "max-age", "a,", "a[b]", "\xe4", "a b", ""])
@pytest.mark.parametrize("value", ["x", ""])
def test_reserved_and_illegal_names_raise(name: str, value: str) -> None:
    storage = make()
    storage._cookie_name = name
    for max_age in (None, 10, None):
        response = web.Response()
        with pytest.raises(CookieError) as caught:
            storage.save_cookie(response, value, max_age=max_age)
        assert str(caught.value) == outcome(lambda r: r.set_cookie(name, "x"))[1]  # type: ignore[index]
        assert not response.cookies


@pytest.mark.parametrize("value", [7, 1.5, b"x", ("a", "b"), object])
def test_a_value_that_is_no_text_is_written_as_aiohttp_does(value: Any) -> None:
    storage = make()
    assert outcome(lambda r: storage.save_cookie(r, value)) == outcome(
        lambda r: by_aiohttp(r, "N", value, storage.cookie_params)
    )


def test_on_a_python_whose_cookies_refuse_control_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = SimpleCookie.value_encode

    def strict(self: SimpleCookie, value: str) -> tuple[str, str]:
        if "\n" in value:
            raise CookieError("Control characters are not allowed in cookies")
        return original(self, value)

    monkeypatch.setattr(SimpleCookie, "value_encode", strict)
    with pytest.raises(CookieError, match="Control characters"):
        make().save_cookie(web.Response(), "a\n")


# Time


def test_expires_follows_the_clock(clock: Clock) -> None:
    storage = make()
    for now, expires in [
        (0, "Thu, 01-Jan-1970 00:00:10 GMT"),
        (0.999, "Thu, 01-Jan-1970 00:00:10 GMT"),
        (1, "Thu, 01-Jan-1970 00:00:11 GMT"),
        (1_709_164_790, "Thu, 29-Feb-2024 00:00:00 GMT"),
        (1_700_000_000, "Tue, 14-Nov-2023 22:13:30 GMT"),  # set back
    ]:
        clock.now = now
        storage.save_cookie(response := web.Response(), "x", max_age=10)
        assert response.cookies["N"]["expires"] == expires


@pytest.mark.parametrize("month", range(12))
def test_expires_is_english_in_any_locale(
    month: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = time.strftime
    foreign = {"%a": "Lu", "%A": "Lunedi", "%b": "gen", "%B": "gennaio", "%T": "%T", "%c": "c"}

    def strftime(text: str, *args: Any) -> str:
        for directive, word in foreign.items():
            text = text.replace(directive, word)
        return original(text, *args)

    monkeypatch.setattr(time, "strftime", strftime)
    clock.now = 1_700_000_000 + month * 31 * 86400
    storage = make()
    storage.save_cookie(response := web.Response(), "x", max_age=0)
    date = formatdate(clock.now, usegmt=True)
    assert response.cookies["N"]["expires"] == f"{date[:7]}-{date[8:11]}-{date[12:]}"


# The Morsel


@pytest.mark.parametrize(
    "change",
    [
        lambda cookies: cookies["N"].__setitem__("path", "/other"),
        lambda cookies: cookies["N"].__setitem__("secure", True),
        lambda cookies: cookies["N"].__setitem__("max-age", ""),
        lambda cookies: cookies["N"].update({"samesite": "Strict", "domain": "a.org"}),
        lambda cookies: cookies["N"].setdefault("comment", "x"),
        lambda cookies: cookies["N"].pop("path"),
        lambda cookies: cookies["N"].clear(),
        lambda cookies: cookies["N"].set("N", "y", '"y"'),
        lambda cookies: cookies["N"].set("M", "x", "x"),
        lambda cookies: cookies.__setitem__("N", "y"),
        lambda cookies: cookies.__delitem__("N"),
        lambda cookies: cookies.load('N=z; Path="/z"'),
        lambda cookies: cookies.load(cookies.output(header="")),
        lambda cookies: cookies.update(copy.deepcopy(cookies)),
        lambda cookies: cookies.update(pickle.loads(pickle.dumps(cookies))),
        lambda cookies: cookies.__setitem__("N", cookies["N"].copy()),
        lambda cookies: cookies.__setitem__("N", copy.copy(cookies["N"])),
        lambda cookies: cookies["N"].copy().__setitem__("path", "/other"),
    ],
)
@pytest.mark.parametrize("value", ["x", "a b", ""])
def test_a_morsel_that_somebody_changes(change: Callable[[Any], object], value: str) -> None:
    storage = make(max_age=10)
    saved = outcome(
        lambda r: storage.save_cookie(r, value),
        lambda r: r.cookies["N"].OutputString(),
        lambda r: change(r.cookies),
    )
    assert saved == outcome(
        lambda r: by_aiohttp(r, "N", value, storage.cookie_params), lambda r: change(r.cookies)
    )
    # Another response is not touched by it.
    assert outcome(lambda r: storage.save_cookie(r, value)) == outcome(
        lambda r: by_aiohttp(r, "N", value, storage.cookie_params)
    )


def test_it_is_a_morsel_like_any_other() -> None:
    storage = make(max_age=10)
    storage.save_cookie(ours := web.Response(), 'a"b', max_age=10)
    theirs = web.Response()
    by_aiohttp(theirs, "N", 'a"b', storage.cookie_params, 10)
    our, their = ours.cookies["N"], theirs.cookies["N"]
    assert isinstance(our, Morsel)
    assert our == their
    assert their == our
    assert (our.key, our.value, our.coded_value) == (their.key, their.value, their.coded_value)
    assert dict(our) == dict(their)
    assert our.output() == str(our) == their.output()
    assert our.output(["path"], "X") == their.output(["path"], "X")
    assert our.output(header="") == their.output(header="")
    assert our.js_output() == their.js_output()
    assert str(our) == str(their)
    assert our.OutputString(["path"]) == their.OutputString(["path"])
    assert our.OutputString([]) == their.OutputString([]) == 'N="a\\"b"'


# On the wire

PAIR = 'N="{\\"created\\":1700000000\\054\\"session\\":{\\"a\\":1}}"'


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: None, [f"{PAIR}; HttpOnly; Path=/"]),
        (
            lambda r: r.cookies["N"].update({"path": "/x", "samesite": "None"}),
            [f"{PAIR}; HttpOnly; Path=/x; SameSite=None"],
        ),
        (lambda r: r.cookies.pop("N"), []),
        (lambda r: r.cookies.clear(), []),
        (lambda r: r.set_cookie("N", "y", httponly=False), ["N=y; Path=/"]),
        (lambda r: r.del_cookie("N"), [f'N=""; expires={EPOCH}; Max-Age=0; Path=/']),
        (lambda r: r.set_cookie("a", "b"), [f"{PAIR}; HttpOnly; Path=/", "a=b; Path=/"]),
    ],
)
async def test_an_outer_middleware_may_change_the_cookie(
    change: Action, expected: list[str], aiohttp_client: AiohttpClient, clock: Clock
) -> None:
    @web.middleware
    async def outer(request: web.Request, handler: Any) -> web.StreamResponse:
        response = await handler(request)
        assert response.cookies["N"].value
        change(response)
        return response  # type: ignore[no-any-return]

    async def handler(request: web.Request) -> web.Response:
        (await get_session(request))["a"] = 1
        return web.Response()

    app = web.Application(middlewares=[outer])
    setup(app, make())
    app.router.add_get("/", handler)
    client = await aiohttp_client(app)
    response = await client.get("/")
    assert response.headers.getall("Set-Cookie", []) == expected


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize("value", ["", "plain", 'quo"ted; é', "x" * 100])
def test_without_a_known_morsel_the_lines_are_the_same(
    value: str, partitioned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params: dict[str, Any] = {
        "path": "/",
        "secure": True,
        "samesite": "Lax",
        "partitioned": partitioned,
    }
    lines, sizes = [], []
    for is_known in (True, False):
        monkeypatch.setattr("aiohttp_session._set_cookie._MORSEL_IS_KNOWN", is_known)
        response = web.Response()
        writer = CookieWriter()
        writer.write(response, "n", "first", params)
        sizes.append(writer.write(response, "n", value, params))
        (morsel,) = response.cookies.values()
        lines.append(sorted(morsel.OutputString().split("; ")))
    assert lines[0] == lines[1]
    assert sizes[0] == sizes[1]
