"""Cookie text, in and out: the reference implementation of ``_cookies_c``."""

from __future__ import annotations

import re
from functools import lru_cache

_is_name = lru_cache(maxsize=64)(re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII).fullmatch)
_is_token = re.compile(r"[\w!#$%&'*+.^`|~:-]+", re.ASCII).fullmatch

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

_ESCAPES = {code: f"\\{code:03o}" for code in (*range(32), ord(","), ord(";"), *range(127, 256))}
_ESCAPES |= {ord('"'): '\\"', ord("\\"): "\\\\"}


def find_cookie(header: str, name: str) -> str | bool | None:
    """Find the value of one cookie in a Cookie header.

    :param header: the first Cookie header of a request.
    :param name: the cookie's name.
    :return: what ``request.cookies.get(name)`` returns in aiohttp 3.13.3 and later, or False when
        the header (or the name) has a shape that is left to aiohttp's own parser.
    """
    if not (header.isascii() and header.isprintable() and _is_name(name)):
        return False
    if '"' in header or "\\" in header or header.count(" ") != header.count("; "):
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


def _find_among_odd(header: str, name: str) -> str | bool | None:
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
    value = quoted[1:-1]
    if r"\\" not in value:  # then the escapes of a JSON cookie can go one kind after the other
        value = value.replace(r"\"", '"').replace(r"\054", ",")
    if "\\" not in value:
        return value
    value = _sub_escape(_unescape, value)
    # Newer versions of Python refuse control characters here.
    return False if _hides_control(value) else value


def _unescape(escape: re.Match[str]) -> str:
    return chr(int(escape[1], 8)) if escape[1] else escape[2]


def quote(value: str) -> str:
    """Write a cookie value as ``http.cookies`` does.

    Values outside of the token alphabet go into double quotes, with octal escapes.
    """
    if _is_token(value):
        return value
    if value.isascii() and value.isprintable():
        for character in '\\",;':
            value = value.replace(character, _ESCAPES[ord(character)])
        return f'"{value}"'
    return f'"{value.translate(_ESCAPES)}"'
