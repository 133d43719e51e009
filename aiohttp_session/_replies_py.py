"""Records in what memcached replies: the reference implementation."""

from __future__ import annotations

import re

_HEAD = re.compile(rb"VALUE ([!-~\x80-\xff]+) 0 ([0-9]{1,9})\r\n")


def read_values(data: bytes, position: int) -> tuple[list[tuple[bytes, bytes]], int]:
    """Read the complete records of a reply to ``get`` from a position on.

    :return: keys with their records; and the position after them, of what is anything else: the
        end, an error, a record that is incomplete, damaged or has flags.
    """
    values = []
    while head := _HEAD.match(data, position):
        start = head.end()
        stop = start + int(head[2])
        if data[stop : stop + 2] != b"\r\n":
            break
        values.append((head[1], data[start:stop]))
        position = stop + 2
    return values, position
