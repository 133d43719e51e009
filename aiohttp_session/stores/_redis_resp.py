"""RESP, the protocol of Redis: what `read_replies`, which is compiled, leaves over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

_LINE_LIMIT = 64 * 1024  # bytes

# A server that isn't, or is no longer, the one in charge: it did nothing.
_MISPLACED = {
    *("ReadOnlyError", "MovedError", "AskError", "TryAgainError"),
    *("MasterDownError", "ClusterDownError"),
}


class ErrorReply:
    """A reply that says that the server did not do a command, and why."""

    def __init__(self, text: bytes) -> None:
        self.text = text


class Push:
    """What a server says without being asked (RESP3): its kind and its arguments."""

    def __init__(self, message: list[Any]) -> None:
        self.message = message


def read_odd(data: bytes, position: int) -> tuple[Any, int] | None:
    """Read a reply that `read_replies` does not take: an error, an aggregate or a push.

    :return: the reply, and the position after it; None if it is incomplete.
    :raises ValueError: if it is none of these.
    """
    end = data.find(b"\r\n", position)
    if end < 0:
        if len(data) - position > _LINE_LIMIT or data[position : position + 1] not in _KINDS:
            raise ValueError
        return None
    read = _KINDS.get(data[position : position + 1])
    if read is None:
        raise ValueError
    return read(data, data[position + 1 : end], end + 2)


def missing(reply: bytes) -> int:
    """Return how many bytes a reply lacks that has begun; 0 if it doesn't tell yet."""
    line, end, rest = reply.partition(b"\r\n")
    if end and line.startswith(b"$") and line[1:].isdigit() and len(line) < 11:
        return max(0, int(line[1:]) + len(b"\r\n") - len(rest))
    return 0


def is_reply(error: Exception) -> bool:
    """Tell whether an error of the client's is the server's answer to one command."""
    return any(kind.__name__ == "ResponseError" for kind in type(error).__mro__)


def is_misplaced(error: Any) -> bool:
    """Tell whether a server did not do a command because another one is in charge."""
    return type(error).__name__ in _MISPLACED


def is_asking(error: Exception) -> bool:
    """Tell whether a slot of a cluster is on its way to another node."""
    return type(error).__name__ == "AskError"


def is_final(error: Exception) -> bool:
    """Tell whether a server did not do a command, and no other would."""
    return is_reply(error) and not is_misplaced(error)


def _read_error(data: bytes, line: bytes, position: int) -> tuple[Any, int]:
    return ErrorReply(line), position


def _read_text(data: bytes, line: bytes, position: int) -> tuple[Any, int]:
    return line, position


def _read_integer(data: bytes, line: bytes, position: int) -> tuple[Any, int]:
    return int(line), position


def _read_null(data: bytes, line: bytes, position: int) -> tuple[Any, int]:
    return None, position


def _read_string(data: bytes, line: bytes, position: int) -> tuple[Any, int] | None:
    if line == b"-1":
        return None, position
    size = _size(line)
    end = position + size
    if len(data) < end + 2:
        if not b"\r\n".startswith(data[end:]):
            raise ValueError
        return None
    if data[end : end + 2] != b"\r\n":
        raise ValueError
    return data[position:end], end + 2


def _read_array(data: bytes, line: bytes, position: int) -> tuple[Any, int] | None:
    if line == b"-1":
        return None, position
    return _read_items(data, _size(line), position)


def _read_map(data: bytes, line: bytes, position: int) -> tuple[Any, int] | None:
    found = _read_items(data, 2 * _size(line), position)
    if found is None:
        return None
    items, position = found
    return list(zip(items[::2], items[1::2], strict=True)), position


def _read_push(data: bytes, line: bytes, position: int) -> tuple[Any, int] | None:
    found = _read_items(data, _size(line), position)
    return None if found is None else (Push(found[0]), found[1])


def _read_items(data: bytes, count: int, position: int) -> tuple[list[Any], int] | None:
    items = []
    for _ in range(count):
        if position == len(data):
            return None
        found = read_odd(data, position)
        if found is None:
            return None
        item, position = found
        items.append(item)
    return items, position


def _size(line: bytes) -> int:
    if not line.isdigit() or len(line) > 9:
        raise ValueError
    return int(line)


_Reader: TypeAlias = Callable[[bytes, bytes, int], "tuple[Any, int] | None"]
_KINDS: dict[bytes, _Reader] = {
    b"-": _read_error,
    b"+": _read_text,
    b":": _read_integer,
    b"_": _read_null,
    b"$": _read_string,
    b"*": _read_array,
    b"%": _read_map,
    b"~": _read_array,
    b">": _read_push,
}
