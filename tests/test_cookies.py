"""Cookies in: `load_cookie` finds what aiohttp's ``request.cookies`` holds."""

from __future__ import annotations

import asyncio
from http.cookies import CookieError, Morsel, SimpleCookie
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from aiohttp_session import SimpleCookieStorage, storage
from aiohttp_session._core import find_cookie, quote
from tests.contract import make_request

needs_the_parser = pytest.mark.skipif(
    not storage._PARSER_IS_KNOWN, reason="aiohttp before 3.13.3 has another parser"
)
TEXTS = settings(settings.get_profile("texts"))

_storages: dict[str, SimpleCookieStorage] = {}


def look_up(header: str, name: str = "N") -> tuple[str | None, str | None]:
    """Look for a cookie as the storage does, and as aiohttp does."""
    request = make_request(header)
    if name not in _storages:
        _storages[name] = SimpleCookieStorage()
        _storages[name]._cookie_name = name  # of any shape
    found = _storages[name].load_cookie(request)
    try:
        return found, request.cookies.get(name)
    except CookieError:  # aiohttp before 3.12
        return found, None


@needs_the_parser
@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("", None),
        ("N=x", "x"),
        ("N=", ""),
        ("N", ""),
        ("N;", ""),
        ("a=b; N=x; c=d", "x"),
        ("a=b;N=x;c=d", "x"),
        ("N=x; N=y", "y"),
        ("N=x; N", ""),
        ("NN=1; xN=2; N=3; Nx=4", "3"),
        ("NN=1; xN=2; Nx=4", None),
        ("n=1", None),
        ("a=N; b=N=x", None),
        ("a=N", None),
        ("a=b c=d N=x", "x"),
        ("foo= N=x", None),
        ("foo=a= N=x", "x"),
        ("N = x", "x"),
        ("N= x; a=b", "x"),
        ("a=b;; N=x", "x"),
        (" N=x", "x"),
        ("N=x ", "x"),
        ('a="x; N=evil"', None),
        ('a="x; N=evil; N=x', "x"),
        ('N="unmatched; a=b', '"unmatched'),
        ('N="x; y"', "x; y"),
        ('N="a\\"b\\\\c\\054\\351\\x"', 'a"b\\c,\xe9x'),
        ('N="gAAA=="', "gAAA=="),
        ("N=gAAA==", "gAAA=="),
        ('N=""', ""),
        ('N="', '"'),
        ('N=x"y', None),
        ('N="a"b"', None),
        ('N={"json":1}', '{"json":1}'),
        ("N=\xe4\u20ac\udc80", "\xe4\u20ac\udc80"),
        ("\xe4=1; N=x", "x"),
        ("a,b=1; N=x", "x"),
        ('a"b=1; N=x', "x"),
        ("$Version=1; path=/; secure; N=x", "x"),
        ("expires=Wed, 09 Jun 2021 10:18:14 GMT; N=x", "x"),
        ("N=Wed, 09 Jun 2021 10:18:14 GMT; a=b", "Wed, 09 Jun 2021 10:18:14 GMT"),
        ("N=x\ta=b", "x"),
        ("=x; N=y", "y"),
        ("=; =; N=y", "y"),
        ("N==x", "=x"),
        ("N[]=1; N=2", "2"),
    ],
)
def test_what_it_finds(header: str, value: str | None) -> None:
    found, expected = look_up(header)
    assert found == expected
    if value is not None or '"' not in header:
        assert found == value


@pytest.mark.parametrize("name", ["$Version", "path", "secure", "expires", "a.b", "a[b]", "__N"])
def test_names_that_mean_something_elsewhere_are_ordinary(name: str) -> None:
    found, expected = look_up(f"a=1; {name}=x; b=2", name)
    assert found == expected
    if storage._PARSER_IS_KNOWN:
        assert found == "x"


def test_without_a_header_there_is_no_cookie() -> None:
    assert SimpleCookieStorage(cookie_name="N").load_cookie(make_request()) is None


def test_only_the_first_header_counts() -> None:
    request = make_request()
    request._headers = CIMultiDictProxy(CIMultiDict([("Cookie", "a=b; N=1"), ("Cookie", "N=2")]))
    assert SimpleCookieStorage(cookie_name="N").load_cookie(request) == request.cookies["N"] == "1"


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("N=x", "x"),
        ("N=x; a=b", "x"),
        ("a=b; N=x", "x"),
        ("a=b;N=x;c", "x"),
        ("_ga=GA1.2.1-3:4/5; N=x.y_z-~; theme=dark", "x.y_z-~"),
        ('N="gAAA=="; a=b', "gAAA=="),
        ('a="1"; N=x', "x"),
        ("a=b", None),
        ("a=b; c=d; e", None),
    ],
)
def test_what_browsers_send_takes_the_fast_path(header: str, value: str | None) -> None:
    assert find_cookie(header, "N") == value


_NAMES = (
    *(
        "N",
        "NN",
        "xN",
        "Nx",
        "n",
        "a",
        "foo",
        "$Version",
        "path",
        "secure",
        "expires",
        "a,b",
        "a[b]",
    ),
    *('q"', "\xe4", "a\\", "a/N", "$N", "-N", "N-", "a{", "\x7f"),
)
_VALUES = (
    *(
        "x",
        "N=x",
        "a.b_c-~",
        "gA==",
        '"gA=="',
        '"x; N=evil"',
        '"N=x"',
        '"',
        '""',
        '"""',
        "\\",
        '"\\',
    ),
    *('"\\"', '"\\054"', '"\\5"', '"\\400"', '"a\\', '"a"b', 'a"b"', '{"json":1}', '{"a": "\xe4"}'),
    *(
        "Wed, 09 Jun 2021 10:18:14 GMT",
        "Wed Jun  9 10:18:14 2021",
        "Wednesday, 09-Jun-21 10:18:14 GMT",
    ),
    *("Wed, x", "\u20ac", "\udc80", "\U0001f600", "\x80", "\x00", "\x1f"),
)
_SEPARATORS = ("; ", ";", " ", "  ", ";;", " ;", "; ;", "\t", ",", "=", " = ", "= ", " =", "==")
_fragments = (
    *("N=", "; N=", "; N", "; a=b", "a=b; ") * 3,
    *("; ", "=") * 6,
    *_NAMES,
    *_VALUES,
    *_SEPARATORS,
)
_headers = st.lists(st.sampled_from(_fragments), max_size=12).map("".join)
_PLAIN_VALUES = ("", "=", "=x", "=N", "=N=x", "=a=b", '="a b"', '="gA=="', '="N=x; N=y"')
_plain_pairs = [name + value for name in ("N", "NN", "a", "xN", "path") for value in _PLAIN_VALUES]
_plain_headers = st.lists(st.sampled_from(_plain_pairs), max_size=6).map("; ".join)


@TEXTS
@given(_headers)
def test_headers_of_all_shapes(header: str) -> None:
    found, expected = look_up(header)
    assert found == expected


@TEXTS
@given(_plain_headers)
def test_plain_headers(header: str) -> None:
    found, expected = look_up(header)
    assert found == expected


@TEXTS
@given(_plain_headers, st.integers(0, 60), st.text('N=;" \\\t,x0\xe4\x00', max_size=2))
def test_plain_headers_with_something_inserted(header: str, position: int, extra: str) -> None:
    found, expected = look_up(header[:position] + extra + header[position:])
    assert found == expected


@TEXTS
@given(st.text('N=; "\\a,\t0\xe4\udc80', max_size=14))
def test_headers_of_few_characters(header: str) -> None:
    found, expected = look_up(header)
    assert found == expected


@TEXTS
@given(st.binary(max_size=30))
def test_headers_of_any_bytes(header: bytes) -> None:
    found, expected = look_up("N=" + header.decode("utf-8", "surrogateescape"))
    assert found == expected


@TEXTS
@given(st.text('aN.$-[]"=; ,\xe4\\', min_size=1, max_size=4), _headers)
def test_names_of_all_shapes(name: str, header: str) -> None:
    found, expected = look_up(f"{header}; {name}=x", name)
    assert found == expected


@TEXTS
@given(
    st.text(max_size=30)
    | st.text(st.characters(min_codepoint=30, max_codepoint=128), max_size=30)
    | st.binary(max_size=30).map(lambda value: value.decode("latin-1"))
)
def test_quote_writes_values_as_http_cookies_does(value: str) -> None:
    if value.isascii() and value.isprintable():
        assert quote(value) == SimpleCookie().value_encode(value)[1]
    else:
        assert quote(value) is None


@TEXTS
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=30))
def test_what_quote_writes_is_found(value: str) -> None:
    found, expected = look_up(f"a=b; N={quote(value)}; c=d")
    assert found == expected
    if storage._PARSER_IS_KNOWN:
        assert found == value


@needs_the_parser
@pytest.mark.parametrize("value", ['"\\012"', '"a\\177"', '"\\000"', "\x01", '"\\040"', '"\\240"'])
def test_control_characters_on_a_python_whose_morsels_refuse_them(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Morsel.__setstate__  # type: ignore[attr-defined]

    def strict(self: Morsel[str], state: dict[str, Any]) -> None:
        if any(ord(c) < 32 or ord(c) == 127 for text in state.values() for c in text):
            raise CookieError("Control characters are not allowed in cookies")
        original(self, state)

    monkeypatch.setattr(Morsel, "__setstate__", strict)
    found, expected = look_up(f"a=b; N={value}; c=d")
    assert found == expected


@pytest.mark.parametrize("header", ["N=x", "a=b; N=x", "N", "a=b", "a b; N=x"])
def test_with_an_aiohttp_of_another_parser_its_cookies_are_taken(
    header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PARSER_IS_KNOWN", False)
    found, expected = look_up(header)
    assert found == expected


def test_a_foreign_cookie_that_an_old_aiohttp_chokes_on_is_no_cookie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cookies(request: web.Request) -> None:
        raise CookieError("Illegal key 'a b'")

    monkeypatch.setattr(storage, "_PARSER_IS_KNOWN", False)
    monkeypatch.setattr(web.BaseRequest, "cookies", property(cookies))
    assert SimpleCookieStorage(cookie_name="N").load_cookie(make_request("N=x")) is None


@pytest.mark.parametrize("byte", [0x01, 0x09, 0x1F, 0x20, 0x22, 0x5C, 0x7F, 0x80, 0xA0, 0xE4, 0xFF])
async def test_odd_bytes_over_the_wire(byte: int) -> None:
    looked_up = []

    async def handler(request: web.Request) -> web.Response:
        found = SimpleCookieStorage(cookie_name="N").load_cookie(request)
        looked_up.append((found, request.cookies.get("N")))
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handler)
    odd = bytes([byte])
    async with TestServer(app) as server:
        for cookie in (
            b"N=a%cb; x=y" % odd,
            b"x=%c; N=a" % odd,
            b'N="%c"; x' % odd,
            b"%cN=a" % odd,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET / HTTP/1.0\r\nCookie: %s\r\n\r\n" % cookie)
            status = await reader.readline()
            writer.close()
            await writer.wait_closed()
            assert status.split()[1] in {b"200", b"400"}
    for found, expected in looked_up:
        assert found == expected
    assert looked_up or byte in {0x01, 0x1F, 0x7F}
