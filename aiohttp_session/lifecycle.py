"""How long a session lives, and its payload."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from ._core import Session, decode, dumps, encode, payload_of, restore
from ._options import Unpack, show_options
from ._owner import is_owner
from .storage import AbstractStorage, CookieOptions

CLOCK_SKEW = 60  # seconds: how far in the future a cookie may have been sealed


class LifecycleOptions(CookieOptions, total=False):
    """The options of `LifecycleStorage`, to forward."""

    touch_after: int | None
    lifetime: int | None


@show_options
class LifecycleStorage(AbstractStorage):
    """The base of storages that limit how long a session lives.

    :param touch_after: seconds after its last save when a session that is only read is saved
        again, so that it stays alive as long as it is used; by default only changes are saved.
    :param lifetime: seconds after its creation at which a session expires, however much it is
        used (OWASP session management: absolute timeout); by default never.
    :raises ValueError: if either is negative.
    """

    def __init__(
        self,
        *,
        touch_after: int | None = None,
        lifetime: int | None = None,
        **options: Unpack[CookieOptions],
    ) -> None:
        super().__init__(**options)
        for name, seconds in (("touch_after", touch_after), ("lifetime", lifetime)):
            if seconds is not None and seconds < 0:
                raise ValueError(f"{name} must be a number of seconds, not {seconds!r}")
        self._touch_after = touch_after
        self._lifetime = lifetime

    def _restore(
        self, identity: str | None, payload: str | bytes, sealed_at: int | None = None
    ) -> Session | None:
        """Make a session of its payload; None if that is damaged, or was sealed too long ago."""
        session = issued = None
        if self._lifetime is None and self._decoder is decode:
            session = restore(payload, identity, self.max_age)
            if session is not None and self._touch_after is None and session.max_age is None:
                return session  # most have nothing to be asked about time
        if session is None:
            data = self._read_payload(payload)
            if data is None:
                return None
            max_age = data.get("max_age", self.max_age)
            session = Session(identity, data=data, new=False, max_age=max_age)
            issued = data.get("issued")
            _restore_owner(session, data)
        if sealed_at is not None and session.max_age is not None:
            idle = int(time.time()) - sealed_at
            if not -CLOCK_SKEW <= idle <= session.max_age:
                return None
        if self._lifetime is not None and not session.empty:
            session._issued = session.created if issued is None else issued
            if time.time() - session._issued >= self._lifetime:
                session = Session(identity, data=None, new=False, max_age=session.max_age)
                session._renew = True
        if self._touch_after is not None and not session.empty:
            age = time.time() - session.created
            # Saved in the future: the clock was set back, but the store's own goes on.
            session._touch = age > self._touch_after or age < -CLOCK_SKEW
        return session

    def _read_payload(self, payload: str | bytes) -> Mapping[str, Any] | None:
        """Decode a payload; None unless it is an object with members of the right types."""
        try:
            if self._decoder is decode:
                data = decode(payload)
            elif isinstance(payload, str):
                data = self._decoder(payload)
            else:
                data = self._decoder(payload.decode("utf-8"))
            return data if _is_payload(data) else None
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None

    def _payload_data(self, session: Session) -> Mapping[str, Any]:
        # What an overridden method returns may be somebody's own: it isn't changed here.
        data: Mapping[str, Any] = self._get_session_data(session)
        if not data:
            return data
        if session.max_age != self.max_age:
            data = {**data, "max_age": session.max_age}
        if session._owner is not None:
            data = {**data, "owner": session._owner}
            if session._listed is not None and session._listed[1] is not None:
                data = {**data, "listed": session._listed[1]}
        if self._lifetime is not None:
            if session._issued is None:
                session._issued = int(time.time())
            data = {**data, "issued": session._issued}
        return data

    def _make_payload(self, session: Session) -> bytes:
        is_plain = self._encoder is dumps
        if (
            is_plain
            and self._lifetime is None
            # Subclasses may have it return something else.
            and type(self)._get_session_data is AbstractStorage._get_session_data
            and (usual := payload_of(session, self._max_age)) is not None
        ):
            return usual
        data = self._payload_data(session)
        if is_plain:
            return encode(data)
        payload = self._encoder(data)
        return payload.encode("utf-8") if isinstance(payload, str) else payload

    def _time_left(self, session: Session) -> int | None:
        """Return the seconds that a session lives from now if it is not saved again."""
        max_age = session.max_age
        if self._lifetime is None or session._issued is None:
            return max_age
        ends = session._issued + self._lifetime
        # Never more than a lifetime, should the clock have been set back since.
        left = max(0, min(math.ceil(ends - time.time()), math.ceil(self._lifetime)))
        return left if max_age is None else min(max_age, left)

    def _has_cookie(self, request: web.Request, response: web.StreamResponse) -> bool:
        """Tell whether the client has a cookie, or is about to get one."""
        return self.load_cookie(request) is not None or self._cookie_name in response.cookies

    def _replace_session(
        self, request: web.Request, session: Session, previous: object | None
    ) -> None:
        """Have the save of a new session end the one that came with the request."""
        session._replaces = self.load_cookie(request)


def _restore_owner(session: Session, data: Mapping[str, Any]) -> None:
    """Give a session its owner, unless it is over by its age: what comes next is another one."""
    age = int(time.time() - (data.get("created") or 0))
    if data and session.max_age is not None and age > session.max_age:
        session._renew = True
    elif is_owner(owner := data.get("owner")):
        session._owner, session._listed = owner, (owner, data.get("listed"))


def _is_payload(data: Any) -> bool:
    """Tell whether a payload has members of the right types, which TypeError denies as well."""
    if not isinstance(data.get("session"), (dict, Mapping, type(None))):
        return False
    times = (data.get("created"), data.get("issued"), data.get("max_age"), data.get("listed"))
    return all(value is None or -(2**53) < value < 2**53 for value in times)
