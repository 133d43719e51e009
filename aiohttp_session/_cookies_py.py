"""Cookie text, in and out: the reference implementation of ``_cookies_c``."""

from __future__ import annotations

import re
import string
from functools import lru_cache
from typing import Any, Literal

__all__ = ("find_cookie", "find_strict", "join_token", "quote", "same_items")

_is_name = lru_cache(maxsize=64)(re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII).fullmatch)
# Characters to delete from bytes, which is the fastest way to see whether there are others.
_PRINTABLE = bytes(range(ord(" "), ord("~") + 1))
_TOKEN = f"{string.ascii_letters}{string.digits}!#$%&'*+-.^_`|~:".encode()

# One pair, where it is certain what aiohttp's own pattern makes of it.
_match_pair = re.compile(
    r"""
    [ ;]*
    (?: \Z
    |   (?P<name>[^ =;"\\]+)
        (?: (?![ ]*=)(?=[ ;]|\Z)        # no value
        |   [ ]*=[ ]*(?P<quoted>"[^"\\]*(?:\\.[^"\\]*)*")(?=[ ;]|\Z)
        |   [ ]*=[ ]*(?P<plain>[^ ;"\\]*)(?=;|\Z)
        |   [ ]*=[ ]*(?P<spaced>[^ ;"\\]+)(?=[ ])
        |   =(?P<odd>(?!")[^ ;"\\]*["\\][^;]*)  # taken as it is, up to the semicolon
        )
    |   =[^ ;"\\]*(?=;|\Z)              # no name
    |   [^ =;"\\]*["\\][^;]*            # not a name: dropped up to the semicolon
    )
    """,
    re.VERBOSE,
).match
_sub_escape = re.compile(r"\\(?:([0-3][0-7][0-7])|(.))").sub
_hides_control = re.compile(r"[\x00-\x1f\x7f]").search

_ESCAPES = {"\\": r"\\", '"': r"\"", ",": r"\054", ";": r"\073"}  # backslashes go first


def find_cookie(header: str, name: str) -> str | Literal[False] | None:
    """Find the value of one cookie in a Cookie header.

    :param header: the first Cookie header of a request.
    :param name: the cookie's name.
    :return: what ``request.cookies.get(name)`` returns in aiohttp 3.13.3 and later, or False when
        the header (or the name) has a shape that is left to aiohttp's own parser.
    """
    if not (header.isascii() and _is_name(name)) or header.encode().translate(None, _PRINTABLE):
        return False
    if '"' in header:
        found = _find_quoted(header, name)
        return _find_among_odd(header, name) if found is None else found
    if not _is_regular(header):
        return _find_among_odd(header, name)
    end = len(header)
    while (start := header.rfind(name, 0, end)) >= 0:
        after = start + len(name)
        if start == 0 or header[start - 1] in "; ":
            if header.startswith("=", after):
                stop = header.find(";", after)
                return header[after + 1 :] if stop < 0 else header[after + 1 : stop]
            if after == len(header) or header[after] == ";":
                return ""
        end = after - 1
    return None


def find_strict(header: str, name: str) -> str | Literal[False] | None:
    """Find the value of one cookie in a Cookie header as browsers write it (RFC 6265bis, 5.8.3).

    A pair ends at a semicolon and nowhere else, its name goes up to the first ``=``, and spaces
    and tabs around either are no part of them.

    :return: without the quotes and escapes of `quote`; None if the header has no such cookie,
        False if it has several.
    """
    found = None
    start = header.find(name)
    while start >= 0:
        stop = header.find(";", start + len(name))
        if stop < 0:
            stop = len(header)
        pair_name, equals, value = header[header.rfind(";", 0, start) + 1 : stop].partition("=")
        if equals and pair_name.strip(" \t") == name:
            if found is not None:
                return False
            found = value.strip(" \t")
        start = header.find(name, stop + 1)
    if found is None or len(found) < 2 or not found[0] == found[-1] == '"':
        return found
    return _sub_escape(_unescape, found[1:-1])


def _is_regular(header: str) -> bool:
    """Tell whether semicolons alone separate the pairs of a header without quotes."""
    return "\\" not in header and header.count(" ") == header.count("; ")


def _find_quoted(header: str, name: str) -> str | Literal[False] | None:
    """Find a cookie that is the only quoted one, as base64 with padding and JSON are."""
    before, found, rest = header.partition(f'{name}="')
    if not found or before[-2:] not in {"", "; "} or not _is_regular(before):
        return None
    plain = rest.replace(r"\\", "  ").replace(r"\"", "  ") if "\\" in rest else rest
    end = plain.find('"')
    after = rest[end + 1 :]
    if end < 0 or after[:1] not in {"", ";"} or '"' in after or name in after:
        return None
    return _unquote(rest[:end]) if _is_regular(after) else None


def _find_among_odd(header: str, name: str) -> str | Literal[False] | None:
    found = None
    position = 0
    while position < len(header):
        pair = _match_pair(header, position)
        if pair is None:
            return False
        position = pair.end()
        if (word := pair["spaced"]) is not None and (len(word) == 3 or word[-1] == ","):
            return False  # it could be a date, which may hold spaces
        if pair["name"] == name:
            found = pair
    if found is None:
        return None
    quoted, plain, spaced, odd = found.group("quoted", "plain", "spaced", "odd")
    if quoted is None:
        return odd.rstrip(" ") if odd else plain or spaced or ""
    return _unquote(quoted[1:-1])


def _unquote(value: str) -> str | Literal[False]:
    """Undo the escapes of a quoted value; False if it hides a control character."""
    if "\\" not in value:
        return value
    # Between escaped backslashes, the escapes of a JSON cookie can go one kind after the other.
    parts = [part.replace(r"\"", '"').replace(r"\054", ",") for part in value.split(r"\\")]
    if not any("\\" in part for part in parts):
        return "\\".join(parts)
    value = _sub_escape(_unescape, value)
    # Newer versions of Python refuse control characters here.
    return False if _hides_control(value) else value


def _unescape(escape: re.Match[str]) -> str:
    return chr(int(escape[1], 8)) if escape[1] else escape[2]


def quote(value: Any) -> str | None:
    """Write a cookie value as ``http.cookies`` does.

    Values outside of the token alphabet go into double quotes, with octal escapes.

    :return: None for what is no printable ASCII: versions of ``http.cookies`` differ about it.
    """
    if type(value) is not str or not value.isascii():
        return None
    special = value.encode().translate(None, _TOKEN)
    if value and not special:
        return value
    if special.translate(None, _PRINTABLE):
        return None
    for char, escape in _ESCAPES.items():
        if char in value:
            value = value.replace(char, escape)
    return f'"{value}"'


def join_token(prefix: str, text: str, limit: int) -> str | None:
    """Return a prefix with a text behind it, such as a session id; None if that is no token.

    :param limit: characters that the text may have.
    """
    return prefix + text if quote(text) == text and len(text) <= limit else None


def same_items(one: dict[Any, Any], other: object) -> bool:
    """Tell whether a dict has the items of another one, whatever a subclass makes of ``==``.

    It is quick to see for a copy.
    """
    return dict.__eq__(one, other) is True
