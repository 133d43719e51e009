"""A near cache: records that were read are kept in this process, and are never stale."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

from . import Store
from .kept_records import KeptRecords
from .per_loop import PerLoop
from .shared_reads import SharedReads

_BYTES = 4096  # a record, on average, at the most


class Tracker(Protocol):
    """A store that reports changes to the records that were read through it, and sees our own."""

    def track(self, records: Callable[[], KeptRecords]) -> None:
        """Keep answers, and forget each when its record changes.

        What is changed here is forgotten before the change is answered.

        :param records: returns those of the running event loop.
        :raises ValueError: if it can't be done.
        """


class NearCacheInfo(NamedTuple):
    """The size of a near cache, and its hits and misses, over all event loops."""

    records: int
    """How many records are kept."""
    bytes: int
    """How many bytes these and their keys take."""
    hits: int
    """How many reads were answered from here."""
    misses: int
    """How many reads went to the store."""


class NearCache(Store):
    """A near cache: keep records in this process, and answer reads from there.

    A record is served from here only while the connection it came by is known to be alive and to
    have reported every change. Only bytes are kept; records over 32 KB and those that don't
    exist are not. Each event loop has its own.

    :param store: does the operations.
    :param tracker: the store behind all the layers, which reports changes.
    :param max_records: how many are kept at most, with 4 KB for each on average; the least recently
        used goes first.
    :raises ValueError: if max_records is not positive, or the tracker can't track.
    """

    reads_locally = True

    def __init__(self, store: Store, tracker: Tracker, *, max_records: int) -> None:
        if max_records < 1:
            raise ValueError(f"near_cache must be 0 or a number of records, not {max_records!r}")
        self.store = store
        self._reads = SharedReads(lambda: self.store)
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
        return payload if payload is not None else await self._reads.read(key)

    async def read_latest(self, key: str) -> bytes | None:
        """Return the record under a key as the store has it now."""
        return await self.store.read(key)

    # Whoever does these forgets what was kept: it knows in which order they and the answers come.

    def create(self, key: str, payload: bytes, ttl: int | None) -> Coroutine[Any, Any, None]:
        """Store a record under a key, whether or not there is one."""
        return self.store.create(key, payload, ttl)

    def swap(
        self, key: str, expected: bytes | None, payload: bytes, ttl: int | None
    ) -> Coroutine[Any, Any, bool]:
        """Replace a record if the store's still is the expected one; return whether it was."""
        return self.store.swap(key, expected, payload, ttl)

    def delete(self, key: str) -> Coroutine[Any, Any, None]:
        """Delete a record."""
        return self.store.delete(key)

    def describe(self) -> Mapping[str, str | int]:
        """Return what the store behind it says of itself."""
        return self.store.describe()

    def near_cache_info(self) -> NearCacheInfo:
        """Return how much is kept now, and how many reads were hits and misses."""
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

    def _make_records(self) -> KeptRecords:
        records = KeptRecords(self._max_records, self._max_records * _BYTES)
        self._all.add(records)
        return records
