"""A near cache: records that were read are kept in this process, and are never stale."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakSet

from . import Store
from .kept_records import KeptRecords
from .per_loop import PerLoop

_T = TypeVar("_T")
_BYTES = 4096  # a record, on average, at the most


class Tracker(Protocol):
    """What tells of changes to records that were read through it."""

    def track(self, records: Callable[[], KeptRecords]) -> None:
        """Have answers kept, and forgotten when the store tells of a change.

        :param records: gives those of the running event loop.
        :raises ValueError: if it can't be done.
        """


class NearCacheInfo(NamedTuple):
    """What a near cache holds, and how it has served, in all event loops together."""

    records: int
    bytes: int
    """Of records and their keys."""
    hits: int
    misses: int


class NearCache(Store):
    """Keep records in this process, and answer reads from there: a near cache.

    A record is served from here only while the connection that it came by is known to be alive,
    and to have told of every change. Only bytes are kept; records over 32 KB and those that don't
    exist are not. Each event loop has its own.

    :param store: does the operations.
    :param tracker: the store at the end of the line, which tells of changes.
    :param max_records: how many are kept at the most, in 4 KB for each of them together; the least
        recently used goes first.
    :raises ValueError: if max_records is not positive, or the tracker can't track.
    """

    def __init__(self, store: Store, tracker: Tracker, *, max_records: int) -> None:
        if max_records < 1:
            raise ValueError(f"near_cache must be 0 or a number of records, not {max_records!r}")
        self.store = store
        self._max_records = max_records
        self._all: WeakSet[KeptRecords] = WeakSet()
        self._records: PerLoop[KeptRecords] = PerLoop(self._make_records)
        tracker.track(self._records.get)

    @property
    def timeout(self) -> float | None:  # type: ignore[override]
        """Seconds after which an operation fails."""
        return self.store.timeout

    async def read(self, key: str) -> bytes | None:
        """Return the record under a key: the one that is kept, or that of the store."""
        payload = self._records.get().get(key)
        return payload if payload is not None else await self.store.read(key)

    async def read_latest(self, key: str) -> bytes | None:
        """Return the record under a key as the store has it now."""
        return await self.store.read(key)

    def create(self, key: str, payload: bytes, ttl: int | None) -> Coroutine[Any, Any, None]:
        """Store a record under a key, whether or not there is one."""
        return self._change(key, self.store.create(key, payload, ttl))

    def update(self, key: str, payload: bytes, ttl: int | None) -> Coroutine[Any, Any, bool]:
        """Replace a record; return False if there is none."""
        return self._change(key, self.store.update(key, payload, ttl))

    def swap(
        self, key: str, expected: bytes | None, payload: bytes, ttl: int | None
    ) -> Coroutine[Any, Any, bool]:
        """Replace a record if the store's still is the expected one; return whether it was."""
        return self._change(key, self.store.swap(key, expected, payload, ttl))

    def delete(self, key: str) -> Coroutine[Any, Any, None]:
        """Delete a record."""
        return self._change(key, self.store.delete(key))

    def describe(self) -> Mapping[str, str | int]:
        """Return what the store behind it says of itself."""
        return self.store.describe()

    def near_cache_info(self) -> NearCacheInfo:
        """Say what is kept at the moment, and how many reads were answered by it."""
        every = list(self._all)
        return NearCacheInfo(
            records=sum(len(records.by_key) for records in every),
            bytes=sum(records.bytes for records in every),
            hits=sum(records.hits for records in every),
            misses=sum(records.misses for records in every),
        )

    async def finish(self) -> None:
        """Wait for what is under way in this event loop, and let go of its connections."""
        await self.store.finish()

    async def _change(self, key: str, doing: Awaitable[_T]) -> _T:
        records = self._records.get()
        records.begin_change(key)
        try:
            return await doing
        except BaseException:
            # Whether it was done isn't known, nor whether an answer was given before or after it.
            records.forget(key)
            raise
        finally:
            records.end_change(key)

    def _make_records(self) -> KeptRecords:
        records = KeptRecords(self._max_records, self._max_records * _BYTES)
        self._all.add(records)
        return records
