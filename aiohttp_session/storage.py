"""The session's cookie and its options, which all storages share."""

from __future__ import annotations

import abc
import logging
import re
from collections.abc import Callable
from http.cookies import CookieError
from typing import Any, Literal, NoReturn, TypedDict

import aiohttp
from aiohttp import hdrs, web

from ._core import Session, decode, dumps, find_cookie, find_strict
from ._options import show_options
from ._set_cookie import CookieWriter
from .cookie_rules import check_texts, has_prefix
from .log import RateLimited, log

# The parser whose results find_cookie reproduces is that of aiohttp 3.13.3 and later.
_PARSER_IS_KNOWN = tuple(map(int, re.findall(r"\d+", aiohttp.__version__)[:3])) >= (3, 13, 3)
_COOKIE_LIMIT = 4096  # bytes: what a browser must keep at least (RFC 6265, 6.1)
_TOO_LARGE = (
    "The session cookie has %d bytes. Browsers drop cookies of more than %d, and the session with "
    "them: keep less in it, or use a server storage such as RedisStorage"
)
_SEVERAL = (
    "A request has several cookies of the session cookie's name; none is used, since one may have "
    "been planted"
)


class SessionData(TypedDict, total=False):
    """The payload of a record or a cookie."""

    created: int
    session: dict[str, Any]
    issued: int  # only with a `lifetime`
    owner: str  # only if it has one
    listed: int  # only with an owner, in server storages
    max_age: int | None  # only if it is not the storage's


class _CookieParams(TypedDict, total=False):
    domain: str | None
    max_age: int | None
    path: str
    secure: bool | None
    httponly: bool
    samesite: str | None
    expires: str
    partitioned: bool


class CookieOptions(TypedDict, total=False):
    """The options of `AbstractStorage`, to forward."""

    cookie_name: str
    domain: str | None
    max_age: int | None
    path: str
    secure: bool | None
    httponly: bool
    samesite: str | None
    partitioned: bool
    strict_cookies: bool
    encoder: Callable[[object], str | bytes]
    decoder: Callable[[str], Any]


@show_options
class AbstractStorage(abc.ABC):
    """The base of all storages: where sessions are kept, and the cookie that leads to them.

    A storage of your own implements `load_session` and `save_session`, by way of `load_cookie`
    and `save_cookie`.

    Options that make browsers reject the cookie cause a UserWarning when
    the first one is written: `cookie_params` may change until then.

    :param cookie_name: the cookie's name. With ``__Host-`` in front, browsers take it from this
        host alone; it needs ``secure`` (RFC 6265bis, 4.1.3).
    :param domain: the hosts that receive the cookie; by default only the one that set it.
    :param max_age: seconds after its last save at which a session expires. By default it ends
        with the browser's own session.
    :param path: the part of the site that receives the cookie.
    :param secure: send the cookie over HTTPS only.
    :param httponly: hide the cookie from JavaScript.
    :param samesite: ``"Strict"``, ``"Lax"`` or ``"None"``; by default the browser decides.
    :param partitioned: keep the cookie apart for each top-level site (CHIPS); needs ``secure``.
        A name of its own keeps it from meeting older cookies that are not partitioned.
    :param strict_cookies: read the Cookie header as browsers write it (RFC 6265bis, 5.8.3) and
        not as aiohttp does, where blanks and quotes in another cookie's value can hide or plant
        a session's. If two cookies have the name, neither is used. ``__Host-`` and other
        prefixed names are always read so.
    :param encoder: turns the payload into text: ``{"created": int, "session": dict}``; by default
        JSON, just as the standard ``json`` but compact.
    :param decoder: the reverse of the encoder; ValueError means that the text is damaged.
    :raises ValueError: for a name, domain or path with characters that can't be in one, and for
        partitioned=True without ``secure``.
    """

    def __init__(
        self,
        *,
        cookie_name: str = "AIOHTTP_SESSION",
        domain: str | None = None,
        max_age: int | None = None,
        path: str = "/",
        secure: bool | None = None,
        httponly: bool = True,
        samesite: str | None = None,
        partitioned: bool = False,
        strict_cookies: bool = False,
        encoder: Callable[[object], str | bytes] | None = None,
        decoder: Callable[[str], Any] | None = None,
        **misspelt: NoReturn,
    ) -> None:
        if misspelt:
            raise TypeError(f"{type(self).__name__} has no option {next(iter(misspelt))!r}")
        check_texts(cookie_name, domain, path)
        self._cookie_name = cookie_name
        self._cookie_params: _CookieParams = {
            "domain": domain,
            "max_age": max_age,
            "path": path,
            "secure": secure,
            "httponly": httponly,
            "samesite": samesite,
        }
        if partitioned:
            if not secure:
                raise ValueError("partitioned=True needs secure=True")
            self._cookie_params["partitioned"] = True
        self._strict_cookies = strict_cookies
        self._name_read = ""  # for which the next one finds the value
        self._find: Callable[[str, str], str | Literal[False] | None] = find_strict
        self._max_age = max_age
        # Typed as Any for subclasses written against the reference package, where it gives str.
        self._encoder: Any = dumps if encoder is None else encoder
        self._decoder: Callable[[str], Any] = decode if decoder is None else decoder
        self._writer = CookieWriter()
        self._too_large = RateLimited(logging.ERROR, _TOO_LARGE, seconds=60)
        self._several = RateLimited(logging.WARNING, _SEVERAL, seconds=1)

    @property
    def cookie_name(self) -> str:
        """The cookie's name."""
        return self._cookie_name

    @property
    def max_age(self) -> int | None:
        """Seconds after its last save at which a session expires; None means never."""
        return self._max_age

    @property
    def cookie_params(self) -> _CookieParams:
        """The cookie's attributes. A change in place holds for every later cookie."""
        return self._cookie_params

    def _get_session_data(self, session: Session) -> SessionData:
        """Return the payload of a session, with its live mapping; ``{}`` if that is empty."""
        if session.empty:
            return {}
        return {"created": session.created, "session": session._mapping}

    async def new_session(self) -> Session:
        """Make an empty session."""
        return Session(None, data=None, new=True, max_age=self.max_age)

    @abc.abstractmethod
    async def load_session(self, request: web.Request) -> Session:
        """Return the session of a request, or a new one."""

    @abc.abstractmethod
    async def save_session(
        self, request: web.Request, response: web.StreamResponse, session: Session
    ) -> None:
        """Save a changed session, and set its cookie on the response."""

    def load_cookie(self, request: web.Request) -> str | None:
        """Return the value of the session's cookie, or None if the request has none."""
        name = self._cookie_name
        if name is not self._name_read:
            self._find, self._name_read = self._choose_finder(name), name
        header = request.headers.get(hdrs.COOKIE)
        if header is None:
            return None
        value = self._find(header, name)
        if value is not False:
            return value
        if self._find is find_strict:
            self._several.log()
            return None
        try:
            return request.cookies.get(name)
        except CookieError:  # aiohttp before 3.12, for a foreign cookie with an illegal name
            return None

    def _choose_finder(self, name: str) -> Callable[[str, str], str | Literal[False] | None]:
        """Choose what finds a cookie of that name in a header; False means that it can't tell."""
        if self._strict_cookies or has_prefix(name):
            return find_strict
        return find_cookie if _PARSER_IS_KNOWN else lambda header, name: False

    def save_cookie(
        self, response: web.StreamResponse, cookie_data: str, *, max_age: int | None = None
    ) -> None:
        """Set the session's cookie on a response that is not prepared.

        :param cookie_data: the value; if empty, the cookie is deleted.
        :param max_age: seconds for which the browser keeps the cookie; by default as in
            `cookie_params`.
        :raises http.cookies.CookieError: if the cookie's name is reserved or no token.
        """
        size = self._writer.write(
            response, self._cookie_name, cookie_data, self._cookie_params, max_age
        )
        if size > _COOKIE_LIMIT:
            self._too_large.log(size, _COOKIE_LIMIT)

    async def _save_late(self, session: Session) -> None:
        """Keep what changed after the response's headers had been sent."""
        log.warning(
            "A session was changed after its response had been started. The change is lost: "
            "%s keeps it with the cookie, and the headers are sent",
            type(self).__name__,
        )
