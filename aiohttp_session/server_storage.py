"""Sessions on a store: their ids, and what a save does."""

from __future__ import annotations

import hashlib
import math
import random
import uuid
from asyncio import Lock, sleep
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakValueDictionary

from aiohttp import web

from ._core import Session, quote
from .lifecycle import LifecycleOptions, LifecycleStorage
from .log import log
from .stores import Store
from .stores.per_loop import PerLoop

if TYPE_CHECKING:
    from typing_extensions import Unpack

_KEY_LIMIT = 250  # bytes: memcached's
_MERGE_ATTEMPTS = 100
_EMPTIED = b"{}"


class ServerOptions(LifecycleOptions, total=False):
    """The options of `ServerStorage`, to forward."""

    key_factory: Callable[[], str]
    hash_ids: bool
    on_conflict: Literal["overwrite", "merge"]


class _Stored(NamedTuple):
    """What a record says of a session."""

    items: dict[str, Any]
    max_age: int | None


class ConflictError(RuntimeError):
    """A session could not be merged, because other requests kept changing its record."""


class ServerStorage(LifecycleStorage):
    """A storage that keeps sessions in a store, and their ids in the cookie.

    :param store: where records are kept, under ``cookie_name + "_" + id``.
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
        store: Store,
        *,
        key_factory: Callable[[], str] = lambda: uuid.uuid4().hex,
        hash_ids: bool = False,
        on_conflict: Literal["overwrite", "merge"] = "overwrite",
        **options: Unpack[LifecycleOptions],
    ) -> None:
        super().__init__(**options)
        self.store = store
        if on_conflict not in {"overwrite", "merge"}:
            raise ValueError(f"on_conflict must be 'overwrite' or 'merge', not {on_conflict!r}")
        self._key_factory = key_factory
        self._hash_ids = hash_ids
        self._on_conflict = on_conflict
        # Of the keys that requests of this process are merging: they need not fight each other.
        self._merges: PerLoop[WeakValueDictionary[str, Lock]] = PerLoop(WeakValueDictionary)

    async def finish(self) -> None:
        """Wait for saves that were begun by requests that have since been cancelled."""
        await self.store.finish()

    async def load_session(self, request: web.Request) -> Session:
        """Return the stored session whose id the cookie gives, or a new one."""
        identity = self.load_cookie(request)
        key = None if identity is None else self._find_key(identity)
        record = None if key is None else await self.store.read(key)
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
            return await self.store.swap(key, record, payload, ttl)
        session._record = payload
        return await self.store.update(key, payload, ttl)

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
        await self.store.create(key, payload, self._ttl(session))
        # Never the new contents: somebody may know the old id.
        if record is not None and not await self.store.update(old_key, record, 1):
            await self.store.delete(key)
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
            if await self.store.swap(key, record, payload, 1 if empty else self._ttl(session)):
                session._record = None if empty else payload
                return True
            await sleep(random.uniform(0, 0.001 * min(attempt, 20)))  # noqa: S311
            newer = await self.store.read(key)
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
                await self.store.delete(key)

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
