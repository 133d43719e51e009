"""Set-Cookie lines, written once and reused."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping
from http.cookies import Morsel
from typing import Any

from aiohttp import web

from ._core import quote, same_items
from .cookie_rules import objection
from .log import log

_PRINTABLE = bytes(range(ord(" "), ord("~") + 1))
_EPOCH = "Thu, 01 Jan 1970 00:00:00 GMT"
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class CookieWriter:
    """Puts one storage's cookie on responses, just as ``response.set_cookie`` would."""

    def __init__(self) -> None:
        self._name = ""
        self._params: dict[str, Any] = {}
        self._second = 0
        self._styles: dict[Any, _Style] = {}
        self._warned = False

    def write(
        self,
        response: web.StreamResponse,
        name: str,
        value: str,
        params: Mapping[str, Any],
        max_age: float | None = None,
    ) -> int:
        """Set the cookie on a response; an empty value deletes it.

        :param params: arguments of ``response.set_cookie``.
        :param max_age: seconds; if not None, it replaces that of the params and adds ``expires``.
        :return: the length of the cookie in bytes: name, value and attributes.
        :raises http.cookies.CookieError: for a name that is reserved or no token.
        """
        if name != self._name or not same_items(self._params, params):
            self._adopt(name, params)
        if max_age is not None and (second := int(time.time())) != self._second:
            self._second = second  # of which ``expires`` is
            self._styles.clear()
        lifetime = max_age if value else "delete"
        style = self._styles.get(lifetime) or self._make_style(lifetime)
        cookies = response.cookies
        if not _MORSEL_IS_KNOWN:
            return _write_plainly(response, name, value, style)
        if value:
            coded = quote(value)
            if coded is None or name in cookies:
                response.set_cookie(name, value, **style.params)
                if not style.partitioned:
                    return len(cookies[name].OutputString())
                coded = cookies.pop(name).coded_value
        else:
            coded = '""'
            cookies.pop(name, None)
        # As SimpleCookie does with a Morsel, after a look at its type; the name is not in there.
        cookies.setdefault(name, _WrittenMorsel.make(name, value, coded, style))
        return style.size + len(coded)

    def _adopt(self, name: str, params: Mapping[str, Any]) -> None:
        self._params, self._name = dict(params), name
        self._styles.clear()
        if not self._warned and (text := objection(name, params)) is not None:
            self._warned = True
            warnings.warn(text, stacklevel=2)

    def _make_style(self, lifetime: float | str | None) -> _Style:
        params = self._params
        if lifetime == "delete":
            params = {**params, "max_age": 0, "expires": _EPOCH}
        elif lifetime is not None:
            expires = _http_date(time.time() + float(lifetime))
            params = {**params, "max_age": lifetime, "expires": expires}
        style = self._styles[lifetime] = _Style(self._name, params)
        return style


class _Style:
    """The attributes of a cookie, and the text that aiohttp writes for them."""

    def __init__(self, name: str, params: Mapping[str, Any]) -> None:
        # The Morsel of a Python before 3.14 doesn't know the attribute.
        self.partitioned = bool(params.get("partitioned"))
        self.params = {key: value for key, value in params.items() if key != "partitioned"}
        response = web.StreamResponse()
        response.set_cookie(name, "v", **self.params)
        self.attributes = dict(response.cookies[name])
        if self.partitioned:
            self.attributes["partitioned"] = True
        self.tail = ""
        self.size = len(name) + len("=")  # in bytes, of all but the value
        if not _MORSEL_IS_KNOWN:
            return
        self.tail = _WrittenMorsel.make(name, "v", "v", self).write()[self.size + len("v") :]
        self.size += len(self.tail)


def _inside(name: str, kind: type[Any]) -> Any:
    """Return a private attribute of Morsel's, or an empty one if it isn't what is expected."""
    value = getattr(Morsel, name, None)
    return value if isinstance(value, kind) else kind()


class _WrittenMorsel(Morsel[str]):
    """A Morsel that has the text of its attributes at hand, as long as nobody changes them."""

    __slots__ = ("_coded_value", "_key", "_style", "_value")  # a dict would take 0.4 µs

    _key: str
    _value: str
    _coded_value: str
    _style: _Style | None

    _reserved = {**_inside("_reserved", dict), "partitioned": "Partitioned"}  # noqa: RUF012
    _flags = {*_inside("_flags", set), "partitioned"}  # noqa: RUF012

    __init__ = dict.__init__  # Morsel's would fill in attributes that the style has at hand

    @classmethod
    def make(cls, name: str, value: str, coded: str, style: _Style) -> _WrittenMorsel:
        """Make a Morsel of a style."""
        morsel: _WrittenMorsel = cls(style.attributes)
        morsel._key, morsel._value, morsel._coded_value = name, value, coded  # as __setstate__ does
        morsel._style = style
        return morsel

    def copy(self) -> _WrittenMorsel:
        """Copy the cookie, attributes and all."""
        return copy.copy(self)  # by way of __setstate__; Morsel's own wants a __dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._style = None

    def output(self, attrs: Any = None, header: str = "Set-Cookie:") -> str:
        style = self._style
        # As below, in one call less: it is this that aiohttp makes.
        if attrs is None and style is not None and same_items(self, style.attributes):
            return f"{header} {self._key}={self._coded_value}{style.tail}"
        return super().output(attrs, header)

    def OutputString(self, attrs: Any = None) -> str:  # noqa: N802 - Morsel's name
        style = self._style
        if attrs is None and style is not None and same_items(self, style.attributes):
            return f"{self._key}={self._coded_value}{style.tail}"
        return self.write(attrs)

    def write(self, attrs: Any = None) -> str:
        """Write the cookie from its attributes as they are."""
        return super().OutputString(attrs)


class _PartitionedMorsel(Morsel[str]):
    """A Morsel that is partitioned, whatever this version of ``http.cookies`` knows of that."""

    def OutputString(self, attrs: Any = None) -> str:  # noqa: N802 - Morsel's name
        return f"{super().OutputString(attrs)}; Partitioned"


def _write_plainly(response: web.StreamResponse, name: str, value: str, style: _Style) -> int:
    """Set a cookie by public names alone, which takes several times as long."""
    response.cookies.pop(name, None)
    response.set_cookie(name, value, **style.params)
    if style.partitioned:
        plain = response.cookies.pop(name)
        morsel = _PartitionedMorsel()
        morsel.set(name, value, plain.coded_value)
        morsel.update(plain)
        response.cookies.setdefault(name, morsel)
    return len(response.cookies[name].OutputString())


def _is_morsel_known() -> bool:
    """Tell whether a Morsel is inside as `_WrittenMorsel` takes it to be."""
    attributes: dict[str, Any] = {"path": "/", "max-age": 60, "secure": True}
    plain: Morsel[str] = Morsel()
    plain.set("name", "value", "coded")
    plain.update(attributes)
    attributes["partitioned"] = True
    try:
        written = _WrittenMorsel(attributes)
        written.__setstate__({"key": "name", "value": "value", "coded_value": "coded"})
        texts = (written._key, written._value, written._coded_value)
        parts = {*written.write().split("; ")}
    except Exception:  # noqa: BLE001 - whatever another inside makes of it
        return False
    expected = {*plain.OutputString().split("; "), "Partitioned"}
    return texts == ("name", "value", "coded") and parts == expected


_MORSEL_IS_KNOWN = _is_morsel_known()
if not _MORSEL_IS_KNOWN:
    log.info("The Morsel of this http.cookies is not known: cookies are written more slowly")


def _http_date(timestamp: float) -> str:
    """Write a time as the reference package does, with dashes, in any locale."""
    moment = time.gmtime(timestamp)
    day, month = _DAYS[moment.tm_wday], _MONTHS[moment.tm_mon - 1]
    return time.strftime(f"{day}, %d-{month}-%Y %H:%M:%S GMT", moment)
