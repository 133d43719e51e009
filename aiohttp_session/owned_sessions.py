"""Sessions that are a user's: what a storage does to list and end them."""

from __future__ import annotations

import math
import time
from asyncio import Lock
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from time import monotonic
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

from ._core import Session
from ._options import Unpack, show_options
from .lifecycle import LifecycleOptions, LifecycleStorage
from .owner_index import OwnerIndex, SessionInfo, StoredSession
from .record_keys import RecordKeys
from .stores import Store
from .stores.per_loop import PerLoop
from .time_limit import time_limit

Save: TypeAlias = Callable[[Session, bytes], Coroutine[Any, Any, bool]]


@show_options
class OwnedSessions(LifecycleStorage):
    """The part of `ServerStorage` that knows of users (`Session.owner`); see there."""

    def __init__(
        self,
        store: Store,
        *,
        hash_ids: bool,
        max_per_owner: int | None,
        **options: Unpack[LifecycleOptions],
    ) -> None:
        super().__init__(**options)
        if max_per_owner is not None and max_per_owner < 1:
            raise ValueError(f"max_per_owner must be at least 1, not {max_per_owner!r}")
        self.store = store
        self._keys = RecordKeys(self.cookie_name, hashed=hash_ids)
        self._owners = OwnerIndex(
            self._keys,
            store=lambda: self.store,
            read=self._read_stored,
            turn=self._turn,
            most=max_per_owner,
        )
        # For each key that requests of this process change: they need not fight each other.
        self._turns: PerLoop[WeakValueDictionary[str, Lock]] = PerLoop(WeakValueDictionary)

    async def sessions_of(self, owner: str) -> list[SessionInfo]:
        """List the sessions of a user, the latest log-in first.

        :param owner: what `Session.owner` was set to.
        """
        async with self._limit(monotonic()):
            return await self._owners.list(owner)

    async def end_sessions(self, owner: str, *, keep: Session | None = None) -> int:
        """End all sessions of a user: log out everywhere (OWASP ASVS 5.0, 7.4).

        Every session that was saved before is gone afterwards; a request that is under way in one
        of them saves nothing.

        :param keep: the session of this request, to end only all others.
        :return: how many were ended.
        :raises ConflictError: if other processes keep changing the user's sessions.
        """
        async with self._limit(monotonic()):
            return await self._owners.end(
                owner, self._owners.all_but(None if keep is None else keep.identity)
            )

    async def end_session(self, owner: str, handle: str) -> bool:
        """End one session of a user.

        :param handle: names it, as `sessions_of` says. That of somebody else's session ends none.
        :return: whether it existed.
        :raises ConflictError: if other processes keep changing the user's sessions.
        """
        async with self._limit(monotonic()):
            return await self._owners.end(owner, self._owners.only(handle)) > 0

    async def _save_listed(self, save: Save, session: Session, record: bytes) -> bool:
        """Save a session that is a user's, or was, and keep the index in step."""
        listed, identity = session._listed, session.identity
        async with self._limit(monotonic()):
            if record and not session._renew and self._is_unlisted(session):
                await self._enter(session, identity)
            stored = await save(session, record)
            is_ended = session._record is None or not record
            if stored and is_ended and listed is not None and identity is not None:
                await self._owners.leave(listed[0], identity)
        return stored

    def _is_unlisted(self, session: Session) -> bool:
        """Tell whether the index doesn't know of a session, or not for as long as it may live."""
        if session._listed is None or session._listed[0] != session._owner:
            return session._owner is not None
        left, until = self._time_left(session), session._listed[1]
        return until is not None and (left is None or time.time() + left > until + 1)

    async def _enter(self, session: Session, identity: Any) -> None:
        """Have the index know of a session that is stored, or about to be."""
        owner: str = session._owner  # type: ignore[assignment]
        until, moves_from = self._may_live_until(session), None
        if session._listed is not None and session._listed[0] == owner and session._record:
            moves_from = session.identity if session.identity != identity else None
        await self._owners.enter(owner, identity, until, moves_from=moves_from)
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

    def _limit(self, since: float) -> AbstractAsyncContextManager[None]:
        return time_limit(self.store.timeout, since)

    def _turn(self, key: str) -> Lock:
        """Return what the requests of this process take turns with."""
        return self._turns.get().setdefault(key, Lock())
