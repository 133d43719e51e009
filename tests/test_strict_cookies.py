"""Cookies that a sibling host can't plant: the header is read as browsers write it."""

from __future__ import annotations

from http.cookies import SimpleCookie
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from aiohttp_session import SimpleCookieStorage, storage
from aiohttp_session._core import find_strict
from tests.contract import make_request

TEXTS = settings(settings.get_profile("texts"))
HOST = "__Host-session"
PREFIXED = [HOST, "__Secure-session", "__host-session", "__Http-s", "__Host-Http-s", "__SECURE-s"]


def load(header: str, name: str = HOST, **options: Any) -> str | None:
    return SimpleCookieStorage(cookie_name=name, **options).load_cookie(make_request(header))


PLANTS = [
    *(f"x=y{blank}{{name}}=EVIL" for blank in " \t\u2000\xa0\x85\u3000\x1c\x0b\x0c"),
    *(f"x{blank}{{name}}=EVIL" for blank in " \t\u2000"),
    'x="y" {name}=EVIL',
    'x="y"{name}=EVIL',
    "x= {name}=EVIL",
    "x = y {name} = EVIL",
    "x=y,{name}=EVIL",
    "={name}=EVIL",
    "{name}",
    "x={name}=EVIL",
    *(f"{blank}{{name}}=EVIL" for blank in "\u2000\xa0\x85\x1c"),
    "{name}\u2000=EVIL",
]


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("name", PREFIXED)
@pytest.mark.parametrize("known", [True, False])
def test_a_planted_cookie_is_not_seen(
    plant: str, name: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PARSER_IS_KNOWN", known)
    plant = plant.format(name=name)
    # As aiohttp hands them on: bytes that are no UTF-8 come as surrogates.
    for text in (plant, plant.encode("latin-1", "replace").decode("utf-8", "surrogateescape")):
        assert load(text, name) is None
        assert load(f"{name}=good; {text}", name) == "good"
        assert load(f"{text}; {name}=good", name) == "good"


@pytest.mark.parametrize("plant", PLANTS)
def test_strict_cookies_are_so_for_any_name(plant: str) -> None:
    text = plant.format(name="N")
    assert load(text, "N", strict_cookies=True) is None
    assert load(f"{text}; N=good", "N", strict_cookies=True) == "good"


def test_ordinary_names_are_read_as_aiohttp_reads_them() -> None:
    for name in ("N", "__N", "__Hosts", "_Host-N"):
        request = make_request(f"x=y {name}=1; {name}=2; z=w {name}=3")
        found = SimpleCookieStorage(cookie_name=name).load_cookie(request)
        assert found == request.cookies.get(name)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("", None),
        ("N", None),
        ("N=", ""),
        ("N=x", "x"),
        (" \tN \t= \tx y\t ", "x y"),
        ("a=b;N=x;c=d", "x"),
        (";;N=x;;", "x"),
        ("NN=1; xN=2; Nx=3; n=4", None),
        ("a=N=x; =N=y; N", None),
        ("N==x=", "=x="),
        ('N="gAAA=="; a', "gAAA=="),
        (r'N="a\"b\\c\054\073\351\012\x"', 'a"b\\c,;\xe9\nx'),
        ('N="', '"'),
        ('N=""', ""),
        ('N="a', '"a'),
        ('N=a"', 'a"'),
        ('N="a\\"', "a\\"),
        ('N="a; b"', '"a'),
        ('a="x; N=y', "y"),
        ("\xe4=1; N=\u20ac\udc80", "\u20ac\udc80"),
        ("N=x\u2000", "x\u2000"),
    ],
)
def test_what_it_reads(header: str, value: str | None) -> None:
    assert find_strict(header, "N") == value


@pytest.mark.parametrize("header", ["N=x; N=y", "N=x; N=x", "N=; a=b;N =", "N=\xe4; N=y"])
def test_of_two_of_a_name_none_counts(header: str, caplog: pytest.LogCaptureFixture) -> None:
    assert find_strict(header, "N") is False
    strict = SimpleCookieStorage(cookie_name="N", strict_cookies=True)
    for _ in range(3):
        assert strict.load_cookie(make_request(header)) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "several cookies" in caplog.text


def test_without_a_header_there_is_no_cookie() -> None:
    assert SimpleCookieStorage(cookie_name=HOST).load_cookie(make_request()) is None


@TEXTS
@given(st.text(st.characters(max_codepoint=0xFF), max_size=30))
def test_what_a_storage_writes_is_read(value: str) -> None:
    response = web.Response()
    coded = SimpleCookie().value_encode(value)[1]
    assert find_strict(f"a=b; N={coded}; c=d", "N") == value
    if value and value.isascii() and value.isprintable():
        SimpleCookieStorage(cookie_name="N").save_cookie(response, value)
        assert find_strict(f"N={response.cookies['N'].coded_value}", "N") == value


@TEXTS
@given(st.lists(st.text('aN=" \t\\\u2000\xe4', max_size=6), max_size=5))
def test_it_reads_as_the_standard_says(pairs: list[str]) -> None:
    named = [pair.split("=", 1) for pair in pairs if "=" in pair]
    values = [value.strip(" \t") for name, value in named if name.strip(" \t") == "N"]
    found = find_strict(";".join(pairs), "N")
    if len(values) != 1:
        assert found is (False if values else None)
    elif '"' not in values[0]:
        assert found == values[0]


def test_an_override_of_load_cookie_is_reached() -> None:
    class FromQuery(SimpleCookieStorage):
        def load_cookie(self, request: web.Request) -> str | None:
            return "from the override " + str(super().load_cookie(request))

    found = FromQuery(cookie_name=HOST).load_cookie(make_request(f"{HOST}=x"))
    assert found == "from the override x"


def test_a_name_that_is_given_later_is_read_by_its_prefix() -> None:
    storage = SimpleCookieStorage()
    request = make_request(f"x=y {HOST}=EVIL; AIOHTTP_SESSION=1; AIOHTTP_SESSION=2")
    assert storage.load_cookie(request) == "2"
    storage._cookie_name = HOST
    assert storage.load_cookie(request) is None
