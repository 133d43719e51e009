"""RESP as `read_odd` reads it, beside what redis-py's own parser makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiohttp_session._core import read_replies, write_command, write_get, write_set
from aiohttp_session.stores._redis_resp import ErrorReply, Push, missing, read_odd

texts = st.binary(max_size=10).filter(lambda text: b"\r" not in text and b"\n" not in text)
scalars = st.none() | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=40)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=10)


def write(value: Any) -> bytes:
    if value is None:
        return b"$-1\r\n"
    if isinstance(value, int):
        return b":%d\r\n" % value
    if isinstance(value, bytes):
        return b"$%d\r\n%b\r\n" % (len(value), value)
    return b"*%d\r\n" % len(value) + b"".join(map(write, value))


@given(values, st.binary(max_size=5), st.binary(max_size=5))
def test_a_value_is_read_from_anywhere(value: Any, before: bytes, after: bytes) -> None:
    written = write(value)
    data = before + written + after
    assert read_odd(data, len(before)) == (value, len(before) + len(written))


@given(values, st.data())
def test_a_part_of_a_value_is_incomplete(value: Any, data: st.DataObject) -> None:
    written = write(value)
    part = written[: data.draw(st.integers(1, len(written) - 1))]
    assert read_odd(part, 0) is None


@given(st.binary(max_size=60))
def test_bytes_of_any_kind_are_read_incomplete_or_refused(data: bytes) -> None:
    try:
        found = read_odd(data, 0)
    except ValueError:
        return
    assert found is None or 0 < found[1] <= len(data)


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=12))
@example([bytes(9), bytes(10), bytes(99), bytes(100), bytes(65_536)])
def test_a_command_is_an_array_of_strings(arguments: list[bytes]) -> None:
    command = write_command(*arguments)
    assert read_odd(command, 0) == (arguments, len(command))


@pytest.mark.parametrize("ttl", [None, 1, 60, 10**9, 10**12])
@pytest.mark.parametrize("condition", [b"", b"NX"])
@pytest.mark.parametrize("key", ["k", "k" * 250, "schlüssel"])
def test_a_record_is_set_and_got_by(key: str, ttl: int | None, condition: bytes) -> None:
    expiry = [] if ttl is None else [b"EX", str(ttl).encode()]
    parts = [b"SET", key.encode(), b"record", *expiry, *filter(None, [condition])]
    assert write_set(key, b"record", ttl, condition) == write_command(*parts)
    assert write_get(key) == write_command(b"GET", key.encode())


def test_a_command_is_of_bytes() -> None:
    with pytest.raises(TypeError):
        write_command(b"GET", "key")  # type: ignore[arg-type]


@given(texts)
def test_an_error_is_its_text(text: bytes) -> None:
    found = read_odd(b"-" + text + b"\r\n", 0)
    assert found is not None
    assert isinstance(found[0], ErrorReply)
    assert found[0].text == text


def test_a_push_is_its_message() -> None:
    data = b">2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\nk\r\n"
    for end in range(1, len(data)):
        assert read_odd(data[:end], 0) is None
    found = read_odd(data, 0)
    assert found is not None
    assert isinstance(found[0], Push)
    assert found[0].message == [b"invalidate", [b"k"]]


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"%1\r\n+proto\r\n:3\r\n", [(b"proto", 3)]),
        (b"~2\r\n:1\r\n_\r\n", [1, None]),
        (b"*-1\r\n", None),
        (b"%0\r\n", []),
    ],
)
def test_other_kinds(data: bytes, value: Any) -> None:
    assert read_odd(data, 0) == (value, len(data))
    assert read_odd(data[:-1], 0) is None


@pytest.mark.parametrize(
    "data",
    [
        *(b"HTTP/1.1 400 Bad Request\r\n", b"HTTP", b"#t\r\n", b"$-7\r\n", b"%x\r\n", b":x\r\n"),
        *(b"$1\r\nab\r\n", b"$1\r\na\rx", b"$1\r\nax", b"*9999999999\r\n", b"+" + b"x" * 70_000),
    ],
)
def test_what_is_no_reply_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_odd(data, 0)


@given(st.binary(min_size=1, max_size=50), st.data())
def test_what_a_string_lacks_is_told(text: bytes, data: st.DataObject) -> None:
    written = write(text)
    head = written.index(b"\n") + 1
    end = data.draw(st.integers(head, len(written)))
    assert missing(written[:end]) == len(written) - end
    assert missing(written[: head - 1]) == 0
    assert read_replies(written, 0) == ([text], len(written))
