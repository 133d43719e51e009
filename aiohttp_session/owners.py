"""The sessions of a user: the index that lists them, and what ends them.

The index of an owner is one record, which is changed only by a swap. A session is entered before
its record is written, so a crash in between leaves an entry without a record, but never a session
without an entry. The index contains a counter, so it never returns to the same bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from ._core import Session, decode, encode
from .log import RateLimited, log
from .record_keys import RecordKeys
from .saving import (
    ATTEMPTS,
    MARK_TTL,
    UNSEEN,
    Change,
    ConflictError,
    Edit,
    Lanes,
    is_ended,
    moved_to,
)
from .stores import Store
from .stores.per_loop import PerLoop

_MOST_ENTRIES = 1000  # of an owner without a limit
_VISIT_AFTER = 1.0  # seconds
_VISITS_KEPT = 10_000
_BEGINNING, _ENTRY = b'{"sessions":{', b'":['


class SessionInfo(NamedTuple):
    """One of a user's sessions, as `ServerStorage.sessions_of` lists them. Times are Unix times."""

    handle: str
    """Names the session to the storage. It is worthless as a cookie."""
    created: int
    """When it became this owner's, in seconds: the login."""
    issued: int | None
    """When it was first saved, if the storage has a ``lifetime``."""
    saved: int
    """When its contents last changed, or when it was last touched (see ``touch_after``)."""
    expires: int | None
    """When it ends unless it is saved again; None is never."""
    data: dict[str, Any]
    """What it holds."""


class Entry(NamedTuple):
    """An entry of the index."""

    since: int
    """When the session became this owner's."""
    entered: int
    """When this entry was made."""
    expires: int | None
    """When the session is over at the latest, unless it is entered again."""
    replaces: str | None
    """The id, as in its key, from which the session is being moved to this one."""


class StoredSession(NamedTuple):
    """The contents of a session's record."""

    owner: str | None
    issued: int | None
    saved: int
    expires: int | None
    data: dict[str, Any]


Entries: TypeAlias = "dict[str, Entry]"
EndRecord: TypeAlias = Callable[..., Any]


class Owners:
    """The index records of the owners of a storage's sessions.

    :param store: returns the store that contains the records.
    :param read: decodes the record of a session; returns None if it is over, or damaged.
    :param end: ends the session under a key, as `ServerStorage._end_record` does.
    :param most: how many sessions an owner may have; None for any number.
    """

    def __init__(
        self,
        keys: RecordKeys,
        lanes: Lanes,
        *,
        store: Callable[[], Store],
        read: Callable[[bytes], StoredSession | None],
        end: EndRecord,
        most: int | None,
    ) -> None:
        self._keys = keys
        self._lanes = lanes
        self._store = store
        self._read = read
        self._end_record = end
        self._most = most
        self._visited: dict[tuple[str, bool], float] = {}  # Unix times, by session id
        self._visits: PerLoop[dict[str, asyncio.Task[None]]] = PerLoop(dict)
        self._too_many = RateLimited(
            logging.WARNING,
            "The index of a user's sessions lists at most %d sessions: the oldest were removed "
            "from it. They stay alive, but are neither listed nor ended (see max_per_owner)",
            seconds=60,
        )

    async def enter(
        self,
        owner: str,
        identity: object,
        expires: int | None,
        *,
        moves_from: object = None,
        lost: object = None,
    ) -> None:
        """Enter a session into the index, before its record is written.

        :param moves_from: the id from which the session moves to this one; None if it does not.
        :param lost: the id of a former attempt to store the session. Its entry is removed.
        """
        name = self._keys.tail(identity)
        old = None if moves_from is None else self._keys.tail(moves_from)

        def edit(entries: Entries) -> bool:
            since = now = int(time.time())
            if lost is not None:
                entries.pop(self._keys.tail(lost), None)
            for known in (name, old):
                if known in entries:
                    # The session was loaded under this id, so its last move is long completed.
                    since = entries[known].since
                    entries.pop(entries[known].replaces or "", None)
                    entries[known] = entries[known]._replace(replaces=None)
            _put(entries, name, Entry(since, now, expires, old))
            if self._most is None and len(entries) > _MOST_ENTRIES:
                for oldest in _newest_first(entries)[_MOST_ENTRIES:]:
                    del entries[oldest]
                self._too_many.log(_MOST_ENTRIES)
            return True

        await self._change(owner, edit, may_make=True)

    async def leave(self, owner: str, identity: object, *, is_over: bool = False) -> None:
        """Remove the entry of a session that has ended, or was not moved to this id.

        :param is_over: the session was loaded under this id, so its last move is completed, and the
            entry of its former id is removed as well.
        """
        name = self._keys.tail(identity)

        def edit(entries: Entries) -> bool:
            entry = entries.pop(name, None)
            if entry is not None and is_over:
                entries.pop(entry.replaces or "", None)
            return entry is not None

        await self._change(owner, edit)

    async def make_room(self, owner: str) -> None:
        """End the oldest sessions of an owner who has too many, after a login is complete."""
        if self._most is None:
            return
        entries, _ = self._decode(await self._store().read_latest(self._keys.of_owner(owner)))
        if len(entries) <= self._most:
            return
        found = await self._find(entries)
        live: list[str] = []
        over: list[str] = []
        for name in _newest_first(entries):
            record = found.sessions[found.newest(name)]
            if found.is_pending(name) or (record is None and _may_come(entries[name])):
                continue  # a login that is not complete makes room itself when it is
            (live if record is not None and record.owner == owner else over).append(name)
        excess = live[self._most :]
        await self._end_names(owner, entries, excess, found, spared=())
        gone = {*excess, *over}
        if gone:
            await self._change(owner, lambda entries: _remove(entries, gone))

    async def list(self, owner: str) -> list[SessionInfo]:
        """List the sessions of an owner, the latest login first."""
        entries, _ = self._decode(await self._store().read_latest(self._keys.of_owner(owner)))
        found = await self._find(entries)
        return [
            SessionInfo(_handle(newest), entries[name].since, *record[1:])
            for name in _newest_first(entries)
            if (record := found.sessions[newest := found.newest(name)]) is not None
            and record.owner == owner
            and not found.is_pending(name)
        ]

    async def end_one(self, owner: str, handle: str) -> bool:
        """End the session that a handle names; return whether it was alive."""

        def choose(entries: Entries) -> set[str]:
            chosen = {name for name in entries if _handle(name) == handle}
            # While a session moves, it is alive under two ids.
            former = {entries[name].replaces or "" for name in chosen} & entries.keys()
            return _with_successors(chosen | former, entries)

        return await self._end(owner, choose, None) > 0

    async def end_all(self, owner: str, *, keep: object = None) -> int:
        """End all sessions of an owner but one; return how many were alive.

        :param keep: the id of the session to keep, whatever id it moves to.
        """
        kept = None if keep is None else self._keys.tail(keep)
        return await self._end(owner, lambda entries: {*entries}, kept)

    def visit(self, session: Session, *, latest: bool = False) -> None:
        """Look after the index of a session that was loaded: read it, in the background.

        The index is therefore used as recently as the sessions it lists, and a store that evicts
        the least recently used records does not evict it before them. If the session is missing in
        it, as in an index that was lost, the next save enters the session again.

        :param latest: read the index where the store is, not in a cache, since the session's record
            is written there.
        """
        identity, now = str(session.identity), time.time()
        visit = identity, latest
        if abs(now - self._visited.get(visit, -math.inf)) < _VISIT_AFTER:
            return
        if len(self._visited) >= _VISITS_KEPT:
            self._visited.clear()
        self._visited[visit] = now
        visits = self._visits.get()
        owner: str = session.owner  # type: ignore[assignment]
        task = asyncio.ensure_future(self._visit(session, owner, identity, latest=latest))
        visits[identity] = task
        task.add_done_callback(
            lambda task: visits.pop(identity) if visits.get(identity) is task else None
        )

    async def visited(self, identity: object) -> None:
        """Wait for the visit that a load has begun."""
        if (visit := self._visits.get().get(str(identity))) is not None:
            await asyncio.wait((visit,))

    async def finish(self) -> None:
        """Wait for what is in flight in this event loop."""
        if visits := [*self._visits.get().values()]:
            await asyncio.wait(visits)

    async def _visit(self, session: Session, owner: str, identity: str, *, latest: bool) -> None:
        store = self._store()
        try:
            record = await (store.read_latest if latest else store.read)(self._keys.of_owner(owner))
        except Exception:  # noqa: BLE001 - an operation that a request waits for reports it
            self._visited.pop((identity, latest), None)
            return
        if session.owner != owner or session.identity != identity:
            return
        is_sound = record is not None and record.startswith(_BEGINNING)
        name = encode(self._keys.tail(identity)) + b":"
        is_full = self._most is None and (record or b"").count(_ENTRY) >= _MOST_ENTRIES
        if not (is_sound and (name in record or is_full)):  # type: ignore[operator]
            session._listed = None

    async def _change(
        self, owner: str, edit: Callable[[Entries], bool], *, may_make: bool = False
    ) -> Change:
        """Change an index.

        :param edit: changes the entries in place; returns False to leave the index as it is.
        :param may_make: make the index if there is none.
        """

        def make(record: bytes | None) -> tuple[bytes, int | None] | None:
            if record is None and not may_make:
                return None
            entries, number = self._decode(record)
            return (_encode(entries, number), _ttl(entries)) if edit(entries) else None

        change = Edit(make)
        await self._lanes.change(self._keys.of_owner(owner), UNSEEN, change)
        return change

    async def _end(
        self, owner: str, choose: Callable[[Entries], set[str]], kept: str | None
    ) -> int:
        alive: set[str] = set()
        ended: set[str] = set()
        done: set[str] = set()
        stays: set[str] = set()
        is_complete = True

        def edit(entries: Entries) -> bool:
            nonlocal is_complete
            is_complete = choose(entries) - _with_successors(spared, entries) <= done
            return is_complete and _remove(entries, done - stays)

        record = await self._store().read_latest(self._keys.of_owner(owner))
        for _ in range(ATTEMPTS):
            if record is None:
                return len(ended)
            entries, _ = self._decode(record)
            spared = await self._follow(kept)
            due = choose(entries) - _with_successors(spared, entries) - done
            chosen = [name for name in entries if name in due]
            found = self._found(entries, await self._read_all(chosen))
            stays |= {
                name for name in chosen if found.sessions[name] is None and _may_come(entries[name])
            }
            was_alive = await self._end_names(owner, entries, chosen, found, spared)
            alive |= was_alive
            # A session that was moving was alive under two ids.
            ended |= {name for name in was_alive if entries[name].replaces not in alive}
            done |= due
            record = (await self._change(owner, edit)).before
            if is_complete:
                return len(ended)
        raise ConflictError(
            f"The sessions of a user could not be ended in {ATTEMPTS} attempts: other requests "
            "kept changing their index"
        )

    async def _follow(self, name: str | None) -> set[str]:
        """Return a session's id, as in its key, and those that it has moved to since."""
        names: set[str] = set()
        while name is not None and name not in names:
            names.add(name)
            name = moved_to(await self._store().read_latest(self._keys.at(name)))
        return names

    async def _end_names(
        self,
        owner: str,
        entries: Mapping[str, Entry],
        names: Iterable[str],
        found: _Found,
        spared: Collection[str],
    ) -> set[str]:
        """End sessions, wherever they have moved to; return the names of those that were alive."""

        def may_end(record: bytes) -> bool:
            session = self._read(record)
            return session is None or session.owner == owner

        async def end(name: str) -> bool:
            record = await self._end_record(
                name, found.records[name], may_end=may_end, spared=spared
            )
            return record is not None and self._read(record) is not None

        names = [*names]
        were_alive = await asyncio.gather(*map(end, names))
        return {name for name, was_alive in zip(names, were_alive, strict=True) if was_alive}

    async def _find(self, entries: Mapping[str, Entry]) -> _Found:
        """Read the records of all sessions of an index.

        If a session moves in the meantime, both reads may miss it. So if the record of the former
        id is a mark, the record of the new id is read again.
        """
        former = (entry.replaces for entry in entries.values())
        names = dict.fromkeys([*entries, *filter(None, former)])
        records = await self._read_all([*names])
        again: set[str] = set()
        while True:
            targets = filter(None, map(moved_to, records.values()))
            new = {name for name in targets if records.get(name) is None} - again
            if not new:
                return self._found(entries, records)
            again |= new
            records.update(await self._read_all([*new]))

    def _found(self, entries: Mapping[str, Entry], records: Mapping[str, bytes | None]) -> _Found:
        sessions = {
            name: None if record is None or is_ended(record) else self._read(record)
            for name, record in records.items()
        }
        return _Found(entries, records, sessions)

    async def _read_all(self, names: Sequence[str]) -> dict[str, bytes | None]:
        """Read the records of sessions, in one round trip where the store can."""
        reads = (_read(self._store(), self._keys.at(name)) for name in names)
        return dict(zip(names, await asyncio.gather(*reads), strict=True))

    def _decode(self, record: bytes | None) -> tuple[Entries, int]:
        """Return the entries of an index, and the number of its changes."""
        if record is None:
            return {}, secrets.randbelow(2**31)
        try:
            index = decode(record)
            entries = {name: Entry(*entry) for name, entry in index["sessions"].items()}
            number = index.get("changes", 0)
            is_sound = type(number) is int and all(map(self._is_sound, entries, entries.values()))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            is_sound = False
        if not is_sound:
            log.error(
                "The index of a user's sessions is damaged. It is made anew: each session that it "
                "listed can be listed and ended again once it is saved"
            )
            return {}, secrets.randbelow(2**31)
        now = time.time()
        for name in [*entries]:
            expires = entries[name].expires
            if expires is not None and expires <= now:
                del entries[name]
        return entries, number

    def _is_sound(self, name: str, entry: Entry) -> bool:
        since, entered, expires, replaces = entry
        return (
            self._keys.is_possible(name)
            and type(since) is type(entered) is int
            and (expires is None or type(expires) is int)
            and (replaces is None or type(replaces) is str)
        )


class _Found(NamedTuple):
    """The records of sessions, by their names in the index."""

    entries: Mapping[str, Entry]
    records: Mapping[str, bytes | None]
    sessions: Mapping[str, StoredSession | None]

    def newest(self, name: str) -> str:
        """Follow a session to the id that it has moved to, if that id has no entry of its own."""
        passed: set[str] = set()
        while (target := moved_to(self.records[name])) is not None and target not in passed:
            if target in self.entries:
                break
            passed.add(name)
            name = target
        return name

    def is_pending(self, name: str) -> bool:
        """Tell whether the move of a session to this id is not complete, or was lost."""
        former = self.entries[name].replaces
        if former is None:
            return False
        record = self.records[former]
        if is_ended(record) and (target := moved_to(record)) is not None:
            return target != name
        # The mark is there for a minute.
        return not is_ended(record) or _may_come(self.entries[name])


async def _read(store: Store, key: str) -> bytes | None:
    return await store.read_latest(key)


def _with_successors(names: Iterable[str], entries: Mapping[str, Entry]) -> set[str]:
    """Return names, and those of the entries to which these sessions are being moved."""
    every = {*names}
    while more := {n for n, entry in entries.items() if entry.replaces in every} - every:
        every |= more
    return every


def _remove(entries: Entries, names: Iterable[str]) -> bool:
    """Remove entries; return whether there were any."""
    removed = [entries.pop(name, None) for name in names]
    return any(removed)


def _put(entries: Entries, name: str, entry: Entry) -> None:
    """Put an entry in the place of its session, or at the end if the index lacks the session."""
    if name in entries or entry.replaces not in entries:
        entries[name] = entry
        return
    items = [*entries.items()]
    items.insert([*entries].index(entry.replaces) + 1, (name, entry))
    entries.clear()
    entries.update(items)


def _newest_first(entries: Mapping[str, Entry]) -> list[str]:
    """Return the names, the latest login first. The clocks of the processes have no influence."""
    return [*entries][::-1]


def _handle(name: str) -> str:
    return hashlib.sha256(name.encode("ascii")).hexdigest()[:32]


def _may_come(entry: Entry) -> bool:
    """Tell whether the record of a session without one may be about to be written."""
    return abs(time.time() - entry.entered) < MARK_TTL


def _encode(entries: Mapping[str, Entry], number: int) -> bytes:
    sessions = {name: list(entry) for name, entry in entries.items()}
    return encode({"sessions": sessions, "changes": number + 1})


def _ttl(entries: Mapping[str, Entry]) -> int | None:
    """Return how long an index must live: as long as the last of its sessions."""
    last: float = 0
    for entry in entries.values():
        if entry.expires is None:
            return None
        last = max(last, entry.expires)
    return max(MARK_TTL, math.ceil(last - time.time()))
