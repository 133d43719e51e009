"""What storages share: cookie options, and how a session is loaded and saved."""

from __future__ import annotations

import abc
import hashlib
import math
import random
import re
import time
import uuid
import warnings
from asyncio import Lock, sleep
from collections.abc import Awaitable, Callable, Mapping
from http.cookies import CookieError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict
from weakref import WeakValueDictionary

import aiohttp
from aiohttp import hdrs, web

from ._batch import PerLoop
from ._core import Session, decode, dumps, encode, find_cookie, quote, restore
from ._set_cookie import CookieWriter
from .log import log

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The parser whose results find_cookie reproduces is that of aiohttp 3.13.3 and later.
_PARSER_IS_KNOWN = tuple(map(int, re.findall(r"\d+", aiohttp.__version__)[:3])) >= (3, 13, 3)
_COOKIE_LIMIT = 4096  # bytes: what a browser must keep at least (RFC 6265, 6.1)
_KEY_LIMIT = 250  # bytes: memcached's
_MERGE_ATTEMPTS = 100
_EMPTIED = b"{}"
_CLOCK_SKEW = 60  # seconds: how far in the future a cookie may have been sealed


class SessionData(TypedDict, total=False):
    """The payload of a record or a cookie."""

    created: int
    session: dict[str, Any]
    issued: int  # only with a `lifetime`
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
    encoder: Callable[[object], str | bytes]
    decoder: Callable[[str], Any]


class LifecycleOptions(CookieOptions, total=False):
    """The options of `LifecycleStorage`, to forward."""

    touch_after: int | None
    lifetime: int | None


class ServerOptions(LifecycleOptions, total=False):
    """The options of `ServerStorage`, to forward."""

    key_factory: Callable[[], str]
    hash_ids: bool
    on_conflict: Literal["overwrite", "merge"]


class RemoteOptions(ServerOptions, total=False):
    """The options of `RemoteStorage`, to forward."""

    timeout: float


class _Stored(NamedTuple):
    """What a record says of a session."""

    items: dict[str, Any]
    max_age: int | None


class ConflictError(RuntimeError):
    """A session could not be merged, because other requests kept changing its record."""


class AbstractStorage(abc.ABC):
    """Where sessions are kept, and the cookie that leads to them.

    A storage of your own implements `load_session` and `save_session`, by way of `load_cookie`
    and `save_cookie`.

    :param cookie_name: the cookie's name. ``__Host-`` and ``__Secure-`` names are checked against
        what browsers ask of them (RFC 6265bis, 4.1.3).
    :param domain: the hosts that get the cookie; by default just the one that set it.
    :param max_age: seconds from its last save after which a session is over. By default it ends
        with the browser's own session.
    :param path: the part of the site that gets the cookie.
    :param secure: send the cookie over HTTPS only.
    :param httponly: hide the cookie from JavaScript.
    :param samesite: ``"Strict"``, ``"Lax"`` or ``"None"``; by default the browser decides.
    :param partitioned: keep the cookie apart for each top-level site (CHIPS); needs ``secure``.
    :param encoder: makes text of the payload, ``{"created": int, "session": dict}``; by default
        JSON, just as the standard ``json`` but compact.
    :param decoder: the reverse of the encoder; ValueError means that the text is damaged.
    :raises ValueError: for options that browsers refuse together.
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
        encoder: Callable[[object], str | bytes] | None = None,
        decoder: Callable[[str], Any] | None = None,
    ) -> None:
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
            self._cookie_params["partitioned"] = True
        _check_cookie(cookie_name, self._cookie_params)
        self._max_age = max_age
        # Typed as Any for subclasses written against the reference package, where it gives str.
        self._encoder: Any = dumps if encoder is None else encoder
        self._decoder: Callable[[str], Any] = decode if decoder is None else decoder
        self._writer = CookieWriter()
        self._size_reported = -math.inf

    @property
    def cookie_name(self) -> str:
        """The cookie's name."""
        return self._cookie_name

    @property
    def max_age(self) -> int | None:
        """Seconds from its last save after which a session is over; None is never."""
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
        """Keep a session that changed, and set its cookie on the response."""

    def load_cookie(self, request: web.Request) -> str | None:
        """Return the value of the session's cookie, or None if the request has none."""
        if _PARSER_IS_KNOWN:
            header = request.headers.get(hdrs.COOKIE)
            if header is None:
                return None
            value = find_cookie(header, self._cookie_name)
            if not isinstance(value, bool):
                return value
        try:
            return request.cookies.get(self._cookie_name)
        except CookieError:  # aiohttp before 3.12, for a foreign cookie with an illegal name
            return None

    def save_cookie(
        self, response: web.StreamResponse, cookie_data: str, *, max_age: int | None = None
    ) -> None:
        """Set the session's cookie on a response that is not prepared.

        :param cookie_data: the value; if empty, the cookie is deleted.
        :param max_age: seconds the browser keeps the cookie; by default as in `cookie_params`.
        :raises http.cookies.CookieError: if the cookie's name is reserved or no token.
        """
        size = self._writer.write(
            response, self._cookie_name, cookie_data, self._cookie_params, max_age
        )
        if size > _COOKIE_LIMIT and time.monotonic() - self._size_reported >= 60:
            self._size_reported = time.monotonic()
            log.error(
                "The session cookie has %d bytes. Browsers drop cookies of more than %d, and the "
                "session with them: keep less in it, or use a server storage such as RedisStorage",
                size,
                _COOKIE_LIMIT,
            )

    async def _save_late(self, session: Session) -> None:
        """Keep what changed after the response's headers had been sent."""
        log.warning(
            "A session was changed after its response had been started. The change is lost: "
            "%s keeps it with the cookie, and the headers are sent",
            type(self).__name__,
        )


def _check_cookie(name: str, params: _CookieParams) -> None:
    secure = params["secure"]
    if name.lower().startswith("__host-") and not (
        secure and params["path"] == "/" and not params["domain"]
    ):
        raise ValueError(f"cookie_name {name!r} needs secure=True, path='/' and no domain")
    if name.lower().startswith("__secure-") and not secure:
        raise ValueError(f"cookie_name {name!r} needs secure=True")
    samesite = params["samesite"]
    if samesite and samesite.lower() not in {"strict", "lax", "none"}:
        raise ValueError(f"samesite must be 'Strict', 'Lax', 'None' or None, not {samesite!r}")
    if samesite and samesite.lower() == "none" and not secure:
        warnings.warn(
            "Browsers drop a cookie with samesite='None' that has not secure=True", stacklevel=4
        )
    if "partitioned" in params and not secure:
        raise ValueError("partitioned=True needs secure=True")


class LifecycleStorage(AbstractStorage):
    """A storage that knows how long its sessions live.

    :param touch_after: seconds after its last save when a session that is only read is saved
        again, so that it stays alive as long as it is used; by default only changes are saved.
    :param lifetime: seconds from its creation after which a session is over, however much it is
        used (OWASP session management: absolute timeout); by default never.
    :raises ValueError: if one of them is negative.
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
        if session is None:
            data = self._read_payload(payload)
            if data is None:
                return None
            max_age = data.get("max_age", self.max_age)
            session = Session(identity, data=data, new=False, max_age=max_age)
            issued = data.get("issued")
        if sealed_at is not None and session.max_age is not None:
            idle = int(time.time()) - sealed_at
            if not -_CLOCK_SKEW <= idle <= session.max_age:
                return None
        if self._lifetime is not None and not session.empty:
            session._issued = session.created if issued is None else issued
            if time.time() - session._issued >= self._lifetime:
                session = Session(identity, data=None, new=False, max_age=session.max_age)
                session._renew = True
        if self._touch_after is not None and not session.empty:
            age = time.time() - session.created
            # Saved in the future: the clock was set back, but the store's own goes on.
            session._touch = age > self._touch_after or age < -_CLOCK_SKEW
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
        if data and session.max_age != self.max_age:
            data = {**data, "max_age": session.max_age}
        if data and self._lifetime is not None:
            if session._issued is None:
                session._issued = int(time.time())
            data = {**data, "issued": session._issued}
        return data

    def _make_payload(self, session: Session) -> bytes:
        data = self._payload_data(session)
        if self._encoder is dumps:
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


def _is_payload(data: Any) -> bool:
    """Tell whether a payload has members of the right types, which TypeError denies as well."""
    if not isinstance(data.get("session"), (dict, Mapping, type(None))):
        return False
    times = (data.get("created"), data.get("issued"), data.get("max_age"))
    return all(value is None or -(2**53) < value < 2**53 for value in times)


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


class ServerStorage(LifecycleStorage):
    """A storage that keeps sessions on a server, and their ids in the cookie.

    A storage of this kind implements five verbs: `read`, `create`, `update`, `swap` and `delete`.
    A TTL is in seconds, None is for ever.

    :param key_factory: makes the id of a new session; by default a random UUID (version 4). Ids
        must be impossible to guess, and are printable ASCII without spaces.
    :param hash_ids: keep records under the SHA-256 of their ids, so that a copy of the store
        holds nothing that can be used as a cookie.
    :param on_conflict: what a save does when another request changed the record after it was
        loaded here: ``"overwrite"`` replaces it; ``"merge"`` applies the keys that were set and
        deleted here to the newer record.
    """

    def __init__(
        self,
        *,
        key_factory: Callable[[], str] = lambda: uuid.uuid4().hex,
        hash_ids: bool = False,
        on_conflict: Literal["overwrite", "merge"] = "overwrite",
        **options: Unpack[LifecycleOptions],
    ) -> None:
        super().__init__(**options)
        if on_conflict not in {"overwrite", "merge"}:
            raise ValueError(f"on_conflict must be 'overwrite' or 'merge', not {on_conflict!r}")
        self._key_factory = key_factory
        self._hash_ids = hash_ids
        self._on_conflict = on_conflict
        # Of the keys that requests of this process are merging: they need not fight each other.
        self._merges: PerLoop[WeakValueDictionary[str, Lock]] = PerLoop(WeakValueDictionary)

    @abc.abstractmethod
    def read(self, key: str) -> Awaitable[bytes | None]:
        """Return the record under a key."""

    @abc.abstractmethod
    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        """Store a record under a key, whether or not there is one."""

    @abc.abstractmethod
    async def update(self, key: str, payload: bytes, ttl: int | None) -> bool:
        """Replace a record; return False, and do nothing, if there is none."""

    @abc.abstractmethod
    async def swap(self, key: str, expected: bytes, payload: bytes, ttl: int | None) -> bool:
        """Replace a record if it still is the expected one; return whether it was, atomically."""

    @abc.abstractmethod
    async def delete(self, key: str) -> None:
        """Delete a record, if there is one."""

    async def finish(self) -> None:
        """Wait for saves that were begun by requests that have since been cancelled."""

    async def load_session(self, request: web.Request) -> Session:
        """Return the stored session whose id the cookie gives, or a new one."""
        identity = self.load_cookie(request)
        key = None if identity is None else self._find_key(identity)
        record = None if key is None else await self.read(key)
        if record is None:
            return Session(None, data=None, new=True, max_age=self.max_age)
        session = self._restore(identity, record)
        if session is None:
            session = Session(identity, data=None, new=False, max_age=self.max_age)
        if session.identity is not None and not session._renew:
            session._record = record
        return session

    async def save_session(
        self, request: web.Request, response: web.StreamResponse, session: Session
    ) -> None:
        """Store the session and set its cookie; delete both if the session is empty."""
        if session.empty and session.new and not self._has_cookie(request, response):
            return
        if await self._store(session):
            identity = "" if session.empty else str(session.identity)
            self.save_cookie(response, identity, max_age=self._time_left(session))

    async def _store(self, session: Session) -> bool:
        """Make the store agree with a session; return whether its cookie is to be set."""
        record = session._record
        merges = self._on_conflict == "merge" and record is not None and not session._renew
        if session.empty and not merges:
            await self._delete_ids(session._replaces, session.identity)
            session._record = session._replaces = None
            return True
        if record is None or session._renew:
            stored = await self._move(session, record)
        else:
            stored = await self._update(session, record)
        if session._changed and not stored:
            # Its cookie stays as it is: it may lead to the session's new id by now.
            log.warning("A session was deleted while a request used it; its changes are dropped")
        return stored

    async def _update(self, session: Session, record: bytes) -> bool:
        key = self._key(session.identity)
        if self._on_conflict == "merge" and session._changed:
            return await self._merge(session, key, record)
        payload, ttl = self._make_payload(session), self._ttl(session)
        if not session._changed:
            # Only to keep it alive: whoever wrote the record meanwhile has done so already.
            return await self.swap(key, record, payload, ttl)
        session._record = payload
        return await self.update(key, payload, ttl)

    async def _move(self, session: Session, record: bytes | None) -> bool:
        """Store a session under a new id.

        :param record: what is stored under its old id and goes on under the new one. If that was
            deleted meanwhile, nothing is stored.
        """
        old = identity = session.identity
        if identity is None or session._renew:
            identity = self._key_factory()
        key = self._key(identity)
        old_key = "" if record is None else self._key(old)
        if record is not None and self._on_conflict == "merge":
            if not await self._merge(session, old_key, record, ends=True):
                return False
            record = _EMPTIED
        payload = self._make_payload(session)
        await self.create(key, payload, self._ttl(session))
        # Never the new contents: somebody may know the old id.
        if record is not None and not await self.update(old_key, record, 1):
            await self.delete(key)
            return False
        await self._delete_ids(*{session._replaces, old} - {identity})
        session._identity, session._record = identity, payload
        session._renew, session._replaces = False, None
        return True

    async def _merge(
        self, session: Session, key: str, record: bytes, *, ends: bool = False
    ) -> bool:
        """Apply the changes of a session to whatever its record is by now.

        :param ends: leave an empty record behind.
        :return: False if there is no record any more.
        :raises ConflictError: if other processes change the record all the time.
        """
        async with self._merges.get().setdefault(key, Lock()):
            return await self._merge_alone(session, key, record, ends=ends)

    async def _merge_alone(self, session: Session, key: str, record: bytes, *, ends: bool) -> bool:
        before = self._stored(record)
        changes = {
            name: value
            for name, value in session._mapping.items()
            if name not in before.items or repr(value) != repr(before.items[name])
        }
        deleted = before.items.keys() - session._mapping.keys()
        for attempt in range(_MERGE_ATTEMPTS):
            # An empty record stays for a second, so that what another request adds meanwhile
            # finds something to be added to.
            empty = ends or session.empty
            payload = _EMPTIED if empty else self._make_payload(session)
            if await self.swap(key, record, payload, 1 if empty else self._ttl(session)):
                session._record = None if empty else payload
                return True
            await sleep(random.uniform(0, 0.001 * min(attempt, 20)))  # noqa: S311
            newer = await self.read(key)
            if newer is None:
                return False
            record, after = newer, self._stored(newer)
            session._mapping = {
                **{name: item for name, item in after.items.items() if name not in deleted},
                **changes,
            }
            if session.max_age == before.max_age:
                session.max_age = after.max_age
        raise ConflictError(
            f"A session could not be merged in {_MERGE_ATTEMPTS} attempts: other requests kept "
            "changing its record"
        )

    def _stored(self, record: bytes) -> _Stored:
        data = self._read_payload(record) or {}
        return _Stored(dict(data.get("session") or {}), data.get("max_age", self.max_age))

    def _ttl(self, session: Session) -> int | None:
        left = self._time_left(session)
        return None if left is None else max(1, math.ceil(left))

    async def _delete_ids(self, *identities: Any | None) -> None:
        for identity in dict.fromkeys(identities):
            key = None if identity is None else self._find_key(str(identity))
            if key is not None:
                await self.delete(key)

    async def _save_late(self, session: Session) -> None:
        if session._record is None:
            await self._delete_ids(session._replaces, session.identity)
            if not session.empty:
                await super()._save_late(session)
            return
        if session._renew and not session.empty:
            log.warning(
                "A session's id was to change after its response had been started. It stays: "
                "the headers with the cookie are sent"
            )
            session._renew = False
        await self._store(session)

    def _replace_session(
        self, request: web.Request, session: Session, previous: object | None
    ) -> None:
        if isinstance(previous, Session) and (previous._record is not None or not previous.new):
            session._replaces = previous.identity
        else:
            session._replaces = self.load_cookie(request)

    def _find_key(self, identity: str) -> str | None:
        """Return the key of a session id; None for a text that can't be one, in any store."""
        if len(identity) >= _KEY_LIMIT - len(self._cookie_name) or not identity.isascii():
            return None
        if quote(identity) != identity and (  # hardly ever; quote is the fastest of these checks
            not identity.isprintable() or " " in identity or "../" in identity or identity == ""
        ):
            return None
        if self._hash_ids:
            identity = hashlib.sha256(identity.encode("ascii")).hexdigest()
        return f"{self._cookie_name}_{identity}"

    def _key(self, identity: object) -> str:
        """Return the key of a session id.

        :raises ValueError: for what can't be one.
        """
        key = self._find_key(str(identity))
        if key is None:
            raise ValueError(
                "A session id must be printable ASCII without spaces, and at most "
                f"{_KEY_LIMIT - len(self._cookie_name) - 1} characters; see key_factory"
            )
        return key


class RemoteStorage(ServerStorage):
    """A server storage that is reached by a network, and batches its operations.

    :param timeout: seconds after which a load or save fails with TimeoutError.
    :raises ValueError: if timeout is not positive.
    """

    def __init__(self, *, timeout: float = 5, **options: Unpack[ServerOptions]) -> None:
        super().__init__(**options)
        if timeout <= 0:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
        self._timeout = timeout
        self._batches: PerLoop[Any] = PerLoop(self._make_batch)

    @abc.abstractmethod
    def _make_batch(self) -> Any:
        """Make what has `Batch.submit` and `Batch.finish`, for one event loop."""

    async def finish(self) -> None:
        """Wait for what is under way in this event loop."""
        await self._batches.get().finish()
