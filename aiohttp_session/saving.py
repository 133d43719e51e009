"""How a record is changed: by a swap, which names the record that it replaces.

A network, a proxy or a paused process can deliver a write at any later time, also after the client
was told that the connection is gone. A swap is harmless then: it no longer matches. Therefore each
change of a record is a swap, an unknown outcome is resolved by repeating the same swap, and nothing
ever replaces a mark, which says that a session has moved to a new id.
"""

from __future__ import annotations

import asyncio
import math
import random
import secrets
from asyncio import sleep
from collections.abc import Callable, Sequence
from enum import Enum
from time import monotonic
from typing import NamedTuple, Protocol, TypeAlias

from ._core import FutureGroup, Session, decode
from .stores import Store, UnsettledError
from .stores.batch import fail
from .stores.per_loop import PerLoop
from .time_limit import time_limit, timed_out

ATTEMPTS = 100
"""How often a swap is tried again while other processes keep changing the record."""
MARK_TTL = 60  # seconds: a mark must outlive every request that loaded the record before
_REPEATS = 4  # of one swap whose connection is lost each time
ENDED = b"{}"
"""The record of a session that has ended, until it is deleted or expires."""
_MOVED = b'{"moved":'
_EMPTIED = b'{"emptied":'


class HasStore(Protocol):
    """What has a store, which may be replaced."""

    store: Store


Replacement: TypeAlias = tuple[bytes, "int | None"]  # a payload and its TTL
Make: TypeAlias = Callable[["bytes | None"], "Replacement | None"]


class Unseen(Enum):
    """The type of UNSEEN."""

    UNSEEN = False


UNSEEN = Unseen.UNSEEN
"""In place of a record that was not read yet."""


class ConflictError(RuntimeError):
    """A session could not be saved, because other requests kept changing its record."""


def mark_for(tail: str) -> bytes:
    """Return the mark that stays under the former id of a session for a minute.

    :param tail: what follows the cookie name in the key of the new record. Only the end of a
        session follows a mark; a load never does.
    """
    return b'%b"%b"}' % (_MOVED, tail.encode())


def moved_to(record: bytes | None) -> str | None:
    """Return the tail of the key that a mark names; None for any other record."""
    if record is None or not record.startswith(_MOVED):
        return None
    try:
        tail = decode(record)["moved"]
    except (ValueError, TypeError, LookupError):
        return None
    return tail if isinstance(tail, str) else None


def emptied() -> bytes:
    """Return the record of a session that lost its last item while other requests may add some.

    It is never the same twice, so that a late swap finds another one.
    """
    return b'%b"%b"}' % (_EMPTIED, secrets.token_hex(8).encode())


def is_ended(record: bytes | None) -> bool:
    """Tell whether a session has ended under this key, or has moved away."""
    return record is None or record == ENDED or record.startswith(_MOVED)


def has_no_session(record: bytes) -> bool:
    """Tell whether a load treats a record as no session at all."""
    return record == ENDED or record.startswith((_MOVED, _EMPTIED))


async def pause(attempt: int) -> None:
    """Wait before the next attempt, longer after each attempt."""
    await sleep(random.uniform(0, 0.001 * min(attempt, 20)))  # noqa: S311


class Change:
    """What a request makes of a record."""

    __slots__ = ("after", "before")

    is_final: bool = False
    """Whether nothing ever replaces what the change writes, as with a mark. So if another record is
    found later, the change was not applied."""

    before: bytes | None
    """The record that the change was applied to."""
    after: bytes | None
    """What replaced that record; None if it was left as it was."""

    def apply(self, record: bytes | None) -> Replacement | None:
        """Return what replaces a record; None to leave it.

        It is called again whenever the record turns out to be another one.

        :param record: None if there is none.
        """
        self.before = record
        made = self._make(record)
        self.after = None if made is None else made[0]
        return made

    def _make(self, record: bytes | None) -> Replacement | None:
        raise NotImplementedError


class Edit(Change):
    """A change that a function makes.

    :param make: takes the current record, and returns what replaces it; None to leave it.
    """

    __slots__ = ("_edit", "is_final")

    def __init__(self, make: Make, *, is_final: bool = False) -> None:
        self._edit = make
        self.is_final: bool = is_final

    def _make(self, record: bytes | None) -> Replacement | None:
        return self._edit(record)


class Overwrite(Change):
    """A change that replaces any record of a session that has not ended."""

    __slots__ = ("_replacement",)

    def __init__(self, payload: bytes, ttl: int | None) -> None:
        self._replacement = payload, ttl

    def apply(self, record: bytes | None) -> Replacement | None:
        """Return what replaces a record; None to leave it."""
        self.before = record
        if is_ended(record):
            self.after = None
            return None
        self.after = self._replacement[0]
        return self._replacement


class _Waiting(NamedTuple):
    """A change that waits while a swap of its record is in flight."""

    change: Change
    future: asyncio.Future[None]
    deadline: float  # loop time


class _Lane:
    """The changes of one key, while a swap of the key is in flight."""

    __slots__ = ("_loop", "_timeout", "_timer", "sent", "waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float | None) -> None:
        self._loop = loop
        self._timeout = timeout
        self._timer: asyncio.TimerHandle | None = None
        self.waiting: list[_Waiting] = []
        self.sent: list[_Waiting] = []

    def add(self, change: Change, future: asyncio.Future[None]) -> None:
        """Add a change, which fails when its time is up."""
        deadline = math.inf
        if self._timeout is not None:
            deadline = self._loop.time() + self._timeout
            if self._timer is None:  # one timer serves all, since a timer takes 2 µs
                self._timer = self._loop.call_at(deadline, self._expire)
        self.waiting.append(_Waiting(change, future, deadline))

    def take(self) -> list[_Waiting]:
        """Return the changes that still wait, to be sent."""
        self.sent = [one for one in self.waiting if not one.future.done()]
        self.waiting = []
        return self.sent

    def close(self) -> None:
        """Leave nothing behind; only if the event loop is shutting down do any changes wait."""
        if self._timer is not None:
            self._timer.cancel()
        for one in (*self.sent, *self.waiting):
            one.future.cancel()

    def _expire(self) -> None:
        now = self._loop.time()
        left = [one for one in (*self.sent, *self.waiting) if not one.future.done()]
        for one in left:
            if one.deadline <= now:
                fail(one.future, timed_out(self._timeout or 0))
        due = min((one.deadline for one in left if one.deadline > now), default=math.inf)
        self._timer = None if due == math.inf else self._loop.call_at(due, self._expire)


class _Here:
    """The lanes of an event loop, by key."""

    def __init__(self) -> None:
        self.by_key: dict[str, _Lane | None] = {}  # None: no change waits
        self.drains: set[asyncio.Task[None]] = set()
        self.futures = FutureGroup(asyncio.get_running_loop())


class Lanes:
    """Changes records, with at most one swap of a key in flight in each event loop.

    Changes that arrive in the meantime wait, and are then sent together as one swap, whose reply
    acknowledges all of them. Each waits no longer than the store's timeout. The cancellation of one
    leaves the others undisturbed.

    :param holder: has the store, which may be replaced.
    """

    def __init__(self, holder: HasStore) -> None:
        self._holder = holder
        self._here: PerLoop[_Here] = PerLoop(_Here)

    async def change(self, key: str, record: bytes | Unseen | None, change: Change) -> None:
        """Apply a change to a record.

        :param record: the record as it was last seen; UNSEEN if it was not read yet.
        :raises UnsettledError: if it can't be determined whether the record was changed.
        :raises ConflictError: if other processes keep changing the record.
        """
        here = self._here.get()
        if key in here.by_key:
            await self._join(here, key, change)
            return
        here.by_key[key] = None
        since = monotonic()
        guess = record
        try:
            unsettled = None
            if record is not UNSEEN:
                made = change.apply(record)
                if made is None:
                    return
                try:
                    if await self._holder.store.swap(key, record, *made):
                        guess = made[0]
                        return
                except UnsettledError as error:
                    unsettled = error
            guess = await self._go_on(key, record, change, since, unsettled)
        finally:
            self._leave(here, key, guess)

    async def replace(
        self,
        key: str,
        session: Session,
        record: bytes,
        payload: bytes,
        ttl: int | None,
        make: Callable[[], Change],
    ) -> bool:
        """Replace the record of a session by its payload, as nearly all saves do.

        :param record: the record as it was loaded.
        :param make: makes the change to be applied if that record is not the current one.
        :return: False if the change left the record as it was.
        :raises UnsettledError: as `change` does, like ConflictError.
        """
        here = self._here.get()
        lanes = here.by_key
        if key in lanes:
            change = make()
            await self._join(here, key, change)
        else:
            lanes[key] = None
            since = monotonic()
            guess: bytes | Unseen | None = record
            try:
                unsettled = None
                try:
                    if await self._holder.store.swap(key, record, payload, ttl):
                        session._record = guess = payload
                        return True
                except UnsettledError as error:
                    unsettled = error
                change = make()
                guess = await self._go_on(key, record, change, since, unsettled)
            finally:
                if lanes[key] is None:
                    del lanes[key]
                else:
                    self._leave(here, key, guess)
        if change.after is None:
            return False
        session._record = change.after
        return True

    def is_busy(self, key: str) -> bool:
        """Tell whether a change of a key would have to wait."""
        return key in self._here.get().by_key

    def expect(self, key: str, record: bytes | None) -> None:
        """Send the changes of a key that come before the next turn of the loop as one swap.

        Several requests have just read the record together. Most handlers that change a session do
        so at once, so the first change waits for those of the other requests.

        :param record: the record that was read.
        """
        here = self._here.get()
        if key not in here.by_key:
            loop = asyncio.get_running_loop()
            lane = here.by_key[key] = _Lane(loop, self._holder.store.timeout)
            loop.call_soon(self._go, here, key, lane, record)

    def _go(self, here: _Here, key: str, lane: _Lane, record: bytes | None) -> None:
        """Send the changes that were expected."""
        if lane.waiting:
            self._leave(here, key, record)
        else:
            del here.by_key[key]

    async def finish(self) -> None:
        """Wait for the changes that are in flight in this event loop."""
        while drains := self._here.get().drains:
            await asyncio.wait(drains)

    def _join(self, here: _Here, key: str, change: Change) -> asyncio.Future[None]:
        """Have a change wait; return the future that is done when it was applied."""
        lane = here.by_key[key]
        if lane is None:
            timeout = self._holder.store.timeout
            lane = here.by_key[key] = _Lane(asyncio.get_running_loop(), timeout)
        future: asyncio.Future[None] = here.futures.create_future()
        lane.add(change, future)
        return future

    def _leave(self, here: _Here, key: str, record: bytes | Unseen | None) -> None:
        """Send the changes that have come in the meantime.

        :param record: a guess of the current record.
        """
        lane = here.by_key[key]
        if lane is None:
            del here.by_key[key]
            return
        # The task belongs to no request, so a cancelled request leaves the others undisturbed.
        task = asyncio.ensure_future(self._drain(here, key, lane, record))
        here.drains.add(task)
        task.add_done_callback(here.drains.discard)

    async def _go_on(
        self,
        key: str,
        record: bytes | Unseen | None,
        change: Change,
        since: float,
        unsettled: UnsettledError | None,
    ) -> bytes | None:
        """Apply a change after the first swap, if there was any, did not succeed.

        :param unsettled: the error of the swap; None if another record was there.
        """
        async with time_limit(self._holder.store.timeout, since):
            if unsettled is None or isinstance(record, Unseen):
                record = await self._holder.store.read_latest(key)
            return await self._settle(key, record, [change], unsettled)

    async def _drain(
        self, here: _Here, key: str, lane: _Lane, record: bytes | Unseen | None
    ) -> None:
        """Send the changes that wait for a key, until none waits.

        :param record: a guess of the current record.
        """
        try:
            while batch := lane.take():
                try:
                    if isinstance(record, Unseen):
                        record = await self._holder.store.read_latest(key)
                    record = await self._settle(key, record, [one.change for one in batch])
                except Exception as error:  # noqa: BLE001 - the requests that wait get it
                    record = UNSEEN
                    for one in batch:
                        fail(one.future, error)
                else:
                    for one in batch:
                        if not one.future.done():
                            one.future.set_result(None)
        finally:
            del here.by_key[key]
            lane.close()

    async def _settle(
        self,
        key: str,
        record: bytes | None,
        changes: Sequence[Change],
        unsettled: UnsettledError | None = None,
    ) -> bytes | None:
        """Swap a record for what the changes make of it; return the record that is there then.

        :param unsettled: the error of the first swap, if that was sent and its outcome is unknown.
        """
        for attempt in range(ATTEMPTS):
            made = _apply(changes, record)
            if made is None:
                return record
            payload = made[0]
            found, unsettled = await self._swap(key, record, made, unsettled)
            if found == payload and (unsettled is not None or found is payload):
                return payload
            if unsettled is not None:
                is_final = any(one.is_final and one.after == payload for one in changes)
                if _apply(changes, found) is not None and not is_final:
                    # Another process has replaced the record, before or after the swap was applied.
                    raise unsettled
                unsettled = None
            record = found
            await pause(attempt)
        raise ConflictError(
            f"A record could not be changed in {ATTEMPTS} attempts: other requests kept changing it"
        )

    async def _swap(
        self,
        key: str,
        record: bytes | None,
        made: Replacement,
        unsettled: UnsettledError | None,
    ) -> tuple[bytes | None, UnsettledError | None]:
        """Swap a record, and repeat the same swap as long as it was neither applied nor overtaken.

        :return: the very payload if it was applied, else the record that was found; and the error
            if the outcome of a swap is unknown.
        """
        store = self._holder.store
        for _ in range(_REPEATS):
            try:
                if await store.swap(key, record, *made):
                    return made[0], None
            except UnsettledError as error:
                unsettled = error
            found = await store.read_latest(key)
            if unsettled is None or found != record:
                break
        return found, unsettled


def _apply(changes: Sequence[Change], record: bytes | None) -> Replacement | None:
    """Apply changes one after another; return the last replacement, None if there is none."""
    last = None
    for change in changes:
        made = change.apply(record)
        if made is not None:
            last, record = made, made[0]
    return last
