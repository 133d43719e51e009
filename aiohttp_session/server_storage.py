"""Sessions on a store: their ids, and what a save does."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any, Literal

from aiohttp import web

from . import settling
from ._core import Session, decode, restore
from ._options import Unpack, show_options
from .lifecycle import LifecycleOptions
from .log import log
from .merging import Changes, Record
from .owned_sessions import OwnedSessions, Save
from .record_keys import random_id
from .settling import ATTEMPTS, MARK_TTL, MOVED, ConflictError
from .stores import Store, UnsettledError

_EMPTIED = b"{}"
_CONFLICT = (
    f"A session could not be merged in {ATTEMPTS} attempts: other requests kept changing its record"
)


class ServerOptions(LifecycleOptions, total=False):
    """The options of `ServerStorage`, to forward."""

    key_factory: Callable[[], str]
    hash_ids: bool
    on_conflict: Literal["overwrite", "merge"]
    max_per_owner: int | None


@show_options
class ServerStorage(OwnedSessions):
    """Keep sessions in a store, with only their ids in the cookie.

    :param store: where records are kept, under ``cookie_name + "_" + id``.
    :param key_factory: makes the id of a new session; by default 128 random bits in hex. Ids
        must be unguessable, and printable ASCII without spaces.
    :param hash_ids: keep records under the SHA-256 of their ids, so that a copy of the store
        holds nothing that can be used as a cookie.
    :param on_conflict: what a save does if another request has changed the record since it was
        loaded here: ``"overwrite"`` replaces it; ``"merge"`` applies what was set and deleted
        here to the newer record.
    :param max_per_owner: how many sessions one user (`Session.owner`) may have at a time: one
        log-in too many ends the oldest. By default any number.
    :raises ValueError: if max_per_owner is not positive.

    A save is one of six operations, depending on the session:

    ========  ========  =====  =======  ======  =============================================
    a record  new id    empty  changed  merges
    ========  ========  =====  =======  ======  =============================================
    no                  no                      create: store it, under an id of its own
    no                  yes                     end: delete what it replaces
    yes       yes       no                      move: store it under a new id, end the old one
    yes       yes       yes                     end: delete the record
    yes       no        no     yes      no      update: replace the record if it is still there
    yes       no        yes             no      end
    yes       no        no     no               touch: extend its life if nobody has changed it
    yes       no        no     yes      yes     merge: apply the changes to the current record
    yes       no        yes             yes     merge
    ========  ========  =====  =======  ======  =============================================

    Each is done once, or has failed when it raises, and takes no longer than the store's
    ``timeout`` altogether. After a write whose outcome is unknown the record is looked at; the
    write is never just repeated, since somebody may have written or deleted the record since.
    """

    def __init__(
        self,
        store: Store,
        *,
        key_factory: Callable[[], str] = random_id,
        hash_ids: bool = False,
        on_conflict: Literal["overwrite", "merge"] = "overwrite",
        max_per_owner: int | None = None,
        **options: Unpack[LifecycleOptions],
    ) -> None:
        super().__init__(store, hash_ids=hash_ids, max_per_owner=max_per_owner, **options)
        if on_conflict not in {"overwrite", "merge"}:
            raise ValueError(f"on_conflict must be 'overwrite' or 'merge', not {on_conflict!r}")
        self._key_factory = key_factory
        self._merges = on_conflict == "merge"

    async def finish(self) -> None:
        """Wait for the saves that cancelled requests had begun."""
        await self.store.finish()

    async def load_session(self, request: web.Request) -> Session:
        """Return the stored session whose id the cookie gives, or a new one."""
        identity = self.load_cookie(request)
        key = None if identity is None else self._keys.find(identity)
        record = None if key is None else await self.store.read(key)
        if record is None:
            return Session(None, data=None, new=True, max_age=self.max_age)
        if self._lifetime is None and self._touch_after is None and self._decoder is decode:
            session = restore(record, identity, self.max_age)
            if session is not None:  # as most are: there is no more to be asked of it
                session._record = record
                return session
        if record.startswith(MOVED):
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
        if session.new and session.empty and not self._has_cookie(request, response):
            return
        if await self._store(session):
            identity = "" if session.empty else str(session.identity)
            self.save_cookie(response, identity, max_age=self._time_left(session))
        elif session._changed:
            # Its cookie stays as it is: it may lead to the session's new id by now.
            _warn_of_changes_dropped()

    def _store(self, session: Session) -> Coroutine[Any, Any, bool]:
        """Make the store agree with a session, by one of the operations in the class's docstring.

        :return: False if the session was ended meanwhile.
        """
        record = session._record
        save: Save
        if record is None:
            save = self._end if session.empty else self._create
        elif session._renew:
            save = self._end if session.empty else self._move
        elif self._merges:
            save = self._merge if session._changed or session.empty else self._touch
        elif session.empty:
            save = self._end
        else:
            save = self._update if session._changed else self._touch
        if session._owner is None and session._listed is None:
            return save(session, record or b"")
        return self._save_listed(save, session, record or b"")

    # Each takes a session and its record as it was loaded, b"" if there was none, and returns False
    # if the session was ended meanwhile.

    async def _create(self, session: Session, _: bytes) -> bool:
        since = monotonic()
        old = session.identity
        if old is None or session._renew:
            identity, payload = await self._create_anew(session, since)
        else:
            identity, payload = old, await self._write_new(session, old)
        if others := [i for i in (session._replaces, old) if i not in {None, identity}]:
            async with self._limit(since):
                await self._delete(*others)
        self._adopt(session, identity, payload)
        return True

    async def _end(self, session: Session, _: bytes) -> bool:
        if session._replaces is None:
            await self._delete(session.identity)
        else:
            async with self._limit(monotonic()):
                await self._delete(session._replaces, session.identity)
        session._record = session._replaces = None
        return True

    async def _update(self, session: Session, record: bytes) -> bool:
        since = monotonic()
        key = self._keys.known(session.identity)
        payload, ttl = self._make_payload(session), self._ttl(session)
        try:
            stored = await self.store.update(key, payload, ttl)
        except UnsettledError as error:
            async with self._limit(since):
                stored = await settling.settle(self.store, key, record, payload, ttl, error)
        session._record = payload
        return stored

    async def _touch(self, session: Session, record: bytes) -> bool:
        since = monotonic()
        key = self._keys.known(session.identity)
        payload, ttl = self._make_payload(session), self._ttl(session)
        try:
            # Whoever wrote the record meanwhile has kept it alive already.
            stored = await self.store.swap(key, record, payload, ttl)
        except UnsettledError as error:
            async with self._limit(since):
                stored = await settling.settle(self.store, key, record, payload, ttl, error)
        if stored:
            session._record = payload
        return stored

    async def _merge(self, session: Session, record: bytes) -> bool:
        key = self._keys.known(session.identity)
        changes = None
        async with self._limit(monotonic()), self._turn(key):
            for attempt in range(ATTEMPTS):
                # An emptied record stays for a while, so that what another request adds finds
                # something to be added to.
                empty = session.empty
                payload = _EMPTIED if empty else self._make_payload(session)
                ttl = MARK_TTL if empty else self._ttl(session)
                found = await settling.swap(self.store, key, record, payload, ttl)
                if found is payload:
                    session._record = None if empty else payload
                    return True
                if found is None:
                    return False
                changes = changes or Changes(self._read_record(record), session)
                changes.apply(session, self._read_record(found))
                record = found
                await settling.pause(attempt)
        raise ConflictError(_CONFLICT)

    async def _move(self, session: Session, record: bytes) -> bool:
        # The new record comes first: whatever happens next, there is one of the two. Then the old
        # one is marked, which tells whether it still was there, and can be looked up should the
        # answer be lost. Only then it goes.
        since = monotonic()
        old_key = self._keys.known(session.identity)
        changes = None
        async with self._limit(since), self._turn(old_key):
            for attempt in range(ATTEMPTS):
                if session.empty:  # by what others did meanwhile
                    return await self._end(session, record)
                identity, payload = await self._create_anew(session, since)
                key = self._keys.get(identity)
                mark = b'%b"%b"}' % (MOVED, hashlib.sha256(key.encode()).hexdigest().encode())
                if self._merges:
                    found = await settling.swap(self.store, old_key, record, mark, MARK_TTL)
                else:
                    found = await settling.mark(self.store, old_key, mark)
                if found is mark:
                    await self._delete_marked(old_key)
                    await self._delete(session._replaces)
                    self._adopt(session, identity, payload)
                    return True
                await self.store.delete(key)
                if found is None:
                    return False
                changes = changes or Changes(self._read_record(record), session)
                changes.apply(session, self._read_record(found))
                record = found
                await settling.pause(attempt)
        raise ConflictError(_CONFLICT)

    # What they are made of.

    async def _create_anew(self, session: Session, since: float) -> tuple[str, bytes]:
        """Store a session under a new id; return that, and the record."""
        identity = self._key_factory()
        try:
            return identity, await self._write_new(session, identity)
        except ConnectionError:
            # Whatever becomes of that one, nobody will ever know its id.
            identity = self._key_factory()
            async with self._limit(since):
                return identity, await self._write_new(session, identity)

    async def _write_new(self, session: Session, identity: Any) -> bytes:
        key = self._keys.get(identity)
        if session._owner is not None:
            await self._enter(session, identity)
        payload = self._make_payload(session)
        await self.store.create(key, payload, self._ttl(session))
        return payload

    async def _delete_marked(self, key: str) -> None:
        try:
            await self.store.delete(key)
        except Exception as error:  # noqa: BLE001 - stores raise what they like
            log.warning(
                "The record under a session's former id could not be deleted (%s). It can't be "
                "used, and goes by itself within a minute",
                type(error).__name__,
            )

    async def _delete(self, *identities: Any | None) -> None:
        for identity in dict.fromkeys(identities):
            key = None if identity is None else self._keys.find(str(identity))
            if key is not None:
                await self.store.delete(key)

    def _adopt(self, session: Session, identity: Any, payload: bytes) -> None:
        session._identity, session._record = identity, payload
        session._renew, session._replaces = False, None

    def _read_record(self, record: bytes) -> Record:
        data = self._read_payload(record) or {}
        items, max_age = dict(data.get("session") or {}), data.get("max_age", self.max_age)
        return Record(items, max_age, data.get("owner"), data.get("listed"))

    def _ttl(self, session: Session) -> int | None:
        left = self._time_left(session)
        return None if left is None else max(1, math.ceil(left))

    async def _save_late(self, session: Session) -> None:
        if session._record is None:
            await self._save_listed(self._end, session, b"")
            if not session.empty:
                await super()._save_late(session)
            return
        if session._renew and not session.empty:
            log.warning(
                "A session's id was to change after its response had been started. It stays: "
                "the headers with the cookie are sent"
            )
            session._renew = False
        if not await self._store(session) and session._changed:
            _warn_of_changes_dropped()

    def _replace_session(
        self, request: web.Request, session: Session, previous: object | None
    ) -> None:
        if isinstance(previous, Session) and (previous._record is not None or not previous.new):
            session._replaces = previous.identity
        else:
            session._replaces = self.load_cookie(request)


def _warn_of_changes_dropped() -> None:
    log.warning("A session was deleted while a request used it; its changes are dropped")
