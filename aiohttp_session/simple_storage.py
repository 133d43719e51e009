"""Sessions in a plain cookie."""

from __future__ import annotations

from ._core import Session, dumps
from .sealed_storage import CookieStorage


class SimpleCookieStorage(CookieStorage):
    """Keep the session as plain JSON in the cookie, for development and tests.

    Anybody can read and change it: never use it to decide who a user is.

    Takes the options of `AbstractStorage` and `LifecycleStorage`.
    """

    _AUTHENTICATED = False

    def seal(self, payload: bytes) -> str:
        """Return the payload as it is."""
        return payload.decode("utf-8")

    def open(self, cookie: str) -> tuple[str, None]:
        """Return the cookie as it is."""
        return cookie, None

    def _cookie_value(self, session: Session) -> str:
        # The encoder's own text, which is ASCII by default; an emptied session is written as {}.
        data = self._payload_data(session)
        if not data and type(data) is dict and self._encoder is dumps:
            return "{}"
        text = self._encoder(data)
        return text if isinstance(text, str) else self.seal(text)
