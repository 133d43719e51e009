"""Sessions inside the cookie."""

from __future__ import annotations

import abc
import logging
import time

from aiohttp import web

from ._core import Session
from ._options import Unpack, show_options
from .lifecycle import CLOCK_SKEW, LifecycleOptions, LifecycleStorage
from .log import RateLimited


@show_options
class CookieStorage(LifecycleStorage):
    """The base of storages that keep the session itself in the cookie.

    A subclass says how a payload becomes a cookie value, and back: `seal` and `open`.
    """

    _UNREADABLE = "The session cookie could not be read; starting with a fresh session"
    _AUTHENTICATED = True  # what times are in the payload were written by this application

    def __init__(self, **options: Unpack[LifecycleOptions]) -> None:
        super().__init__(**options)
        self._unreadable = RateLimited(logging.WARNING, self._UNREADABLE, seconds=1)

    @abc.abstractmethod
    def seal(self, payload: bytes) -> str:
        """Turn a payload into a cookie value."""

    @abc.abstractmethod
    def open(self, cookie: str) -> tuple[bytes | str, int | None] | None:
        """Return the payload and the Unix time of its sealing, if known.

        None if `seal` did not make the cookie. The text may be an attacker's: raise nothing.
        """

    async def load_session(self, request: web.Request) -> Session:
        """Return the session in the cookie, or a new one if there is none or it is not valid."""
        cookie = self.load_cookie(request)
        if cookie is not None:
            opened = self.open(cookie)
            if opened is not None:
                payload, sealed_at = opened
                session = self._restore(None, payload, sealed_at)
                if session is not None and (
                    # Its seal's time was looked at, and limits count from no other. Most are such.
                    (sealed_at is not None and session._issued is None)
                    or not self._AUTHENTICATED
                    or not self._is_of_the_future(session, sealed_at)
                ):
                    return session
            self._unreadable.log()
        return Session(None, data=None, new=True, max_age=self.max_age)

    def _is_of_the_future(self, session: Session, sealed_at: int | None) -> bool:
        """Tell whether a limit counts from a time to come, and so would come too late or never.

        A clock that was wrong once would have made cookies that outlive every limit.
        """
        latest = time.time() + CLOCK_SKEW
        issued = session._issued
        ages = sealed_at is None and session.max_age is not None  # else the seal's time counts
        return (issued is not None and issued > latest) or (ages and session.created > latest)

    async def save_session(
        self, request: web.Request, response: web.StreamResponse, session: Session
    ) -> None:
        """Set the cookie, or delete it if the session is empty."""
        if session.new and session.empty and not self._has_cookie(request, response):
            return
        self.save_cookie(response, self._cookie_value(session), max_age=self._time_left(session))

    def _cookie_value(self, session: Session) -> str:
        if session.empty:
            return ""
        return self.seal(self._make_payload(session))
