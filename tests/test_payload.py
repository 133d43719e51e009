"""The JSON codec: what it reads and writes is what the standard json would."""

from __future__ import annotations

import enum
import json
import string
import uuid
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timezone
from decimal import Decimal
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiohttp_session._core import decode, dumps, encode

TEXTS = settings(settings.get_profile("texts"))


class Text(str):
    __slots__ = ()


class Color(str, enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Float(float):
    def __repr__(self) -> str:
        return "not a number"


class Dict(dict):  # type: ignore[type-arg]
    pass


class List(list):  # type: ignore[type-arg]
    pass


Pair = namedtuple("Pair", "a b")  # noqa: PYI024


@dataclass
class Point:
    x: int = 1


def by_json(value: Any) -> tuple[str, Any]:
    """Return what a value is after a save and a load by the standard json, or how it is refused."""
    try:
        return "value", repr(json.loads(json.dumps(value, separators=(",", ":"))))
    except (TypeError, ValueError, RecursionError) as error:
        return "error", type(error)


def by_codec(
    value: Any, write: Callable[[Any], Any] = encode, read: Callable[[Any], Any] = decode
) -> tuple[str, Any]:
    try:
        return "value", repr(read(write(value)))
    except (TypeError, ValueError, RecursionError) as error:
        return "error", type(error)


_circle: list[Any] = []
_circle.append(_circle)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -0.0, 1.5, 1e16, 1e-7, 5e-324, 1.7976931348623157e308, "", "\x00\x1f\x7f"),
        *(float("nan"), float("inf"), -float("inf"), [float("nan")], {"a": float("inf")}),
        *(2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**400),
        *("\xe4\u20ac\U0001f600", "\ud800", "\udc80x", "\u2028", {"\ud800": 1}, {"\xe4": 1}),
        *({1: 2}, {None: 1}, {True: 1}, {False: 1}, {1.5: 1}, {float("nan"): 1}, {2**70: 1}),
        *({"1": 1, 1: 2}, {(1,): 1}, {b"a": 1}, {Text("a"): 1}, {Color.RED: 1}, {Number.ONE: 1}),
        *({uuid.UUID(int=1): 1}, {datetime(2026, 1, 1): 1}),  # noqa: DTZ001
        *((1, 2), Pair(1, "x"), [Pair(1, [2])], ((),), List([1]), Dict(a=1), OrderedDict(a=1)),
        *(defaultdict(int, a=1), MappingProxyType({"a": 1}), SimpleNamespace(a=1)),
        *(Text("a"), Color.RED, Number.ONE, Float(1.5), [Text("a"), Number.ONE]),
        *(datetime(2026, 1, 1, tzinfo=timezone.utc), date(2026, 1, 1), uuid.UUID(int=1), Point()),
        *(Decimal(1), b"x", bytearray(b"x"), {1}, frozenset(), 1j, object(), len, range(3), ...),
        *({"a": [1, {"b": Point()}]}, _circle, {"a": _circle}, {}, [], [[]], {"": {}}),
        {"a": [1] * 5000},
    ],
)
def test_a_value_becomes_what_json_makes_of_it_or_is_refused_as_by_json(value: Any) -> None:
    expected = by_json(value)
    assert by_codec(value) == expected
    assert by_codec(value, dumps) == expected
    assert by_codec(value, dumps, json.loads) == expected
    assert by_codec(value, encode, json.loads) == expected
    assert by_codec({"a": [value]}) == by_json({"a": [value]})
    assert by_codec({"a": value, "n": 10**30}) == by_json({"a": value, "n": 10**30})


_keys = (
    st.text(st.characters(exclude_categories=()), max_size=4)
    | st.integers()
    | st.floats()
    | st.none()
    | st.booleans()
    | st.sampled_from([Text("k"), Color.RED, Number.ONE, (1,), b"k"])
)
_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=6)
    | st.sampled_from([Text("t"), Color.RED, Number.ONE, Point(), b"x", date(2026, 1, 1)])
)
_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=4),
    max_leaves=10,
)
_odd = st.recursive(
    _scalars,
    lambda v: st.lists(v, max_size=3) | st.tuples(v, v) | st.dictionaries(_keys, v, max_size=3),
    max_leaves=10,
)


@given(_plain)
def test_any_json_value(value: Any) -> None:
    assert by_codec(value) == by_json(value)
    assert by_codec(value, dumps, json.loads) == by_json(value)


@given(_odd)
def test_any_value(value: Any) -> None:
    assert by_codec(value) == by_json(value)
    assert by_codec(value, dumps, json.loads) == by_json(value)


@TEXTS
@given(st.floats())
def test_any_float(value: float) -> None:
    assert by_codec([value]) == by_json([value])


@TEXTS
@given(st.integers(-(2**70), 2**70))
def test_any_integer(value: int) -> None:
    assert decode(encode([value])) == [value]
    assert decode(f" [{value} ]") == [value]


@TEXTS
@given(st.text(st.characters(exclude_categories=())))
def test_any_text(value: str) -> None:
    assert decode(encode({value: value})) == {value: value}
    assert decode(dumps({value: value})) == {value: value}
    assert dumps({value: value}) == json.dumps({value: value}, separators=(",", ":"))


def test_a_cookie_text_has_no_control_character() -> None:
    # Newer versions of http.cookies refuse one, even when it is escaped.
    assert dumps({"a": "\x1f\x7f"}) == '{"a":"\\u001f\\u007f"}'
    assert dumps({"a": "\x7f\x80"}) == '{"a":"\\u007f\\u0080"}'


def test_what_is_written_is_compact() -> None:
    data = {"created": 1, "session": {"a": [1, 2.5, None, True, "x"]}}
    text = '{"created":1,"session":{"a":[1,2.5,null,true,"x"]}}'
    assert encode(data) == text.encode()
    assert dumps(data) == text
    assert dumps({"a": "\xe4\U0001f600"}) == '{"a":"\\u00e4\\ud83d\\ude00"}'
    assert encode({"a": "\xe4"}) == '{"a":"\xe4"}'.encode()


# Reading


def read_by_json(text: str | bytes) -> tuple[str, Any]:
    try:
        return "value", repr(json.loads(text if isinstance(text, str) else text.decode("utf-8")))
    except ValueError:
        return "error", ValueError


def read_by_codec(text: str | bytes) -> tuple[str, Any]:
    try:
        return "value", repr(decode(text))
    except ValueError:
        return "error", ValueError


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "nul", "null", " null\t\r\n", "tru", "1", "-0", "-0.0", "+1", "01", "1.", ".5"),
        *(
            "1e5",
            "1E+05",
            "1e-400",
            "1E400",
            "-1e400",
            "NaN",
            "Infinity",
            "-Infinity",
            "-NaN",
            "inf",
        ),
        *(
            "9223372036854775808",
            "18446744073709551615",
            "18446744073709551616",
            "1" * 60,
            "-" + "9" * 19,
        ),
        *("123456789012345678901234567890.5", "0." + "1" * 60, "1" * 400, "1" * 5000, "[1e99999]"),
        *('"a"', '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\ud800"', '"\\u00e4\xe4"'),
        *('"\x00"', '"\t"', '"\x7f"', '"\\x"', '"\\u12"', '"\\/\\b\\f"', '"', "'a'", '"a" "b"'),
        *(
            "{}",
            '{"a":1,"a":2}',
            '{"a":1,}',
            "{a:1}",
            "{1:2}",
            '{"a"}',
            '{"a":1',
            "[1,]",
            "[1 2]",
            "[]x",
        ),
        *("\ufeff{}", "\x00", "{}\x00", "// c\n{}", "\xa0{}", '{"1111111111111111111111":1}'),
        *(
            '{"\\ud800": NaN, "b": 99999999999999999999}',
            "[0000000000000000000000]",
            "0x10",
            "1_000",
        ),
    ],
)
def test_a_text_is_read_as_json_reads_it(text: str) -> None:
    expected = read_by_json(text)
    assert read_by_codec(text) == expected
    encoded = text.encode("utf-8", "surrogatepass")
    assert read_by_codec(encoded) == read_by_json(encoded)


@pytest.mark.parametrize(
    "text",
    [
        *(b"\xff", b'"\xff"', b'"\xc3"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"'),
        *(b"\xef\xbb\xbf{}", '"a"'.encode("utf-16"), '"a"'.encode("utf-32"), b"{}\xff", b"1\x00"),
        *(b'"' + "\xe4".encode() + b'"', b'["\xe4", 99999999999999999999999]', b"\x80" * 100),
    ],
)
def test_bytes_are_utf_8(text: bytes) -> None:
    assert read_by_codec(text) == read_by_json(text)


_fragments = (
    *(
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"',
        '"a"',
        '"a":',
        "1",
        "-",
        "0",
        ".",
        "e",
        "E+",
        "null",
        "true",
    ),
    *(
        " ",
        "\n",
        "\\",
        "\\u",
        "d800",
        "\\ud800",
        "NaN",
        "Infinity",
        "9" * 19,
        "1" * 20,
        "\xe4",
        "\x00",
    ),
    *("[1,", '{"a":', "]}", "1.5e3", "\ud800", "\ufeff", "\x1f", '"\\n"', "{}", "[]"),
)


@TEXTS
@given(st.lists(st.sampled_from(_fragments), max_size=8).map("".join))
def test_texts_that_look_like_json(text: str) -> None:
    assert read_by_codec(text) == read_by_json(text)
    encoded = text.encode("utf-8", "surrogatepass")
    assert read_by_codec(encoded) == read_by_json(encoded)


@TEXTS
@given(st.binary(max_size=12))
@example(b'"\xf0\x9f\x98\x80"')
def test_any_bytes(text: bytes) -> None:
    assert read_by_codec(text) == read_by_json(text)
    assert read_by_codec(b'"' + text + b'"') == read_by_json(b'"' + text + b'"')


@given(_plain, st.integers(0, 200), st.sampled_from(string.printable + "\xe4\ud800"))
def test_json_with_one_character_replaced(value: Any, position: int, character: str) -> None:
    text = json.dumps(value)
    position %= len(text)
    text = text[:position] + character + text[position + 1 :]
    assert read_by_codec(text) == read_by_json(text)


@given(_plain, st.sampled_from([None, 1, "\t"]), st.booleans())
def test_json_however_it_is_laid_out(value: Any, indent: Any, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert repr(decode(text)) == repr(json.loads(text))
    assert repr(decode(text.encode())) == repr(json.loads(text))


@pytest.mark.parametrize("kind", ["[", '{"a":'])
def test_what_is_too_deep_is_refused(kind: str) -> None:
    for text in (kind * 100_000, kind * 100_000 + "1" + ("]" if kind == "[" else "}") * 100_000):
        with pytest.raises((ValueError, RecursionError)):
            decode(text)
        with pytest.raises((ValueError, RecursionError)):
            decode(text.encode())


@pytest.mark.parametrize("depth", [10, 200])
def test_deep_values_are_written(depth: int) -> None:
    value: Any = "\xe4"
    for _ in range(depth):
        value = {"a": [value]}
    assert decode(encode(value)) == value
    assert decode(dumps(value)) == value


def test_a_value_that_is_too_deep_is_refused_as_by_json() -> None:
    value: Any = 1
    for _ in range(100_000):
        value = [value]
    with pytest.raises(RecursionError):
        encode(value)
    while value != 1:  # or its end would be too deep as well
        value = value[0]


# What json refuses


@pytest.mark.parametrize(
    ("session", "message"),
    [
        (
            {"cart": [1, 2, {"when": datetime(2026, 1, 1, tzinfo=timezone.utc)}]},
            "session['cart'][2]['when']: datetime is not JSON serializable",
        ),
        ({"a": {1, 2}}, "session['a']: set is not JSON serializable"),
        ({"a": Point()}, "session['a']: Point is not JSON serializable"),
        ({"a": b"secret"}, "session['a']: bytes is not JSON serializable"),
        ({"a": [[], ({}, uuid.UUID(int=1))]}, "session['a'][1][1]: UUID is not JSON serializable"),
        ({"a": 1, "b": {"c": {(1, 2): 3}}}, "session['b']['c']: tuple is not a JSON object key"),
        ({b"k": 1}, "session: bytes is not a JSON object key"),
        ({1: Decimal(1)}, "session[1]: Decimal is not JSON serializable"),
        ({"a": 10**30, "b": object}, "session['b']: type is not JSON serializable"),
    ],
)
@pytest.mark.parametrize("write", [encode, dumps])
def test_a_refused_value_is_named_by_its_path(
    session: Any, message: str, write: Callable[[Any], Any]
) -> None:
    with pytest.raises(TypeError) as caught:
        write({"created": 1, "session": session})
    assert str(caught.value) == message


@pytest.mark.parametrize("write", [encode, dumps])
def test_a_circle_is_named_by_its_path(write: Callable[[Any], Any]) -> None:
    cart: dict[str, Any] = {"items": []}
    cart["items"].append(cart)
    with pytest.raises(ValueError) as caught:
        write({"created": 1, "session": {"cart": cart}})
    assert str(caught.value) == "session['cart']['items'][0]: circular reference"


def test_a_value_that_occurs_twice_is_no_circle() -> None:
    shared: list[int] = [1]
    assert decode(encode({"a": shared, "b": [shared, shared]})) == {"a": [1], "b": [[1], [1]]}
    with pytest.raises(TypeError, match=r"^session\['c'\]: set is not"):
        encode({"session": {"a": shared, "b": [shared, shared], "c": {1}}})


def test_an_integer_of_too_many_digits_is_refused_as_by_json() -> None:
    assert by_codec([10**5000]) == by_json([10**5000]) == ("error", ValueError)


def test_a_refused_value_does_not_show_in_the_message() -> None:
    with pytest.raises(TypeError) as caught:
        encode({"session": {"password": b"swordfish"}})
    assert "swordfish" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
