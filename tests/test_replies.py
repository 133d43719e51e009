"""What memcached and Redis reply, and Redis is sent."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiohttp_session._core import (
    read_replies,
    read_tracked,
    read_values,
    write_command,
    write_swap,
)

RECORDS = st.lists(
    st.tuples(
        st.from_regex(rb"[!-~]{1,20}", fullmatch=True),
        st.binary(max_size=30),
        st.integers(0, 2**64 - 1).map(b"%d".__mod__),
    ),
    max_size=4,
)


def write(records: list[tuple[bytes, bytes, bytes]]) -> bytes:
    return b"".join(
        b"VALUE %b 0 %d %b\r\n%b\r\n" % (key, len(value), token, value)
        for key, value, token in records
    )


@settings(settings.get_profile("texts"))
@given(before=st.binary(max_size=5), records=RECORDS, rest=st.sampled_from([b"", b"END\r\n"]))
def test_all_records_are_read(
    before: bytes, records: list[tuple[bytes, bytes, bytes]], rest: bytes
) -> None:
    reply = before + write(records)
    assert read_values(reply + rest, len(before)) == (records, len(reply))


@given(RECORDS)
@example([(b"key", b"\r\nEND\r\nVALUE x 0 1\r\n", b"7")])
def test_a_record_that_is_cut_off_is_left(records: list[tuple[bytes, bytes, bytes]]) -> None:
    ends = [len(write(records[:count])) for count in range(len(records) + 1)]
    reply = write(records)
    for cut in range(len(reply) + 1):
        whole = sum(end <= cut for end in ends) - 1
        assert read_values(reply[:cut], 0) == (records[:whole], ends[whole])


@pytest.mark.parametrize(
    "other",
    [
        *(b"END\r\n", b"ERROR\r\n", b"STORED\r\n", b"VALUE \r\n", b"value k 0 1 7\r\na\r\n"),
        *(b"SERVER_ERROR out of memory\r\n", b"VALUE k 0 1\r\na\r\n", b"VALUE k 0 1 \r\na\r\n"),
        *(b"VALUE k 1 1 7\r\na\r\n", b"VALUE k 00 1 7\r\na\r\n", b"VALUE k 0 1 7 7\r\na\r\n"),
        *(b"VALUE k 0  7\r\na\r\n", b"VALUE k 0 -1 7\r\na\r\n", b"VALUE k 0 +1 7\r\na\r\n"),
        *(b"VALUE k 0 1 7\na\r\n", b"VALUE k 0 1 7\r\nab\r\n", b"VALUE k 0 2 7\r\na\r\n"),
        *(b"VALUE  0 1 7\r\na\r\n", b"VALUE k\x7f 0 1 7\r\na\r\n", b"VALUE k\tl 0 1 7\r\na\r\n"),
        *(b"VALUE k 0 0000000001 7\r\na\r\n", b"VALUE k 0 9999999999 7\r\na\r\n"),
        *(b"VALUE k 0 1 -7\r\na\r\n", b"VALUE k 0 1 x\r\na\r\n", b"VALUE k 0 1\t7\r\na\r\n"),
        b"VALUE k 0 1 123456789012345678901\r\na\r\n",
    ],
)
def test_anything_else_is_left(other: bytes) -> None:
    assert read_values(other, 0) == ([], 0)
    first = write([(b"k", b"v", b"7")])
    assert read_values(first + other, 0) == ([(b"k", b"v", b"7")], len(first))


REPLIES = st.lists(
    st.none()
    | st.integers(-(10**18) + 1, 10**18 - 1)
    | st.binary(max_size=30)
    | st.sampled_from([b"OK", b"", b"\r\n+OK\r\n"]),
    max_size=4,
)
FORMS = st.sampled_from([b"$-1\r\n", b"_\r\n"])


def write_reply(reply: bytes | int | None, null: bytes) -> bytes:
    if reply is None:
        return null
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    return b"+OK\r\n" if reply == b"OK" else b"$%d\r\n%b\r\n" % (len(reply), reply)


@given(REPLIES, FORMS)
def test_replies_of_redis_are_read_as_far_as_they_are_complete(
    replies: list[bytes | int | None], null: bytes
) -> None:
    parts = [write_reply(reply, null) for reply in replies]
    ends = [sum(map(len, parts[:count])) for count in range(len(parts) + 1)]
    text = b"".join(parts)
    for cut in range(len(text) + 1):
        whole = sum(end <= cut for end in ends) - 1
        assert read_replies(b"before" + text[:cut], 6) == (replies[:whole], 6 + ends[whole])


@pytest.mark.parametrize(
    "other",
    [
        *(b"-ERR no\r\n", b"*1\r\n$1\r\na\r\n", b">1\r\n+a\r\n", b"#t\r\n", b"%0\r\n", b",1\r\n"),
        *(
            b"$\r\n",
            b"$-2\r\n",
            b"$-\r\n",
            b"$x\r\n",
            b"$1\r\nab\r\n",
            b"$2\r\na\r\n",
            b"$1\na\r\n",
        ),
        *(
            b"$9999999999\r\n",
            b":\r\n",
            b":-\r\n",
            b":+1\r\n",
            b":1x\r\n",
            b":1000000000000000000\r\n",
        ),
        *(b"+a\n\r\n", b"_x\r\n", b"\r\n", b"OK\r\n", b"$-1x\r\n"),
    ],
)
def test_what_is_no_usual_reply_is_left(other: bytes) -> None:
    assert read_replies(other, 0) == ([], 0)
    assert read_replies(b":1\r\n" + other, 0) == ([1], 4)


KEYS = st.from_regex(r"[!-~]{1,20}", fullmatch=True)


def write_invalidation(key: str) -> bytes:
    return b">2\r\n$10\r\ninvalidate\r\n*1\r\n$%d\r\n%b\r\n" % (len(key), key.encode())


@given(st.lists(REPLIES | KEYS, max_size=4), FORMS)
def test_invalidations_are_read_among_the_replies(
    parts: list[list[bytes | int | None] | str], null: bytes
) -> None:
    every: list[bytes | int | str | None] = []
    texts = []
    for part in parts:
        if isinstance(part, str):
            every.append(part)
            texts.append(write_invalidation(part))
        else:
            every += part
            texts += [write_reply(reply, null) for reply in part]
    ends = [sum(map(len, texts[:count])) for count in range(len(texts) + 1)]
    text = b"".join(texts)
    for cut in range(len(text) + 1):
        whole = sum(end <= cut for end in ends) - 1
        assert read_tracked(b"before" + text[:cut], 6) == (every[:whole], 6 + ends[whole])


@pytest.mark.parametrize(
    "other",
    [
        *(b">2\r\n$10\r\ninvalidate\r\n_\r\n", b">2\r\n$10\r\ninvalidate\r\n*0\r\n"),
        b">2\r\n$10\r\ninvalidate\r\n*2\r\n$1\r\nk\r\n$1\r\nl\r\n",
        b">2\r\n$7\r\nmessage\r\n*1\r\n$1\r\nk\r\n",
        *(b"%b$%b\r\n" % (write_invalidation("")[:-6], size) for size in (b"", b"0\r\n", b"-1")),
        *(b"%b$1\r\n%b\r\n" % (write_invalidation("")[:-6], key) for key in (b"", b" ", b"\xff")),
        *(b"%b$1\r\n%b\r\n" % (write_invalidation("")[:-6], key) for key in (b"kk", b"\r", b"\0")),
        b"%b$2\r\nk\r\n" % write_invalidation("")[:-6],
    ],
)
def test_what_is_no_usual_invalidation_is_left(other: bytes) -> None:
    assert read_tracked(other, 0) == ([], 0)
    assert read_tracked(b":1\r\n" + other, 0) == ([1], 4)
    assert read_replies(write_invalidation("k"), 0) == ([], 0)


DIGEST = b"0123456789abcdef" * 2 + b"01234567"
SCRIPTS = [b"", DIGEST, b"return 1", DIGEST[:39], DIGEST + b"8"]
SIZED = st.integers(0, 2000).map(bytes) | st.binary(max_size=50)


def swap_command(
    key: str, expected: bytes, payload: bytes, ttl: int | None, script: bytes
) -> list[bytes]:
    """Return the arguments of the command that swaps a record."""
    seconds = [] if ttl is None else [b"%d" % ttl]
    if not script:
        expiry = [b"EX", *seconds] if seconds else []
        return [b"SET", key.encode(), payload, *expiry, b"IFEQ", expected]
    name = b"EVALSHA" if len(script) == 40 else b"EVAL"
    return [name, script, b"1", key.encode(), expected, payload, *seconds]


@given(
    key=st.text(st.characters(codec="ascii"), max_size=300) | st.text(max_size=10),
    expected=SIZED,
    payload=SIZED,
    ttl=st.none() | st.integers(0, 10**12),
    script=st.sampled_from(SCRIPTS),
)
@example(key="k" * 250, expected=bytes(10), payload=bytes(9), ttl=2**31 - 1, script=DIGEST)
@example(key="k", expected=bytes(99), payload=bytes(100), ttl=2**31, script=b"")
@example(key="ké", expected=b"", payload=b"", ttl=None, script=b"")
@example(key="", expected=bytes(10**5), payload=bytes(10**6 - 1), ttl=9, script=b"return 1")
def test_a_swap_is_written_as_one_command(
    key: str, expected: bytes, payload: bytes, ttl: int | None, script: bytes
) -> None:
    arguments = swap_command(key, expected, payload, ttl, script)
    written = write_swap(key, expected, payload, ttl, script)
    assert written == write_command(*arguments)
    head = b"*%d\r\n" % len(arguments)
    assert written.startswith(head)
    assert read_replies(written[len(head) :], 0) == (arguments, len(written) - len(head))


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [(0, b"k"), (1, "expected"), (1, None), (2, "payload"), (2, None), (3, "1"), (4, "script")],
)
def test_a_swap_is_written_of_the_right_types_alone(argument: int, wrong: object) -> None:
    arguments: list[object] = ["k", b"expected", b"payload", 60, DIGEST]
    arguments[argument] = wrong
    with pytest.raises((TypeError, AttributeError)):
        write_swap(*arguments)  # type: ignore[arg-type]
