"""A user's sessions: the index that lists them, and what can be done by it.

The index of an owner is one record, changed by compare-and-swap alone. A session is entered before
its record is written, so that a crash in between leaves an entry without a record, never a session
without an entry. What others do meanwhile shows when the index is swapped: then it is done again.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

from . import settling
from ._core import decode, encode
from .log import log
from .record_keys import RecordKeys
from .settling import ATTEMPTS, MARK_TTL
from .stores import Store


class SessionInfo(NamedTuple):
    """One of a user's sessions, as `ServerStorage.sessions_of` lists them. Times are Unix times."""

    handle: str
    """Names the session to the storage. It is worthless as a cookie."""
    created: int
    """When it became this owner's, in seconds: the log-in."""
    issued: int | None
    """When it was first saved, if the storage has a ``lifetime``."""
    saved: int
    """When its contents last changed, or when it was last touched (see ``touch_after``)."""
    expires: int | None
    """When it ends unless it is saved again; None is never."""
    data: dict[str, Any]
    """What it holds."""


class Entry(NamedTuple):
    """What the index says of a session."""

    since: int
    """When it became this owner's."""
    entered: int
    """When this entry was made."""
    expires: int | None
    """When it is over at the latest, however it is used until it is entered again."""
    replaces: str | None
    """The id, as in its key, from which it is being moved to this one."""


_Change: TypeAlias = Callable[["dict[str, Entry]"], Awaitable[None]]


class StoredSession(NamedTuple):
    """What the record of a session says."""

    owner: str | None
    issued: int | None
    saved: int
    expires: int | None
    data: dict[str, Any]


class OwnerIndex:
    """The index records of the owners of a storage's sessions.

    :param store: gives the store that the records are in.
    :param read: reads the record of a session; None for one that is over, or damaged.
    :param turn: gives what the requests of this process take turns with.
    :param most: how many sessions an owner may have; None for any number.
    """

    def __init__(
        self,
        keys: RecordKeys,
        *,
        store: Callable[[], Store],
        read: Callable[[bytes], StoredSession | None],
        turn: Callable[[str], asyncio.Lock],
        most: int | None,
    ) -> None:
        self._keys = keys
        self._store = store
        self._read = read
        self._turn = turn
        self._most = most

    async def enter(
        self, owner: str, identity: str, expires: int | None, *, moves_from: str | None = None
    ) -> None:
        """Have the index know of a session, before its record is written.

        :param moves_from: the id that the session has had so far with this owner.
        """
        name = self._keys.tail(identity)
        old = None if moves_from is None else self._keys.tail(moves_from)

        async def change(entries: dict[str, Entry]) -> None:
            since = now = int(time.time())
            for known in (name, old):
                if known in entries:
                    # It has long been there: what it was moved to itself from is gone.
                    since = entries[known].since
                    entries.pop(entries[known].replaces or "", None)
                    entries[known] = entries[known]._replace(replaces=None)
            if name not in entries:
                await self._make_room(owner, entries, spare=old)
            entries[name] = Entry(since, now, expires, old)

        await self._change(owner, change, may_make=True)

    async def leave(self, owner: str, identity: str) -> None:
        """Have the index forget a session whose record has been deleted."""
        name = self._keys.tail(identity)

        async def change(entries: dict[str, Entry]) -> None:
            entries.pop(name, None)

        await self._change(owner, change)

    async def list(self, owner: str) -> list[SessionInfo]:
        """List the sessions, the newest first."""
        entries = self._decode(await self._store().read_latest(self._keys.of_owner(owner)))
        found = await self._find(entries)
        sessions = [
            SessionInfo(_handle(name), entries[name].since, *record[1:])
            for name, record in reversed(found.items())
            if record is not None and record.owner == owner
        ]
        return sorted(sessions, key=lambda info: info.created, reverse=True)

    async def end(self, owner: str, wanted: Callable[[str], bool]) -> int:
        """End those sessions of an owner that are wanted by their names; return how many."""
        ended: set[str] = set()

        async def change(entries: dict[str, Entry]) -> None:
            chosen = {name for name in entries if wanted(name)}
            ended.update(await self._end(owner, entries, chosen))

        await self._change(owner, change)
        return len(ended)

    def all_but(self, identity: object) -> Callable[[str], bool]:
        """Return what wants all sessions but that with this id."""
        name = None if identity is None else self._keys.tail(identity)
        return lambda other: other != name

    def only(self, handle: str) -> Callable[[str], bool]:
        """Return what wants the one session that a handle names."""
        return lambda name: _handle(name) == handle

    async def _change(self, owner: str, change: _Change, *, may_make: bool = False) -> None:
        """Change an index: again if it was changed by others meanwhile."""
        key = self._keys.of_owner(owner)
        async with self._turn(key):
            record = await self._store().read_latest(key)
            for attempt in range(ATTEMPTS):
                if record is None and not may_make:
                    return
                entries = self._decode(record)
                await change(entries)
                payload, ttl = _encode(entries), _ttl(entries)
                found = await settling.swap(self._store(), key, record, payload, ttl)
                if found is payload:
                    return
                record = found
                await settling.pause(attempt)
        raise settling.ConflictError(
            f"The index of a user's sessions could not be changed in {ATTEMPTS} attempts: other "
            "requests kept changing it"
        )

    async def _make_room(self, owner: str, entries: dict[str, Entry], spare: str | None) -> None:
        """End the oldest sessions if there is one too many with another."""
        if self._most is None:
            return
        moving = {entry.replaces for entry in entries.values()}  # known by their new ids
        others = [name for name in _newest_first(entries) if name not in {*moving, spare}]
        if len(others) < self._most:
            return
        found = await self._find(others)
        for name in others:
            record = found[name]
            if record.owner != owner if record else not _may_come(entries[name]):
                del entries[name]
        excess = [name for name in others if name in entries][self._most - 1 :]
        former = {entries[name].replaces or "" for name in excess} & entries.keys()
        await self._end(owner, entries, {*excess, *former})

    async def _end(self, owner: str, entries: dict[str, Entry], chosen: set[str]) -> set[str]:
        """Delete the records of chosen sessions, and their entries; return those there were."""
        found = await self._find(chosen)
        ended = {name for name, record in found.items() if record and record.owner == owner}
        due = {name for name, record in found.items() if record is None} | ended
        while due:
            # One that moves is deleted under its former id first: either that can't be marked any
            # more, and the request takes the new record back; or the new record is there by now.
            first = {name for name in due if entries[name].replaces not in due} or due
            await asyncio.gather(*(self._store().delete(self._keys.at(name)) for name in first))
            due -= first
        for name in chosen:
            record = found[name]
            if record is not None or not _may_come(entries[name]):
                del entries[name]
        return ended

    async def _find(self, names: Collection[str]) -> dict[str, StoredSession | None]:
        """Read the records of sessions, in one round trip where the store can."""
        reads = (_read(self._store(), self._keys.at(name)) for name in names)
        records = await asyncio.gather(*reads)
        return {
            name: None if record is None or settling.is_ended(record) else self._read(record)
            for name, record in zip(names, records, strict=True)
        }

    def _decode(self, record: bytes | None) -> dict[str, Entry]:
        if record is None:
            return {}
        try:
            sessions = decode(record)["sessions"]
            entries = {name: Entry(*entry) for name, entry in sessions.items()}
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            entries = None
        if entries is None or not all(map(self._is_sound, entries, entries.values())):
            log.error(
                "The index of a user's sessions is damaged. It is made anew: the sessions that it "
                "listed go on, but can't be listed or ended any more"
            )
            return {}
        now = time.time()
        return {
            name: entry
            for name, entry in entries.items()
            if entry.expires is None or entry.expires > now
        }

    def _is_sound(self, name: str, entry: Entry) -> bool:
        since, entered, expires, replaces = entry
        return (
            self._keys.is_possible(name)
            and type(since) is type(entered) is int
            and (expires is None or type(expires) is int)
            and (replaces is None or type(replaces) is str)
        )


async def _read(store: Store, key: str) -> bytes | None:
    return await store.read_latest(key)


def _newest_first(entries: Mapping[str, Entry]) -> list[str]:
    names = [*entries][::-1]  # of those of one second, too
    return sorted(names, key=lambda name: entries[name].since, reverse=True)


def _handle(name: str) -> str:
    return hashlib.sha256(name.encode("ascii")).hexdigest()[:32]


def _may_come(entry: Entry) -> bool:
    """Tell whether the record of a session without one may be about to be written."""
    return abs(time.time() - entry.entered) < MARK_TTL


def _encode(entries: Mapping[str, Entry]) -> bytes:
    return encode({"sessions": {name: list(entry) for name, entry in entries.items()}})


def _ttl(entries: Mapping[str, Entry]) -> int | None:
    """Return how long an index must live: as long as the last of its sessions."""
    last: float = 0
    for entry in entries.values():
        if entry.expires is None:
            return None
        last = max(last, entry.expires)
    return max(MARK_TTL, math.ceil(last - time.time()))
