"""Inputs that fuzzing found to be read in two ways, and others of their kind."""

from __future__ import annotations

import json

import pytest

from aiohttp_session import storage
from aiohttp_session._core import decode, find_cookie


@pytest.mark.skipif(not storage._PARSER_IS_KNOWN, reason="aiohttp has another parser here")
@pytest.mark.parametrize(
    "header",
    [
        'N=; N=; ; N=="x"; ',  # aiohttp 3.13.2 takes N= for the name
        'N=a="x"',
        'N=1; =N="x"',
        "= N=x",
        "; ;N=1;;",
        'a="x"y; N=1',
        'a="b c"d; N=1',
        'a= "x"y; N=1',
        "N=Wed, 01-Jan-2020 00:00:00 GMT",
        "N=Wed Jun  9 10:18:14 2021",
        "a=Mon N=x",
        'a={"b": "1; N=2"}; N=3',
        'N={"b":1, "c":2} ; a=1',
        '2 "}; N=1',
        'N="\\"; N=2"',
        'N="\\',
        r'N="\054\303\"\\1"',
        "N=\\054",
        "a=1; N",
        "N = 1; N =",
    ],
)
def test_cookies(header: str) -> None:
    from aiohttp._cookie_helpers import parse_cookie_header  # since 3.12

    found = find_cookie(header, "N")
    if found is not False:
        assert found == {name: m.value for name, m in parse_cookie_header(header)}.get("N")


@pytest.mark.parametrize("header", [r'N="\001"', r'N="a\177"', "N=\x01", "N=\x00", "N=1; a=\x7f"])
def test_control_characters_are_left_to_aiohttp(header: str) -> None:
    assert find_cookie(header, "N") is False


@pytest.mark.parametrize(
    "text",
    [
        *("-0", "-0.0", "1E400", "1e-400", "NaN", "-Infinity", '"\\ud800"', '"\ud800"', "9" * 40),
        *("18446744073709551615", "18446744073709551616", "-9223372036854775809", '"' + "1" * 30),
        *("9" * 18, "9" * 19, "0." + "1" * 30, '{"a":1,"b":2,"a":3}', " \t\r\n[] ", "\u00a0[]"),
        *("", " ", "\ufeff{}", "[1,]", "01", "+1", "[" * 5000, '"\x00"', '"\t"', "tru", "{} {}"),
    ],
)
def test_texts(text: str) -> None:
    try:
        expected = repr(json.loads(text))
    except (ValueError, RecursionError) as error:
        with pytest.raises(type(error)):
            decode(text)
    else:
        assert repr(decode(text)) == expected
