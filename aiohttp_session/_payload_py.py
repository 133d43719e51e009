"""Sessions as JSON text: the reference implementation of ``_payload_c``.

The result is the standard json's, always; orjson does what it does without loss.
"""

from __future__ import annotations

import json
import re
from json.encoder import encode_basestring_ascii
from typing import Any

try:
    import orjson
except ImportError:  # pragma: no cover - PyPy has no orjson
    orjson = None  # type: ignore[assignment]

__all__ = ("decode", "dumps", "encode")

_DIGITS_TO_ZERO = bytes(ord("0") if chr(code) in "0123456789" else ord(" ") for code in range(256))
# Types whose every value orjson writes as json does, or refuses: integers beyond 64 bits are, and
# keys that are not str.
_SAME = frozenset((str, int, bool, type(None)))
_dump_text = json.JSONEncoder(separators=(",", ":")).encode
_sub_unprintable = re.compile("[^ -~]+").sub


def encode(data: Any) -> bytes:
    """Write JSON in as few bytes as possible, UTF-8.

    :raises TypeError: for a value that JSON can't hold; the message names the path to it.
    :raises ValueError: for a circular reference.
    """
    if orjson is not None and _is_plain(data):
        try:
            return orjson.dumps(data)
        except TypeError:  # too deep, or a lone surrogate
            pass
    return _dump(data).encode("ascii")


def dumps(data: Any) -> str:
    """Write JSON as compact, printable ASCII text, for a cookie; raises as `encode` does."""
    text = encode(data).decode("utf-8")
    if text.isascii() and "\x7f" not in text:
        return text
    return _sub_unprintable(lambda found: encode_basestring_ascii(found[0])[1:-1], text)


def decode(text: str | bytes) -> Any:
    """Read JSON as ``json.loads`` does, to the same result.

    :raises ValueError: if it is no JSON, or no UTF-8.
    """
    if isinstance(text, str):
        if not text.isascii():
            return json.loads(text)
        text = text.encode("ascii")
    # orjson makes floats of integers beyond 64 bits.
    if orjson is not None and b"0" * 19 not in text.translate(_DIGITS_TO_ZERO):
        try:
            return orjson.loads(text)
        except ValueError:  # NaN, 1E400, a lone surrogate; or no JSON at all
            pass
    return _load(text)


def _load(text: str | bytes) -> Any:
    return json.loads(text if isinstance(text, str) else text.decode("utf-8"))


def _is_plain(value: Any) -> bool:
    """Tell whether orjson writes the value just as json does, or refuses it."""
    kind = type(value)
    if kind in _SAME:
        return True
    if kind is float:
        return bool(value - value == 0.0)  # false for NaN and the infinities
    if kind is dict:
        value = value.values()
    elif kind is not list and kind is not tuple:
        return False
    if _SAME.issuperset(map(type, value)):
        return True
    try:
        for item in value:
            # Most items need no call.
            if type(item) not in _SAME and not _is_plain(item):
                return False
    except RecursionError:
        return False
    return True


def _dump(data: Any) -> str:
    try:
        return _dump_text(data)
    except (TypeError, ValueError) as error:
        if (found := _find_refused(data, "", ())) is not None:
            raise type(error)(found) from None
        raise


def _find_refused(value: Any, path: str, parents: tuple[int, ...]) -> str | None:
    """Describe the first value that json refuses, with the path to it from the session."""
    if isinstance(value, (str, int, float, type(None))):
        return None
    if id(value) in parents:
        return f"{path}: circular reference"
    parents = (*parents, id(value))
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, (str, int, float, type(None))):
                return f"{path}: {type(key).__name__} is not a JSON object key"
            step = f"{path}[{key!r}]" if path else str(key)
            if (found := _find_refused(item, step, parents)) is not None:
                return found
        return None
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if (found := _find_refused(item, f"{path}[{index}]", parents)) is not None:
                return found
        return None
    return f"{path}: {type(value).__name__} is not JSON serializable"
