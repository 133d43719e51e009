"""Records in the memory of this process."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TypeAlias

from . import Store

_Record: TypeAlias = tuple[bytes, "float | None"]  # and the Unix time at which it expires


class MemoryStore(Store):
    """Keep records in this process; event loops in several threads may share them.

    The least recently used records go first when there are too many.

    :param max_records: how many are kept at most.
    :param max_bytes: how many bytes their keys and payloads take at most.
    """

    reads_locally = True

    def __init__(self, *, max_records: int = 100_000, max_bytes: int = 100_000_000) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._bytes = 0
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of records, expired ones included until they are next asked for."""
        return len(self._records)

    def __bool__(self) -> bool:
        return True

    def describe(self) -> dict[str, str | int]:
        """Say what the store is."""
        return {"db.system.name": "memory"}

    async def read(self, key: str) -> bytes | None:
        """Return the record under a key, unless it has expired."""
        # Without the lock, which takes 0.1 µs, unless something is to be changed but the order.
        record = self._records.get(key)
        if record is None or (record[1] is not None and time.time() >= record[1]):
            with self._lock:
                record = self._find(key)
            return None if record is None else record[0]
        try:  # noqa: SIM105 - to suppress it takes longer than the lock
            self._records.move_to_end(key)
        except KeyError:  # another thread has deleted it just now
            pass
        return record[0]

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        """Store a record, at the cost of the least recently used ones if there are too many.

        :raises ValueError: if it alone is more than `max_bytes`, as for `swap`.
        """
        with self._lock:
            self._put(key, payload, ttl, self._records.get(key))

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        """Replace a record if it still is the expected one."""
        with self._lock:
            old = self._find(key)
            if (None if old is None else old[0]) != expected:
                return False
            self._put(key, payload, ttl, old)
            return True

    async def delete(self, key: str) -> None:
        """Delete a record, if there is one."""
        with self._lock:
            self._drop(key)

    def _find(self, key: str) -> _Record | None:
        record = self._records.get(key)
        if record is not None and record[1] is not None and time.time() >= record[1]:
            self._drop(key)
            return None
        return record

    def _put(self, key: str, payload: bytes, ttl: int | None, old: _Record | None) -> None:
        size = len(key) + len(payload)
        if size > self._max_bytes:
            raise ValueError(f"A record of {size} bytes is more than max_bytes={self._max_bytes}")
        self._bytes += size if old is None else len(payload) - len(old[0])
        record = self._records[key] = payload, None if ttl is None else time.time() + ttl
        self._records.move_to_end(key)
        while self._bytes > self._max_bytes or len(self._records) > self._max_records:
            oldest, (dropped, _) = self._records.popitem(last=False)
            if oldest == key:  # reads in other threads have moved all others behind it
                self._records[key] = record
            else:
                self._bytes -= len(oldest) + len(dropped)

    def _drop(self, key: str) -> None:
        record = self._records.pop(key, None)
        if record is not None:
            self._bytes -= len(key) + len(record[0])
