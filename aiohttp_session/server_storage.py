"""Sessions on a store: their ids, and what a save does."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections.abc import Callable, Collection, Coroutine
from contextlib import AbstractAsyncContextManager
from time import monotonic
from typing import Any, Literal, TypeAlias

from aiohttp import web

from ._core import Session, decode, restore
from ._options import Unpack, show_options
from .lifecycle import LifecycleOptions, LifecycleStorage
from .log import log
from .merging import Merge, Record
from .owners import Owners, SessionInfo, StoredSession
from .record_keys import RecordKeys, random_id
from .saving import (
    ATTEMPTS,
    ENDED,
    MARK_TTL,
    UNSEEN,
    ConflictError,
    Edit,
    Lanes,
    Make,
    Overwrite,
    Replacement,
    Unseen,
    has_no_session,
    is_ended,
    mark_for,
    moved_to,
    pause,
)
from .stores import Store
from .stores.shared_reads import SharedReads, Waiting, fail_all, share
from .time_limit import time_limit

_Saving: TypeAlias = Coroutine[Any, Any, bool]
_Save: TypeAlias = Callable[[Session, bytes], _Saving]
_is_random = re.compile("[0-9a-f]{32}").fullmatch


class ServerOptions(LifecycleOptions, total=False):
    """The options of `ServerStorage`, to forward."""

    key_factory: Callable[[], str]
    hash_ids: bool
    on_conflict: Literal["overwrite", "merge"]
    max_per_owner: int | None


@show_options
class ServerStorage(LifecycleStorage):
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
        login too many ends the oldest session. By default any number; then the latest 1,000 of
        them are listed and can be ended.
    :raises ValueError: if max_per_owner is not positive.

    A save is one of six operations, depending on the session:

    ========  ========  =====  =======  ======  =============================================
    a record  new id    empty  changed  merges
    ========  ========  =====  =======  ======  =============================================
    no                  no                      create: store it, under an id of its own
    no                  yes                     end: delete what it replaces
    yes       yes       no                      move: store it under a new id, mark the old one
    yes       yes       yes                     end: end the session
    yes       no        no     yes      no      overwrite: replace the record if it is still there
    yes       no        yes             no      end
    yes       no        no     no               touch: extend its life if nobody has changed it
    yes       no        no     yes      yes     merge: apply the changes to the current record
    yes       no        yes             yes     merge
    ========  ========  =====  =======  ======  =============================================

    Each operation changes an existing record by a swap, which names the record that it replaces.
    So a write that a network delivers late, after its request has failed, or a write of a process
    that was paused, undoes nothing that was saved in the meantime. If the outcome of a swap is
    unknown, the record is read and the same swap is repeated. An operation takes no longer than the
    store's ``timeout`` altogether.
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
        super().__init__(**options)
        if on_conflict not in {"overwrite", "merge"}:
            raise ValueError(f"on_conflict must be 'overwrite' or 'merge', not {on_conflict!r}")
        if max_per_owner is not None and max_per_owner < 1:
            raise ValueError(f"max_per_owner must be at least 1, not {max_per_owner!r}")
        self.store = store
        self._key_factory = key_factory
        self._merges = on_conflict == "merge"
        self._keys = RecordKeys(self.cookie_name, hashed=hash_ids)
        self._reads = SharedReads(lambda: self.store)
        self._lanes = Lanes(self)
        self._latest_base = b"", Record({}, None, None, None)
        self._owners = Owners(
            self._keys,
            self._lanes,
            store=lambda: self.store,
            read=self._read_stored,
            end=self._end_named,
            most=max_per_owner,
        )

    async def sessions_of(self, owner: str) -> list[SessionInfo]:
        """List the sessions of a user, the latest login first.

        :param owner: what `Session.owner` was set to.
        """
        async with self._limit(monotonic()):
            return await self._owners.list(owner)

    async def end_sessions(self, owner: str, *, keep: Session | None = None) -> int:
        """End all sessions of a user: log out everywhere (OWASP ASVS 5.0, 7.4).

        Every session that was saved before is over afterwards, also if another request has given
        it a new id in the meantime. A request that is using one of them saves nothing.

        :param keep: the session of this request, to end only the others. It is kept under whatever
            id other requests give it.
        :return: the number of sessions that were ended.
        :raises ConflictError: if other processes keep changing the user's sessions.
        """
        async with self._limit(monotonic()):
            return await self._owners.end_all(owner, keep=None if keep is None else keep.identity)

    async def end_session(self, owner: str, handle: str) -> bool:
        """End one session of a user, also if another request is giving it a new id.

        :param handle: names the session, as `sessions_of` says. A handle that belongs to another
            owner has no effect.
        :return: whether the session was alive.
        :raises ConflictError: if other processes keep changing the user's sessions.
        """
        async with self._limit(monotonic()):
            return await self._owners.end_one(owner, handle)

    async def finish(self) -> None:
        """Wait for the saves that cancelled requests had begun."""
        await self._lanes.finish()
        await self._owners.finish()
        await self.store.finish()

    # In one function, since each call would take 0.1 µs of every request.
    async def load_session(self, request: web.Request) -> Session:  # noqa: C901
        """Return the stored session whose id the cookie gives, or a new one."""
        identity = self.load_cookie(request)
        key = None if identity is None else self._keys.find(identity)
        if key is None:
            return Session(None, data=None, new=True, max_age=self.max_age)
        store = self.store
        if store.reads_locally:
            record = await store.read(key)
        elif key in (begun := self._reads.here.get()):
            record = await self._reads.join(begun, key)
        else:  # as `SharedReads.read` does, which takes 0.3 µs more
            if not begun:
                asyncio.get_running_loop().call_soon(begun.clear)
            waiting: Waiting = []
            begun[key] = waiting
            try:
                record = await store.read(key)
            except BaseException as error:
                fail_all(begun, key, waiting, error)
                raise
            if waiting:
                share(begun, key, waiting, record)
                if record is not None:
                    self._lanes.expect(key, record)
            elif begun and begun.get(key) is waiting:  # answered in the tick in which it began
                del begun[key]
        if record is None:
            return Session(None, data=None, new=True, max_age=self.max_age)
        session = None
        if self._lifetime is None and self._touch_after is None and self._decoder is decode:
            session = restore(record, identity, self.max_age)  # as most are
        if session is None:
            session = self._restore_record(identity, record)
        else:
            session._record = record
        if session._owner is not None:
            self._owners.visit(session)
        return session

    def _restore_record(self, identity: str | None, record: bytes) -> Session:
        """Make a session of any record."""
        if has_no_session(record):
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
        if session.new and session.empty:
            if not self._has_cookie(request, response):
                return
            if session._renew and session._record is None and session._replaces is None:
                # If the load found a mark, the cookie has a former id. The logout follows the mark.
                session._replaces = self.load_cookie(request)
        if await self._store(session):
            identity = "" if session.empty else str(session.identity)
            self.save_cookie(response, identity, max_age=self._time_left(session))
        elif session._changed:
            # Its cookie stays as it is: it may lead to the session's new id by now.
            _warn_of_changes_dropped()

    def _store(self, session: Session) -> Coroutine[Any, Any, bool]:
        """Make the store agree with a session, by one of the operations in the class's docstring.

        :return: False if the session was ended, or has moved, in the meantime.
        """
        record = session._record
        save: _Save
        if record is None:
            save = self._end if session.empty else self._create
        elif session._renew:
            save = self._end if session.empty else self._move
        elif self._merges:
            save = self._merge if session._changed or session.empty else self._touch
        elif session.empty:
            save = self._end
        else:
            save = self._overwrite if session._changed else self._touch
        if session._owner is None and session._listed is None:
            return save(session, record or b"")
        return self._save_owned(save, session, record or b"")

    # Each operation takes a session and its record as it was loaded, b"" if there was none. It
    # returns False if the session was ended, or has moved, in the meantime.

    async def _create(self, session: Session, _: bytes) -> bool:
        since = monotonic()
        old = session.identity
        if old is None or session._renew:
            identity, payload = await self._create_anew(session, since)
        else:
            identity, payload = old, await self._write_new(session, old, is_chosen=True)
        if others := [i for i in (session._replaces, old) if i not in {None, identity}]:
            async with self._limit(since):
                await self._end_ids(session, *others)
        self._adopt(session, identity, payload)
        return True

    async def _end(self, session: Session, _: bytes) -> bool:
        async with self._limit(monotonic()):
            await self._end_ids(session, session._replaces, session.identity)
        session._record = session._replaces = session._ended = None
        return True

    def _overwrite(self, session: Session, record: bytes) -> _Saving:
        payload, ttl = self._make_payload(session), self._ttl(session)
        key = self._keys.known(session.identity)
        return self._lanes.replace(
            key, session, record, payload, ttl, lambda: Overwrite(payload, ttl)
        )

    def _touch(self, session: Session, record: bytes) -> _Saving:
        payload, ttl = self._make_payload(session), self._ttl(session)
        key = self._keys.known(session.identity)
        # If the record was replaced in the meantime, that write already extended its life.
        return self._lanes.replace(
            key,
            session,
            record,
            payload,
            ttl,
            lambda: Edit(lambda found: (payload, ttl) if found == record else None),
        )

    def _merge(self, session: Session, record: bytes) -> _Saving:
        key = self._keys.known(session.identity)
        if session.empty or self._lanes.is_busy(key):
            return self._merge_in_turn(key, session, record)
        payload, ttl = self._make_payload(session), self._ttl(session)
        return self._lanes.replace(
            key, session, record, payload, ttl, lambda: self._merging(session, record)
        )

    async def _merge_in_turn(self, key: str, session: Session, record: bytes) -> bool:
        change = self._merging(session, record)
        await self._lanes.change(key, record, change)
        if change.after is None:
            return False
        session._record = None if session.empty else change.after
        return True

    def _merging(self, session: Session, record: bytes) -> Merge:
        return Merge(
            session, record, read_base=self._read_base, read=self._read_record, write=self._write
        )

    async def _move(self, session: Session, record: bytes) -> bool:
        # The new record is created first, so whatever happens next, one of the two is there. The
        # request whose swap replaces the old record by a mark has won. Nothing replaces the mark.
        since = monotonic()
        old = session.identity
        old_key = self._keys.known(old)
        merge = self._merging(session, record)
        base = record
        async with self._limit(since):
            for attempt in range(ATTEMPTS):
                if session.empty:  # by the changes of other requests
                    return await self._end(session, base)
                identity, payload = await self._create_anew(session, since)
                tail = self._keys.tail(identity)
                if self._keys.at(tail) != old_key:
                    change = Edit(self._marking(tail, base), is_final=True)
                    try:
                        await self._lanes.change(old_key, base, change)
                    except ConflictError:
                        await self._take_back(session, identity, payload)
                        raise
                    # A client that repeats a swap by itself finds its own mark.
                    if change.after is None and moved_to(change.before) != tail:
                        await self._take_back(session, identity, payload)
                        found = change.before
                        if found is None or is_ended(found):
                            return False
                        merge.merge(found)
                        base = found
                        await pause(attempt)
                        continue
                await self._end_ids(session, session._replaces)
                self._adopt(session, identity, payload)
                return True
        raise ConflictError(
            f"A session could not be merged in {ATTEMPTS} attempts: other requests kept changing "
            "its record"
        )

    # The parts of the operations.

    def _marking(self, tail: str, base: bytes) -> Make:
        mark = mark_for(tail), MARK_TTL
        if self._merges:  # the new record must contain what others have saved
            return lambda found: mark if found == base else None
        return lambda found: None if is_ended(found) else mark

    def _ending(self, may_end: Callable[[bytes], bool]) -> Make:
        def make(found: bytes | None) -> Replacement | None:
            is_meant = found is not None and not is_ended(found) and may_end(found)
            return (ENDED, MARK_TTL) if is_meant else None

        return make

    async def _create_anew(self, session: Session, since: float) -> tuple[str, bytes]:
        """Store a session under a new id; return the id, and the record."""
        is_chosen = self._key_factory is not random_id  # as far as anybody can know
        identity = self._key_factory()
        try:
            return identity, await self._write_new(session, identity, is_chosen=is_chosen)
        except ConnectionError:
            # Whatever becomes of that record, nobody receives its id.
            lost, identity = identity, self._key_factory()
            async with self._limit(since):
                return identity, await self._write_new(
                    session, identity, is_chosen=is_chosen, lost=lost
                )

    async def _write_new(
        self, session: Session, identity: Any, *, is_chosen: bool, lost: Any = None
    ) -> bytes:
        """Store a session under an id.

        :param lost: the id of a former attempt. The store may still write a record under this id.
        :param is_chosen: the id may have been used before, or be used again. A late write would
            be harmful, so the record is stored by a swap.
        """
        key = self._keys.get(identity)
        if session._owner is not None:
            await self._enter(session, identity, lost)
        payload, ttl = self._make_payload(session), self._ttl(session)
        if is_chosen:
            await self._lanes.change(key, None, Edit(lambda found: (payload, ttl)))
        else:
            await self.store.create(key, payload, ttl)
        return payload

    async def _take_back(self, session: Session, identity: Any, payload: bytes) -> None:
        """Remove the new record of a session whose move was lost to another request."""
        key, is_random = self._keys.get(identity), self._is_random(identity)
        is_deleted = False
        if is_random:
            with contextlib.suppress(Exception):  # the server may refuse deletions
                await self.store.delete(key)
                is_deleted = True
        if not is_deleted:
            await self._end_record(
                key, payload, is_random=is_random, may_end=lambda found: found == payload
            )
        if session._owner is not None:
            await self._owners.leave(session._owner, identity)

    async def _end_ids(self, session: Session, *identities: Any | None) -> None:
        """End the sessions under these ids, wherever they have moved to.

        :param session: the one that is saved, and may have the record of one of these as it was
            loaded. If another record is found, that is read.
        """
        record = session._record or session._ended or UNSEEN
        for identity in dict.fromkeys(identities):
            key = None if identity is None else self._keys.find(str(identity))
            if key is not None:
                await self._end_record(key, record, is_random=self._is_random(identity))

    async def _end_named(self, name: str, record: bytes | None, **options: Any) -> bytes | None:
        """End the session with this name in the index, as `_end_record` does."""
        is_random = not self._keys.is_hashed and self._is_random(name)
        return await self._end_record(self._keys.at(name), record, is_random=is_random, **options)

    async def _end_record(
        self,
        key: str,
        record: bytes | Unseen | None,
        *,
        is_random: bool,
        may_end: Callable[[bytes], bool] = lambda record: True,
        spared: Collection[str] = (),
    ) -> bytes | None:
        """End the session under a key, wherever it has moved to.

        :param is_random: its id is never used again.
        :param may_end: tells whether the session with a record is meant.
        :param spared: the names in the index of a session that is not ended.
        :return: the record that was ended; None if the session was over already.
        """
        make = self._ending(may_end)
        for _ in range(ATTEMPTS):
            change = Edit(make, is_final=is_random)
            await self._lanes.change(key, record, change)
            if change.after is not None:
                if is_random:
                    await self._delete_ended(key)
                return change.before
            tail = moved_to(change.before)
            if tail is None or tail in spared:
                return None
            key, record, is_random = self._keys.at(tail), UNSEEN, self._key_factory is random_id
        return None

    def _is_random(self, identity: Any) -> bool:
        """Tell whether the default key_factory made an id, which is never used again then."""
        return self._key_factory is random_id and _is_random(str(identity)) is not None

    async def _delete_ended(self, key: str) -> None:
        try:
            await self.store.delete(key)
        except Exception as error:  # noqa: BLE001 - stores raise what they like
            log.warning(
                "The record of a session that has ended could not be deleted (%s). It can't be "
                "used, and expires within a minute",
                type(error).__name__,
            )

    def _adopt(self, session: Session, identity: Any, payload: bytes) -> None:
        session._identity, session._record = identity, payload
        session._renew, session._replaces, session._ended = False, None, None

    def _read_base(self, record: bytes) -> Record:
        """Read the record that a session was made of. Other sessions may be made of it as well."""
        base, read = self._latest_base
        if base is not record:
            read = self._read_record(record)
            self._latest_base = record, read
        return read

    def _read_record(self, record: bytes) -> Record:
        session = restore(record, None, self.max_age) if self._decoder is decode else None
        if session is not None:  # as most are: this takes half the time
            session._changed = True  # or the next line would take a copy
            listed = None if session._listed is None else session._listed[1]
            return Record(session._mapping, session.max_age, session._owner, listed)
        data = self._read_payload(record) or {}
        items, max_age = dict(data.get("session") or {}), data.get("max_age", self.max_age)
        return Record(items, max_age, data.get("owner"), data.get("listed"))

    def _write(self, session: Session) -> Replacement:
        return self._make_payload(session), self._ttl(session)

    def _ttl(self, session: Session) -> int | None:
        left = self._time_left(session)
        return None if left is None else max(1, math.ceil(left))

    def _limit(self, since: float) -> AbstractAsyncContextManager[None]:
        return time_limit(self.store.timeout, since)

    # The index of a user's sessions.

    async def _save_owned(self, save: _Save, session: Session, record: bytes) -> bool:
        """Save a session that is a user's, or was, and keep the index in step."""
        identity = session.identity
        async with self._limit(monotonic()):
            # A wrapper of a store need not be one itself.
            read_latest = getattr(type(self.store), "read_latest", Store.read_latest)
            is_cached = read_latest is not Store.read_latest
            if is_cached and self.store.reads_locally and session._owner is not None:
                self._owners.visit(session, latest=True)
            await self._owners.visited(identity)
            listed = session._listed
            is_entered = bool(record) and not session._renew and self._is_unlisted(session)
            if is_entered:
                await self._enter(session, identity)
            if not await save(session, record):
                if is_entered and session._owner is not None:
                    await self._owners.leave(session._owner, identity)
                return False
            is_over = session._record is None or not record
            former = None if listed is None else listed[0]
            if is_over and former is not None and identity is not None:
                await self._owners.leave(former, identity, is_over=True)
            if session._owner is not None and session._owner != former:
                await self._owners.make_room(session._owner)
        return True

    def _is_unlisted(self, session: Session) -> bool:
        """Tell whether the index lacks a session, or lists it for less time than it may live."""
        if session._listed is None or session._listed[0] != session._owner:
            return session._owner is not None
        left, until = self._time_left(session), session._listed[1]
        return until is not None and (left is None or time.time() + left > until + 1)

    async def _enter(self, session: Session, identity: Any, lost: Any = None) -> None:
        """Enter a session that is stored, or about to be, into the index."""
        owner: str = session._owner  # type: ignore[assignment]
        until, moves_from = self._may_live_until(session), None
        if session._record and session.identity != identity:
            moves_from = session.identity
        await self._owners.enter(owner, identity, until, moves_from=moves_from, lost=lost)
        session._listed = owner, until

    def _may_live_until(self, session: Session) -> int | None:
        """Return until when a session may be saved without being entered into the index again."""
        if self._lifetime is not None:
            if session._issued is None:
                session._issued = int(time.time())
            return session._issued + math.ceil(self._lifetime)
        return None if session.max_age is None else int(time.time()) + 2 * session.max_age

    def _read_stored(self, record: bytes) -> StoredSession | None:
        """Read the record of a session; None if that is over, or damaged."""
        data = self._read_payload(record)
        if not data:
            return None
        saved, issued = data.get("created") or 0, data.get("issued")
        max_age = data.get("max_age", self.max_age)
        ends = [] if max_age is None else [saved + max_age]
        if self._lifetime is not None:
            ends.append((saved if issued is None else issued) + self._lifetime)
        expires = math.ceil(min(ends)) if ends else None
        if expires is not None and expires < time.time():
            return None
        items = dict(data.get("session") or {})
        return StoredSession(data.get("owner"), issued, saved, expires, items)

    async def _save_late(self, session: Session) -> None:
        if session._record is None:
            await self._save_owned(self._end, session, b"")
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
            session._ended = previous._record or previous._ended
        else:
            session._replaces = self.load_cookie(request)


def _warn_of_changes_dropped() -> None:
    log.warning("A session was deleted while a request used it; its changes are dropped")
