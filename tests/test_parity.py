"""The compiled twins do what the pure ones do, to the letter."""

from __future__ import annotations

import asyncio
import collections
import copy
import enum
import inspect
import itertools
import json
import math
import os
import pickle
import sys
from collections.abc import Callable, Mapping, MutableMapping
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if os.environ.get("AIOHTTP_SESSION_NO_EXTENSIONS"):
    pytest.skip("the compiled twins are not wanted", allow_module_level=True)

from aiohttp_session import (
    _cookies_c,
    _cookies_py,
    _futures_c,
    _futures_py,
    _payload_c,
    _payload_py,
    _records_c,
    _records_py,
    _replies_c,
    _replies_py,
    _sealing_c,
    _sealing_py,
    _session_c,
    _session_py,
    storage,
)

pytestmark = pytest.mark.once
TEXTS = settings(settings.get_profile("texts"))
NOW = 1_700_000_000
MODULES: list[tuple[Any, Any]] = [
    (_cookies_c, _cookies_py),
    (_futures_c, _futures_py),
    (_payload_c, _payload_py),
    (_records_c, _records_py),
    (_replies_c, _replies_py),
    (_sealing_c, _sealing_py),
    (_session_c, _session_py),
]
CLASSES: tuple[Any, Any] = (_session_c.Session, _session_py.Session)


def outcome(function: Callable[..., Any], *arguments: Any) -> tuple[str, object]:
    """Tell what a call returns, with its type, or what it raises."""
    try:
        result = function(*arguments)
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, str(error)
    return type(result).__name__, repr(result)


def plainly(outcome: tuple[str, object]) -> tuple[str, object]:
    """Drop the module from the class's name, which CPython tells of extension types."""
    kind, text = outcome
    return kind, str(text).replace("'aiohttp_session.Session'", "'Session'")


def same(compiled: ModuleType, pure: ModuleType, name: str, *arguments: Any) -> None:
    """Check that both twins do the same."""
    expected = outcome(getattr(pure, name), *arguments)
    assert outcome(getattr(compiled, name), *arguments) == expected


# Names, signatures, docstrings


def parameters(function: Any) -> list[tuple[str, object]]:
    """List the parameters of a function or a method; of kinds, only what a caller may do."""
    found = inspect.signature(function).parameters.values()
    return [(str(p).partition(":")[0].partition("=")[0], p.default) for p in found]


@pytest.mark.parametrize(("compiled", "pure"), MODULES)
def test_modules_have_the_same_functions(compiled: ModuleType, pure: ModuleType) -> None:
    for name, function in vars(pure).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            if function.__module__ != pure.__name__:
                continue
            twin = getattr(compiled, name)
            assert parameters(twin) == parameters(function)
            assert inspect.getdoc(twin) == inspect.getdoc(function)


def test_sessions_have_the_same_attributes() -> None:
    compiled, pure = CLASSES
    assert inspect.signature(compiled) == inspect.signature(pure)
    assert (compiled.__module__, compiled.__qualname__) == ("aiohttp_session", "Session")
    assert (pure.__module__, pure.__qualname__) == ("aiohttp_session", "Session")
    assert inspect.getdoc(compiled) == inspect.getdoc(pure)
    for name in dir(pure):
        if name.startswith(("__", "_abc_")):
            continue
        ours, theirs = inspect.getattr_static(compiled, name), inspect.getattr_static(pure, name)
        if inspect.isfunction(theirs):
            assert parameters(getattr(compiled([], data=None, new=True), name)) == parameters(
                getattr(pure([], data=None, new=True), name)
            )
        if name in vars(pure) and (inspect.isfunction(theirs) or isinstance(theirs, property)):
            assert inspect.cleandoc(ours.__doc__) == inspect.cleandoc(theirs.__doc__ or "")


# Cookies

COOKIE_TEXT = st.text(
    st.sampled_from('aN=; ",\\019$:%{}[]()<>/\tTé\x7f') | st.characters(max_codepoint=0x200)
)
COOKIE_PAIR = st.one_of(
    st.builds(
        "{}{}{}".format,
        st.sampled_from(["N", "a", "NN", "aN", "Na", "$Version", "path", "N,", "N[", "", " N"]),
        st.sampled_from(["=", "=", "=", " = ", "= ", " =", "", " ", "=="]),
        st.sampled_from(
            [
                "",
                "x",
                "abc",
                "N=x",
                '"x"',
                '"x; N=evil"',
                '"a\\"b"',
                '"\\054\\303\\"\\\\1"',
                "a b",
                '{"json":1, "b": "N=2"}',
                '"open',
                'x"y',
                "Mon, 01-Jan-2024 00:00:00 GMT",
                "Wed,",
                "Wed Jun  9 10:18:14 2021",
                '"\\001"',
                "\\x",
                '"x"y',
                'x"N=1',
                "x,y",
                "x y N=z",
                "é",
            ]
        )
        | COOKIE_TEXT,
    ),
    COOKIE_TEXT,
)
COOKIE_HEADERS = st.builds(
    "".join,
    st.lists(
        st.tuples(COOKIE_PAIR, st.sampled_from(["; ", "; ", ";", " ", ";;", ""])).map("".join)
    ),
)
COOKIE_NAMES = st.sampled_from(["N", "N", "N", "a", "NN", "path", "$Version"]) | COOKIE_TEXT


@TEXTS
@given(COOKIE_HEADERS, COOKIE_NAMES)
def test_find_cookie(header: str, name: str) -> None:
    same(_cookies_c, _cookies_py, "find_cookie", header, name)


@TEXTS
@given(
    COOKIE_HEADERS | st.text('N=;" \t\\07\n\xe4\u2000', max_size=14), COOKIE_NAMES | st.just("N ")
)
def test_find_strict(header: str, name: str) -> None:
    same(_cookies_c, _cookies_py, "find_strict", header, name)


@pytest.mark.skipif(not storage._PARSER_IS_KNOWN, reason="aiohttp has another parser here")
@TEXTS
@given(COOKIE_HEADERS, COOKIE_NAMES)
def test_find_cookie_finds_what_aiohttp_finds(header: str, name: str) -> None:
    from aiohttp._cookie_helpers import parse_cookie_header  # since 3.12

    found = _cookies_c.find_cookie(header, name)
    if found is not False:
        cookies = {key: morsel.value for key, morsel in parse_cookie_header(header)}
        assert found == cookies.get(name)


@pytest.mark.parametrize("character", [chr(code) for code in range(128)], ids=ascii)
def test_find_cookie_knows_each_character_wherever_it_stands(character: str) -> None:
    for position in range(20):
        value = f"{'x' * position}{character}{'x' * (20 - position)}"
        for header in (f"a=b; N={value}; c=d", f'a=b; N="{value}"; c=d'):
            same(_cookies_c, _cookies_py, "find_cookie", header, "N")


@pytest.mark.parametrize("character", [chr(code) for code in range(128)], ids=ascii)
def test_quote_knows_each_character_wherever_it_stands(character: str) -> None:
    for position in range(20):
        value = f"{'x' * position}{character}{'x' * (20 - position)}"
        same(_cookies_c, _cookies_py, "quote", value)
        same(_cookies_c, _cookies_py, "quote", value.replace("x", ","))


@pytest.mark.parametrize(
    "character", ["~", "\x7f", "\x80", "\xff", "\u20ac", "\U0001f600"], ids=ascii
)
def test_dumps_escapes_a_character_wherever_it_stands(character: str) -> None:
    for position in range(20):
        value = f"{'x' * position}{character}{'x' * (20 - position)}"
        same(_payload_c, _payload_py, "dumps", [value, character * 3])


@TEXTS
@given(st.text(st.characters(max_codepoint=0x1FF)) | st.text() | COOKIE_TEXT)
def test_quote(value: str) -> None:
    same(_cookies_c, _cookies_py, "quote", value)


class Text(str):
    """A str that is not one exactly."""

    __slots__ = ()


@TEXTS
@given(st.text(max_size=5), st.text() | st.text("aZ_:"), st.integers(-1, 9))
def test_join_token(prefix: str, text: str, limit: int) -> None:
    same(_cookies_c, _cookies_py, "join_token", prefix, text, limit)
    same(_cookies_c, _cookies_py, "join_token", prefix, Text(text), limit)


@pytest.mark.parametrize("header", [None, 1, b"N=1", Text("N=1"), Text("é")])
def test_cookies_of_other_types(header: Any) -> None:
    same(_cookies_c, _cookies_py, "find_cookie", header, "N")
    same(_cookies_c, _cookies_py, "find_cookie", "N=1", header)
    same(_cookies_c, _cookies_py, "find_strict", header, "N")
    same(_cookies_c, _cookies_py, "find_strict", "N=1", header)
    same(_cookies_c, _cookies_py, "quote", header)


class Odd(dict[Any, Any]):
    """A dict that equals nothing."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None


ITEMS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", 1]), st.sampled_from([None, 1, 1.0, True, math.nan, "1"])
    ),
    max_size=4,
)


@given(ITEMS, ITEMS, st.sampled_from([dict, Odd]), st.sampled_from([dict, Odd]))
def test_same_items(one: Any, other: Any, kind: type, other_kind: type) -> None:
    for items in (other, one, one[::-1], [(key, value) for key, value in one if value]):
        same(_cookies_c, _cookies_py, "same_items", kind(one), other_kind(items))
    same(_cookies_c, _cookies_py, "same_items", kind(one), list(one))


def encrypt(nonce: bytes, message: bytes, associated: bytes) -> bytes:
    return message[::-1] + nonce[:4] + associated


def decrypt(nonce: bytes, ciphertext: bytes, associated: bytes) -> bytes:
    return associated + ciphertext[::-1] + nonce


class WrongKeyError(Exception):
    pass


Decrypt: TypeAlias = Callable[[bytes, bytes, bytes], bytes]


def refuse(*_: bytes) -> bytes:
    raise WrongKeyError


def fail(*_: bytes) -> bytes:
    raise ValueError


def break_off(*_: bytes) -> bytes:
    raise ZeroDivisionError


@TEXTS
@given(
    st.binary(min_size=12, max_size=12) | st.binary(max_size=14),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=40),
    st.text(max_size=3),
)
def test_seal_siv(nonce: bytes, sealed_at: int, payload: bytes, name: str) -> None:
    same(_sealing_c, _sealing_py, "seal_siv", encrypt, nonce, sealed_at, payload, name)


@TEXTS
@given(
    st.binary(max_size=40).map(lambda rest: _sealing_py.encode_base64(b"\1" + rest))
    | st.binary(max_size=40).map(_sealing_py.encode_base64)
    | st.text(max_size=40),
    st.text(max_size=12),
    st.binary(max_size=9),
    st.lists(st.sampled_from([decrypt, refuse, fail, break_off]), max_size=3),
)
def test_open_siv(cookie: str, name: str, message: bytes, decrypts: list[Decrypt]) -> None:
    same(_sealing_c, _sealing_py, "open_siv", decrypts, cookie, name, WrongKeyError)
    # The shortest of messages, and what they lack.
    decrypts.append(lambda *_: message)
    same(_sealing_c, _sealing_py, "open_siv", decrypts, cookie, name, WrongKeyError)


@pytest.mark.parametrize("result", [None, "no bytes at all", bytearray(20), 1])
def test_siv_with_something_that_is_no_cipher(result: Any) -> None:
    cookie = _sealing_py.encode_base64(b"\1" + bytes(40))
    for twin in (_sealing_c, _sealing_py):
        if type(result) is not bytearray or twin is _sealing_c:
            with pytest.raises(TypeError):
                twin.seal_siv(lambda *_: result, bytes(12), 1, b"{}", "N")
            with pytest.raises((TypeError, AttributeError)):
                twin.open_siv([lambda *_: result], cookie, "N", WrongKeyError)


# Payloads


class Number(enum.IntEnum):
    """An int that is not one exactly."""

    ONE = 1


class Point(NamedTuple):
    """A tuple that is not one exactly."""

    x: object


class Whole(int):
    """Another int that is not one exactly."""


class Row(list[Any]):
    """A list that is not one exactly."""


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64 - 1, 2**64, 10**18, 10**30]),
    st.floats(),
    st.text(),
    st.text(st.characters(categories=["Cs", "L", "Nd"])),
    st.sampled_from([Number.ONE, Text("x"), Whole(7), b"x", object, 1j, {1}, -0.0, "\x7f"]),
)
KEYS = st.text() | LEAVES.filter(lambda leaf: isinstance(leaf, collections.abc.Hashable))


def containers(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Put items into containers of all kinds."""
    return st.one_of(
        st.lists(items),
        st.lists(items).map(tuple),
        st.lists(items).map(Row),
        items.map(Point),
        st.dictionaries(st.text(), items),
        st.dictionaries(KEYS, items),
        st.dictionaries(st.text(), items).map(collections.OrderedDict),
    )


VALUES = st.recursive(LEAVES, containers, max_leaves=20)


@given(VALUES)
def test_encode(value: object) -> None:
    same(_payload_c, _payload_py, "encode", value)
    same(_payload_c, _payload_py, "dumps", value)


@given(VALUES)
def test_encode_and_decode_are_json(value: object) -> None:
    try:
        expected = json.dumps(value)
    except (TypeError, ValueError) as error:
        for function in (_payload_c.encode, _payload_c.dumps):
            with pytest.raises(type(error)):
                function(value)
        return
    for text in (_payload_c.dumps(value), _payload_c.encode(value), _payload_c.encode(value)):
        assert repr(_payload_c.decode(text)) == repr(json.loads(expected))
    assert _payload_c.dumps(value).isascii()


def nested(depth: int, make: Callable[[Any], Any]) -> Any:
    """Put a container into another, and so on."""
    value: Any = make(1)
    for _ in range(depth):
        value = make(value)
    return value


@pytest.mark.parametrize("depth", [253, 254, 255, 256, 300, 700, 20_000])
@pytest.mark.parametrize(
    "make", [lambda item: [item], lambda item: (item,), lambda item: {"a": item}]
)
def test_encode_goes_as_deep_as_json(depth: int, make: Callable[[Any], Any]) -> None:
    value = nested(depth, make)
    for function in (_payload_c.encode, _payload_py.encode):
        try:
            expected: object = json.dumps(value, separators=(",", ":")).encode()
        except RecursionError:
            with pytest.raises(RecursionError):
                function(value)
        else:
            assert function(value) == expected


def test_encode_refuses_a_circle() -> None:
    circle: list[object] = [1]
    circle.append({"a": (circle,)})
    same(_payload_c, _payload_py, "encode", {"created": 1, "session": circle})
    same(_payload_c, _payload_py, "dumps", circle)


NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.from_regex(r"\A-?[0-9]{1,25}(\.[0-9]{0,25})?([eE][+-]?[0-9]{0,4})?\Z"),
    st.sampled_from(["NaN", "-Infinity", "1E400", "1e-400", "-0", "-0.0", "1" * 19, "1" * 18]),
    st.sampled_from(["18446744073709551615", "18446744073709551616", "9" * 40, "01", "+1", ".5"]),
)
STRINGS = st.text().map(json.dumps) | st.sampled_from(
    [
        '"\\ud800"',
        '"\\ud83d\\ude00"',
        '"\ud800"',
        '"\t"',
        '"\\x"',
        '"' + "1" * 20 + '"',
        '"é',
        '"\x00"',
    ]
)
JSON_TEXTS = st.recursive(
    NUMBERS | STRINGS | st.sampled_from(["null", "true", "nul", "", " ", "\ufeff{}", "{", "]"]),
    lambda items: st.one_of(
        st.lists(items).map(lambda texts: f"[{', '.join(texts)}]"),
        st.lists(st.tuples(STRINGS | st.just('"a"'), items).map(":".join)).map(
            lambda pairs: f"{{{','.join(pairs)}}}\r\n"
        ),
    ),
    max_leaves=10,
)


@TEXTS
@given(JSON_TEXTS | st.text(st.sampled_from('[]{}",:0189.eE+- \\untrfalsINy\ufeff\x00')))
def test_decode(text: str) -> None:
    same(_payload_c, _payload_py, "decode", text)
    assert outcome(_payload_c.decode, text) == outcome(json.loads, text)
    raw = text.encode("utf-8", "surrogatepass")
    same(_payload_c, _payload_py, "decode", raw)


@TEXTS
@given(st.binary())
def test_decode_bytes(raw: bytes) -> None:
    for value in (raw, b'"' + raw + b'"', b"[" + raw + b"]"):
        same(_payload_c, _payload_py, "decode", value)
        expected = outcome(_payload_py._load, value)
        assert outcome(_payload_c.decode, value) == expected


@pytest.mark.parametrize("text", [None, 1, Text("[1]"), bytearray(b"[1]"), memoryview(b"[1]")])
def test_decode_of_other_types(text: Any) -> None:
    same(_payload_c, _payload_py, "decode", text)


@pytest.mark.parametrize("depth", [500, 1023, 1024, 1025, 100_000])
def test_decode_goes_as_deep_as_json_at_least(depth: int) -> None:
    for text in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        kind = kind_of(_payload_py.decode, text.encode())
        assert kind_of(_payload_c.decode, text) is kind
        assert kind in {kind_of(json.loads, text), list, dict}


def kind_of(function: Callable[[Any], object], argument: object) -> type:
    try:
        return type(function(argument))
    except RecursionError:
        return RecursionError


# Sessions

SESSION_VALUES = st.recursive(LEAVES, containers, max_leaves=6)
KEY = st.sampled_from(["a", "b", "c"])
STEPS = st.one_of(
    st.tuples(st.just("__getitem__"), KEY),
    st.tuples(st.just("__setitem__"), KEY, SESSION_VALUES),
    st.tuples(st.just("__delitem__"), KEY),
    st.tuples(st.just("__contains__"), KEY),
    st.tuples(st.sampled_from(["get", "pop"]), KEY),
    st.tuples(st.sampled_from(["get", "pop", "setdefault"]), KEY | st.just([]), SESSION_VALUES),
    st.tuples(st.just("update"), st.dictionaries(KEY, SESSION_VALUES, max_size=2)),
    st.tuples(st.just("update"), st.lists(st.tuples(KEY, SESSION_VALUES) | st.just(1), max_size=2)),
    st.tuples(st.just("__eq__"), st.dictionaries(KEY, SESSION_VALUES, max_size=2) | st.just([])),
    st.tuples(st.just("set_new_identity"), st.integers()),
    *(
        st.tuples(st.just(name))
        for name in (
            "popitem",
            "clear",
            "keys",
            "items",
            "values",
            "__len__",
            "__repr__",
            "changed",
            "invalidate",
            "regenerate_id",
            "_needs_save",
            "_was_saved",
            "__iter__",
        )
    ),
)
ATTRIBUTES = (
    *("_changed", "_created", "_identity", "_mapping", "_max_age", "_new"),
    *("_ended", "_issued", "_record", "_renew", "_replaces", "_touch"),
    *("new", "identity", "created", "empty", "max_age"),
)
DATA = st.one_of(
    st.none(),
    st.just({}),
    st.fixed_dictionaries(
        {},
        optional={
            "created": st.sampled_from([NOW, NOW - 50, NOW + 5, 0, None, 1.5, NOW - 150]),
            "session": st.none() | st.dictionaries(KEY, SESSION_VALUES),
            "other": st.none(),
        },
    ),
    st.sampled_from([collections.OrderedDict(), collections.UserDict(created=NOW), [], "x", 0]),
)


def state(session: Any) -> list[object]:
    """List what can be seen of a session."""
    return [(name, repr(getattr(session, name))) for name in ATTRIBUTES]


@given(
    data=DATA,
    new=st.booleans(),
    max_age=st.sampled_from([None, 0, 100, 2.5, "x"]),
    steps=st.lists(STEPS),
)
def test_sessions_behave_the_same(data: Any, new: bool, max_age: Any, steps: list[Any]) -> None:
    with mock.patch("time.time", return_value=NOW + 0.9) as clock:
        made = []
        for cls in CLASSES:
            try:
                made.append(cls("id", data=copy.deepcopy(data), new=new, max_age=max_age))
            except Exception as error:  # noqa: BLE001
                made.append((type(error).__name__, str(error)))
        if isinstance(made[0], tuple):
            assert made[0] == made[1]
            return
        take(steps, made, clock)


def take(steps: list[Any], made: list[Any], clock: mock.Mock) -> None:
    """Do the same with both sessions, and look whether they stay alike."""
    compiled, pure = made
    assert state(compiled) == state(pure)
    for name, *arguments in steps:
        clock.return_value += 1
        results = [outcome(getattr(session, name), *copy.deepcopy(arguments)) for session in made]
        if name != "__iter__":
            assert results[0] == results[1]
        assert state(compiled) == state(pure)


def match_a(session: object) -> object:
    match session:
        case {"a": value}:
            return value
    return None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(),
    lambda items: st.lists(items) | st.dictionaries(st.text(), items),
    max_leaves=6,
)
TIMES = st.sampled_from(
    [NOW, NOW - 50, 0, 2**53 - 1, 2**53, -(2**53), 10**30, 1.5, True, None, "x"]
)
VALUES = st.one_of(
    st.fixed_dictionaries(
        {"created": TIMES | st.just(NOW), "session": st.dictionaries(KEY, JSON_VALUES)},
        optional={"max_age": TIMES | st.integers(-1, 100), "issued": TIMES, "other": st.none()},
    ),
    st.dictionaries(st.sampled_from(["created", "session", "max_age"]), TIMES | JSON_VALUES),
    JSON_VALUES,
)
PAYLOADS = st.one_of(
    VALUES.map(json.dumps),
    VALUES.map(lambda value: json.dumps(value, separators=(",", ":"))),
    st.sampled_from(["", "{", "[" * 100_000, '{"created":1,"session":{"a":NaN}}']),
)


def restored(payload: Any, max_age: Any) -> list[Any]:
    """Let both twins make a session of a payload."""
    return [module.restore(payload, "id", max_age) for module in (_session_c, _session_py)]


@TEXTS
@given(PAYLOADS, st.sampled_from([None, 0, 49, 50, 10**9, 2.5]))
def test_restore(payload: str, max_age: Any) -> None:
    with mock.patch("time.time", return_value=NOW + 0.9):
        for text in (payload, payload.encode()):
            compiled, pure = restored(text, max_age)
            assert (compiled is None) == (pure is None)
            if pure is not None:
                assert state(compiled) == state(pure)
                loaded = json.loads(payload)
                plain = CLASSES[0](
                    "id", data=loaded, new=False, max_age=loaded.get("max_age", max_age)
                )
                assert state(compiled) == state(plain)


# A usual payload is told by its bytes: its parts, the usual one first.
HEADS = ['{"created":', '{"created": ', '{ "created":', '{"a":1,"created":', '["created":', "{"]
TIMES_WRITTEN = ["1", "0", "01", "-1", "1.5", "1e3", "", "x", "9" * 15, "9" * 16, str(2**64 + 5)]
CONTENTS = [
    *("{}", '{"a":1}', '{"a":{"b":{}}}', '{"a":[{}]}', ' {"a":1}', '{"a":NaN}', "[{}]", "1", "{"),
    *('{"a":1},"max_age":9', '{"a":1},"max_age":{}', '{"a":1},"owner":"x"', '{"a":{}', "{1:{}}"),
    *('{"a":1},"session":{"b":2}', '{"a":1},"created":2', '{"a":1,"a":{}}', '{"a":1,}', "{]"),
    *('{"a":"}}', '{"a":"}"}', r'{"é":"\ud800"}', '{"a":' + "9" * 20 + "}"),
    *("{" + '"a":{' * 2000 + "}" * 2001, '{"a":' * 500 + "{}" + "}" * 500),
]
TAILS = ["}", "}}", "", "]", "} ", "}\0", '}{"a":{}}']


def test_what_looks_like_a_usual_payload() -> None:
    seen: collections.Counter[bool] = collections.Counter()
    for number, contents in itertools.product(TIMES_WRITTEN, CONTENTS):
        for head, tail in [*((head, "}") for head in HEADS), *((HEADS[0], tail) for tail in TAILS)]:
            payload = f'{head}{number},"session":{contents}{tail}'
            for text in (payload, payload.encode(), payload.encode()[:-1]):
                compiled, pure = restored(text, None)
                assert (compiled is None) == (pure is None), payload
                assert pure is None or state(compiled) == state(pure), payload
                seen[pure is None] += 1
    assert min(seen[True], seen[False]) > 100


@given(st.text('{}":,19', max_size=40).map('{{"created":1,"session":{{{}'.format))
def test_what_begins_as_a_usual_payload(payload: str) -> None:
    compiled, pure = restored(payload.encode(), None)
    assert (compiled is None) == (pure is None)
    assert pure is None or state(compiled) == state(pure)


@given(st.dictionaries(KEY, JSON_VALUES), st.lists(STEPS))
def test_restored_sessions_behave_the_same(items: Any, steps: list[Any]) -> None:
    with mock.patch("time.time", return_value=NOW + 0.9) as clock:
        take(steps, restored(json.dumps({"created": NOW, "session": items}), 10**6), clock)


@given(
    st.dictionaries(KEY | st.just(1), SESSION_VALUES | JSON_VALUES),
    TIMES | st.just(0),
    st.sampled_from([None, 9, 9.0]),
    st.sampled_from([None, 9]),
    st.sampled_from([None, "x"]),
)
def test_payload_of(items: Any, created: Any, own: Any, max_age: Any, owner: str | None) -> None:
    for kind in (0, 1):
        written = []
        for module in (_session_c, _session_py):
            session: Any = (module.Session, type("Own", (module.Session,), {}))[kind](
                "id", data=None, new=True, max_age=own
            )
            session._mapping, session._created, session._owner = items, created, owner
            written.append(module.payload_of(session, max_age))
        assert written[0] == written[1]
        if written[0] is None:
            continue
        assert kind == 0
        assert items
        assert owner is None
        assert own == max_age
        assert json.loads(written[0]) == {
            "created": created,
            "session": json.loads(_payload_py.encode(items)),
        }
        session = _session_c.restore(written[0], "id", None)
        assert session is not None
        assert session.created == created


ACCESSES: dict[str, Callable[[Any], Any]] = {
    "item": lambda session: session["a"],
    "get": lambda session: session.get("a"),
    "setdefault": lambda session: session.setdefault("a", None),
    "values": lambda session: next(iter(session.values())),
    "items": lambda session: next(iter(session.items()))[1],
    "mapping": lambda session: session._mapping["a"],
    "copy": lambda session: copy.copy(session)["a"],
    "state": lambda session: session.__reduce_ex__(2)[2]["_mapping"]["a"],
    "pattern": match_a,
    "stars": lambda session: {**session}["a"],
}


@pytest.mark.parametrize("access", ACCESSES.values(), ids=ACCESSES)
@pytest.mark.parametrize("saved", [False, True])
def test_whoever_hands_out_a_container_notices_its_change(
    access: Callable[[Any], Any], saved: bool
) -> None:
    for session in restored('{"created":1,"session":{"a":[{"b":1}],"c":1}}', None):
        value = access(session)
        if saved:
            session["c"] = 2
            session._was_saved()
        assert not session._needs_save()
        value[0]["b"] = 2
        assert session._needs_save()
        assert session._changed


@given(st.dictionaries(KEY, SESSION_VALUES), st.dictionaries(KEY, SESSION_VALUES), st.booleans())
def test_changes_show_the_same(before: Any, after: Any, alike: bool) -> None:
    if alike:
        after = copy.deepcopy(before)
    verdicts = []
    for cls in CLASSES:
        session = cls(None, data={"created": NOW, "session": before}, new=False)
        assert not session._needs_save()
        session._mapping = after
        verdicts.append(session._needs_save())
    assert verdicts[0] == verdicts[1]


@given(SESSION_VALUES, LEAVES, st.integers(0), st.sampled_from(["set", "add", "delete", "swap"]))
def test_every_change_inside_shows_the_same(
    value: Any, leaf: object, where: int, change: str
) -> None:
    verdicts = []
    for cls in CLASSES:
        session = cls(
            None, data={"created": NOW, "session": {"a": copy.deepcopy(value)}}, new=False
        )
        mutable: list[Any] = []
        collect(session["a"], mutable)
        if mutable:
            mutate(mutable[where % len(mutable)], leaf, where, change)
        verdicts.append((session._needs_save(), session._changed))
    assert verdicts[0] == verdicts[1]


def collect(value: Any, found: list[Any]) -> None:
    if isinstance(value, (list, dict)):
        found.append(value)
    if isinstance(value, Mapping):
        value = value.values()
    if isinstance(value, (list, tuple, collections.abc.ValuesView)):
        for item in value:
            collect(item, found)


def mutate(container: Any, leaf: Any, where: int, change: str) -> None:
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    key = keys[where % len(keys)] if keys else None
    if change == "set" and keys:
        container[key] = leaf
    elif change == "delete" and keys:
        del container[key]
    elif change == "swap" and keys and isinstance(container, dict):
        container[key] = container.pop(key)
    elif isinstance(container, dict):
        container["new"] = leaf
    else:
        container.append(leaf)


@pytest.mark.parametrize("depth", [150, 198, 199, 200, 201, 1000, 3000])
def test_deep_sessions_are_compared_the_same(depth: int) -> None:
    verdicts = []
    for cls in CLASSES:
        inner: list[Any] = [1]
        value: list[Any] = inner
        for _ in range(depth):
            value = [value]
        session = cls(None, data={"created": NOW, "session": {"a": value}}, new=False)
        before = session._needs_save()
        inner.append(2)
        verdicts.append((before, session._needs_save()))
    assert verdicts[0] == verdicts[1]
    assert verdicts[0][0] is False


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("source", CLASSES)
@pytest.mark.parametrize("target", CLASSES)
@pytest.mark.parametrize("change", [False, True])
def test_pickles_move_between_the_twins(
    protocol: int, source: Any, target: Any, change: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = source("id", data={"created": NOW, "session": {"a": [1]}}, new=False, max_age=10**9)
    session.foreign = 1
    if change:
        session["a"].append(2)
    monkeypatch.setattr(sys.modules["aiohttp_session"], "Session", source)
    text = pickle.dumps(session, protocol)
    monkeypatch.setattr(sys.modules["aiohttp_session"], "Session", target)
    loaded = pickle.loads(text)
    assert type(loaded) is target
    assert state(loaded) == state(session)
    assert loaded.foreign == 1
    assert loaded._needs_save() is change


@pytest.mark.parametrize("cls", CLASSES)
def test_copies(cls: Any) -> None:
    session = cls("id", data={"created": NOW, "session": {"a": [1]}}, new=False)
    shallow, deep = copy.copy(session), copy.deepcopy(session)
    assert shallow._mapping is session._mapping
    assert deep._mapping == session._mapping
    assert deep["a"] is not session["a"]
    deep["a"].append(2)
    assert (session._needs_save(), deep._needs_save()) == (False, True)


@pytest.mark.parametrize(
    "use",
    [
        hash,
        reversed,
        lambda session: session["missing"],
        lambda session: session[[]],
        lambda session: session.pop("missing"),
        lambda session: session.update(1),
        lambda session: session.update([1]),
        lambda session: session.no_such_attribute,
        lambda session: isinstance(session, MutableMapping),
        lambda session: type(session)[int],
        lambda session: session != {"a": 1},
        lambda session: session == type(session)("x", data=None, new=True),
        lambda session: math.inf in session,
        lambda session: {**session},
        bool,
        match_a,
        lambda session: [*session.keys(), *session.values(), *session.items()],
    ],
)
def test_uses(use: Callable[[Any], object]) -> None:
    results = [
        outcome(use, cls("id", data={"created": NOW, "session": {"a": 1}}, new=False))
        for cls in CLASSES
    ]
    assert plainly(results[0]) == plainly(results[1])


def test_properties_are_read_only() -> None:
    for cls in CLASSES:
        for name in ("new", "identity", "created", "empty"):
            with pytest.raises(AttributeError, match=name):
                setattr(cls(None, data=None, new=True), name, 1)


# Replies


REPLY_PARTS = [
    *(b"VALUE ", b"VALUE k 0 1 7\r\n", b"k", b" ", b" 0 ", b" 1 7", b"END\r\n"),
    *(b"$1\r\na\r\n", b"$", b"$-1", b"_", b":", b":-", b"+OK", b"+", b"-ERR", b">", b"*1\r\n"),
    *(b"1", b"0", b"12", b"\r\n", b"\r", b"\n", b"\0"),
]


@given(
    st.text(max_size=300) | st.text("ab-_", max_size=300) | st.binary(max_size=3),
    st.binary(max_size=120) | st.sampled_from([bytes(10**5), "text", None]),
    st.none() | st.integers(0, 10**10) | st.sampled_from([-1, 2**31 - 1, 2**31, 2**70, 1.5, True]),
    st.sampled_from([b"", b"XX", b"NX", "XX"]),
)
def test_written_commands(key: Any, payload: Any, ttl: Any, condition: Any) -> None:
    same(_replies_c, _replies_py, "write_get", key)
    same(_replies_c, _replies_py, "write_set", key, payload, ttl, condition)


@given(
    st.text(max_size=300) | st.text("ab-_", max_size=300) | st.binary(max_size=3),
    st.binary(max_size=120) | st.sampled_from([bytes(10**5), "text", None]),
    st.binary(max_size=120) | st.sampled_from([bytes(10**5), "text", None]),
    st.none() | st.integers(0, 10**10) | st.sampled_from([-1, 2**31 - 1, 2**31, 2**70, 1.5, True]),
    st.sampled_from([b"", b"x" * 40, b"x" * 39, b"return 1", "x" * 40, None]),
)
def test_written_swaps(key: Any, expected: Any, payload: Any, ttl: Any, script: Any) -> None:
    same(_replies_c, _replies_py, "write_swap", key, expected, payload, ttl, script)


@TEXTS
@given(
    st.lists(st.sampled_from(REPLY_PARTS) | st.binary(max_size=3)).map(b"".join),
    st.integers(-5, 50),
)
def test_replies(data: bytes, position: int) -> None:
    same(_replies_c, _replies_py, "read_values", data, position)
    same(_replies_c, _replies_py, "read_replies", data, position)


@pytest.mark.parametrize("data", [bytearray(b"VALUE k 0 1 7\r\na\r\n"), "VALUE", None])
def test_replies_of_other_types(data: Any) -> None:
    for name in ("read_values", "read_replies"):
        same(_replies_c, _replies_py, name, data, 0)
        same(_replies_c, _replies_py, name, b"VALUE k 0 1 7\r\na\r\n", True)


# Kept records

RECORD_STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("get", "get", "ask", "ask", "ask_behind", "keep", "keep", "keep"),
                *("drop", "forget", "forget_link", "begin_change", "end_change"),
            ]
        ),
        st.sampled_from("abcdef"),
        st.sampled_from([None, b"", b"x" * 9, b"x" * 30, b"x" * (_records_py.MAX_SIZE + 1)]),
        st.integers(0, 3),
    ),
    max_size=60,
)


def keep_records(
    module: Any, steps: list[tuple[str, str, bytes | None, int]], links: list[_records_py.Link]
) -> list[object]:
    """Do what is told, and list what comes of it."""
    records = module.KeptRecords(4, 60)
    tokens: dict[str, list[Any]] = {key: [[key]] for key in "abcdef"}
    seen: list[object] = []
    for step, key, payload, number in steps:
        if step in {"ask", "ask_behind"}:
            token = getattr(records, step)(key)
            seen.append((token, token is tokens[key][-1]))
            tokens[key] += [] if token is None else [token]
        elif step == "keep":
            # Also by a token that is worth nothing any more.
            token = tokens[key][-1 - number % len(tokens[key])]
            records.keep(token, payload, [*links, None][number % 3])
        elif step == "forget_link":
            records.forget_link(links[number % 2])
        elif step != "end_change" or key in records._changing:
            seen.append(getattr(records, step)(key))
        seen.append((records.bytes, records.hits, records.misses, [*records.by_key.items()]))
        seen.append((dict(records._tokens), dict(records._changing)))
    return seen


@given(RECORD_STEPS)
def test_kept_records(steps: list[tuple[str, str, bytes | None, int]]) -> None:
    links = [_records_py.Link(), _records_py.Link()]
    links[0].until = math.inf  # the other is not to be relied upon
    assert keep_records(_records_c, steps, links) == keep_records(_records_py, steps, links)


# Replies to those who wait for them


REPLIES = st.lists(
    st.sampled_from([b"", b"record", b"x" * (_records_py.MAX_SIZE + 1), None, 1, "a", "b", "c"]),
    max_size=20,
)
ENTRIES = st.lists(
    st.tuples(
        st.sampled_from(["group", "asyncio", "done", "cancelled"]),
        st.sampled_from([None, "a", "b", "c", "stale", "call"]),
    ),
    max_size=20,
)


def answer(
    modules: tuple[Any, Any], replies: list[Any], entries: list[tuple[str, Any]], *, is_known: bool
) -> object:
    """Have replies given to entries, and tell what came of it: plainly, and with a near cache."""
    futures_of, records_of = modules
    loop = asyncio.new_event_loop()
    group, link = futures_of.FutureGroup(loop), _records_py.Link()
    seen: list[object] = []
    link.until = math.inf

    def wait(state: str) -> Any:
        future = loop.create_future() if state == "asyncio" else group.create_future()
        if state == "done":
            future.set_result("before")
        elif state == "cancelled":
            future.cancel()
        return future

    def tell(future: Any) -> object:
        return "cancelled" if future.cancelled() else future.done() and future.result()

    records = records_of.KeptRecords(9, 10**6)
    for key in "abc":
        records.keep(records.ask(key), key.encode(), link)
    told: list[object] = []
    every = [(None, wait(state), token) for state, token in entries]
    tokens = {"call": told.append, "stale": ["a"], None: None}
    due = collections.deque(
        tokens[token] if token in tokens else records.ask(token) for *_, token in every
    )
    tracked = collections.deque(every)
    result = outcome(
        futures_of.answer_tracked, tracked, due, replies, records, link if is_known else None
    )
    seen.append((result, len(tracked), len(due), told, list(map(tell, (f for _, f, _ in every)))))
    seen.append((records.bytes, list(records.by_key), dict(records._tokens)))
    seen.append([records.get(key) for key in "abc"])

    every = [(None, wait(state), token) for state, token in entries]
    plain = collections.deque(every)
    result = outcome(futures_of.answer, plain, replies)
    seen.append((result, len(plain), list(map(tell, (f for _, f, _ in every)))))
    loop.close()
    return seen


@given(REPLIES, ENTRIES, st.booleans())
def test_answers(replies: list[Any], entries: list[tuple[str, Any]], is_known: bool) -> None:
    compiled, pure = (_futures_c, _records_c), (_futures_py, _records_py)
    expected = answer(pure, replies, entries, is_known=is_known)
    assert answer(compiled, replies, entries, is_known=is_known) == expected
