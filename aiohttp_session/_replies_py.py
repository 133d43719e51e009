"""What memcached and Redis reply: the reference implementation."""

from __future__ import annotations

import re

__all__ = ("read_replies", "read_values")

_HEAD = re.compile(rb"VALUE ([!-~\x80-\xff]+) 0 ([0-9]{1,9}) ([0-9]{1,20})\r\n")
_REPLY = re.compile(rb"(?:\$([0-9]{1,9})|:(-?[0-9]{1,18})|\+([^\r\n]*)|\$-1|_)\r\n")


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
