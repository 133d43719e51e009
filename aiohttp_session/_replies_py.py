"""What memcached and Redis reply, and Redis is sent: the reference implementation."""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = (
    "read_replies",
    "read_tracked",
    "read_values",
    "write_command",
    "write_get",
    "write_set",
    "write_swap",
)

_HEAD = re.compile(rb"VALUE ([!-~\x80-\xff]+) 0 ([0-9]{1,9}) ([0-9]{1,20})\r\n")
_REPLY = re.compile(rb"(?:\$([0-9]{1,9})|:(-?[0-9]{1,18})|\+([^\r\n]*)|\$-1|_)\r\n")

_DIGEST_SIZE = 40  # of SHA-1, in hex
_INVALIDATION = re.compile(rb">2\r\n\$10\r\ninvalidate\r\n\*1\r\n\$([0-9]{1,9})\r\n([!-~]+)\r\n")


def write_command(*arguments: bytes) -> bytes:
    """Write a command of Redis."""
    return _command((*map(len, arguments),)) % arguments


def write_get(key: str) -> bytes:
    """Write GET, a command of Redis."""
    return write_command(b"GET", key.encode())


def write_set(key: str, payload: bytes, ttl: int | None, condition: bytes) -> bytes:
    """Write SET, a command of Redis.

    :param ttl: in seconds; None for ever.
    :param condition: ``XX``, if there is a record already; ``NX``, if there is none; or empty.
    """
    return write_command(b"SET", key.encode(), payload, *_set_options(ttl, condition))


def write_swap(key: str, expected: bytes, payload: bytes, ttl: int | None, script: bytes) -> bytes:
    """Write a command of Redis that replaces a record if it is the expected one.

    :param ttl: in seconds; None for ever.
    :param script: the digest of a script for EVALSHA, or a script for EVAL, which takes the key,
        the expected record, the payload and the TTL, if there is one; empty for SET with IFEQ.
    """
    if not script:
        return write_command(
            b"SET", key.encode(), payload, *_set_options(ttl, b""), b"IFEQ", expected
        )
    name = b"EVALSHA" if len(script) == _DIGEST_SIZE else b"EVAL"
    expiry = () if ttl is None else (b"%d" % ttl,)
    return write_command(name, script, b"1", key.encode(), expected, payload, *expiry)


@lru_cache
def _set_options(ttl: int | None, condition: bytes) -> tuple[bytes, ...]:
    """Return what stands behind the payload in a SET command."""
    expiry = () if ttl is None else (b"EX", b"%d" % ttl)
    return (*expiry, condition) if condition else expiry


@lru_cache(maxsize=1024)  # most sessions are of similar sizes
def _command(sizes: tuple[int, ...]) -> bytes:
    """Return a command with a gap for each argument."""
    return b"".join([b"*%d\r\n" % len(sizes), *(b"$%d\r\n%%b\r\n" % size for size in sizes)])


def read_values(data: bytes, position: int) -> tuple[list[tuple[bytes, bytes, bytes]], int]:
    """Read the complete records of memcached's reply to ``gets`` from a position on.

    :return: keys with their records and their tokens for ``cas``; and the position after them, of
        what is anything else: the end, an error, a record that is incomplete, damaged or has flags.
    """
    values = []
    while head := _HEAD.match(data, position):
        start = head.end()
        stop = start + int(head[2])
        if data[stop : stop + 2] != b"\r\n":
            break
        values.append((head[1], data[start:stop], head[3]))
        position = stop + 2
    return values, position


def read_replies(data: bytes, position: int) -> tuple[list[bytes | int | None], int]:
    """Read the complete replies of Redis from a position on: strings, integers and nulls.

    :return: the replies; and the position after them, of what is anything else: an error, another
        type, a reply that is incomplete or damaged.
    """
    replies: list[bytes | int | None] = []
    while head := _REPLY.match(data, position):
        stop = head.end()
        size, number, text = head.groups()
        if size is not None:
            start, stop = stop, stop + int(size)
            text = data[start:stop]
            if data[stop : stop + 2] != b"\r\n":
                break
            stop += 2
        replies.append(text if number is None else int(number))
        position = stop
    return replies, position


def read_tracked(data: bytes, position: int) -> tuple[list[bytes | int | str | None], int]:
    """Read replies as `read_replies` does, and messages that one key was invalidated among them.

    :return: the replies, with the keys in the place of the messages, as str; and the position.
    """
    replies, position = read_replies(data, position)
    every: list[bytes | int | str | None] = [*replies]
    while head := _INVALIDATION.match(data, position):
        if len(head[2]) != int(head[1]):
            break
        every.append(head[2].decode("ascii"))
        replies, position = read_replies(data, head.end())
        every += replies
    return every, position
