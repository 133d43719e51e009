"""Sessions inside the cookie."""

from __future__ import annotations

import abc

from aiohttp import web

from ._core import Session
from .lifecycle import LifecycleStorage
from .log import log


class CookieStorage(LifecycleStorage):
    """A storage that keeps the session itself in the cookie.

    A storage of this kind says how the payload is made into a cookie value and back: `seal` and
    `open`.
    """

    _UNREADABLE = "The session cookie could not be read; starting with a fresh session"

    @abc.abstractmethod
    def seal(self, payload: bytes) -> str:
        """Make a cookie value of a payload."""

    @abc.abstractmethod
    def open(self, cookie: str) -> tuple[bytes | str, int | None] | None:
        """Return the payload and the Unix time of its sealing, if known.

        None if the cookie was not made by `seal`: it is an attacker's text, nothing may be raised.
        """

    async def load_session(self, request: web.Request) -> Session:
        """Return the session in the cookie, or a new one if there is none or it is not valid."""
        cookie = self.load_cookie(request)
        if cookie is not None:
            opened = self.open(cookie)
            if opened is not None:
                payload, sealed_at = opened
                session = self._restore(None, payload, sealed_at)
                if session is not None:
                    return session
            log.warning(self._UNREADABLE)
        return Session(None, data=None, new=True, max_age=self.max_age)

    async def save_session(
        self, request: web.Request, response: web.StreamResponse, session: Session
    ) -> None:
        """Set the cookie, or delete it if the session is empty."""
        if session.empty and session.new and not self._has_cookie(request, response):
            return
        self.save_cookie(response, self._cookie_value(session), max_age=self._time_left(session))

    def _cookie_value(self, session: Session) -> str:
        if session.empty:
            return ""
        return self.seal(self._make_payload(session))
