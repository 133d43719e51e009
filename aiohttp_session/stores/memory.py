"""Records in the memory of this process."""

from __future__ import annotations

import time
from collections import OrderedDict

from . import Store


class MemoryStore(Store):
    """Keep records in this process.

    :param max_records: how many are kept at the most; the least recently used goes first.
    """

    def __init__(self, *, max_records: int) -> None:
        self._max_records = max_records
        self._records: OrderedDict[str, tuple[bytes, float | None]] = OrderedDict()

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
        return self._get(key)

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        """Store a record, at the cost of the least recently used one if there are too many."""
        self._put(key, payload, ttl)

    async def update(self, key: str, payload: bytes, ttl: int | None) -> bool:
        """Replace a record; return False if there is none."""
        if self._get(key) is None:
            return False
        self._put(key, payload, ttl)
        return True

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        """Replace a record if it still is the expected one."""
        # Atomic: nothing here gives up control to another task.
        if self._get(key) != expected:
            return False
        self._put(key, payload, ttl)
        return True

    async def delete(self, key: str) -> None:
        """Delete a record, if there is one."""
        self._records.pop(key, None)

    def _get(self, key: str) -> bytes | None:
        record = self._records.get(key)
        if record is None:
            return None
        payload, expires = record
        if expires is not None and time.time() >= expires:
            del self._records[key]
            return None
        self._records.move_to_end(key)
        return payload

    def _put(self, key: str, payload: bytes, ttl: int | None) -> None:
        expires = None if ttl is None else time.time() + ttl
        self._records[key] = payload, expires
        self._records.move_to_end(key)
        if len(self._records) > self._max_records:
            self._records.popitem(last=False)
