"""The contract of a store's TTLs."""

from __future__ import annotations

import asyncio
import unittest

from ._contract import NEW, OLD, OTHER, Contract, expect, rule
from .stores import Store

_DAY = 24 * 60 * 60


class Expiry(Contract):
    """How long records live; each wait is one of a second, or none if the clock can be moved."""

    @rule
    async def test_a_record_expires_after_its_ttl(self, store: Store) -> None:
        """A write sets the TTL of its record; a swap that returns False leaves the TTL alone."""
        refused = await self._created(store, OLD, 1)
        await store.swap(refused, OTHER, NEW, None)
        added = self._new_key()
        await store.swap(added, None, NEW, 1)
        keys = {
            "create": await self._created(store, OLD, 1),
            "create over a record without a TTL": await self._created(store, OLD, None, 1),
            "swap of a record without a TTL": await self._swapped(store, None, NEW, 1),
            "swap of a record with a longer TTL": await self._swapped(store, 60, NEW, 1),
            "swap by identical bytes": await self._swapped(store, None, OLD, 1),
            "swap with expected None": added,
            "create, before a swap that returned False,": refused,
        }
        await self.advance(2)
        for write, key in keys.items():
            await self._wait_for_expiry(store, key, f"the record that {write} stored")

    @rule
    async def test_a_record_lives_until_its_ttl(self, store: Store) -> None:
        """A write with a longer TTL extends the life of a record, and one without removes it."""
        keys = {
            "create with a TTL of 60 seconds": await self._created(store, OLD, 60),
            "create without a TTL": await self._created(store, OLD, None),
            "create over a record of 1 second": await self._created(store, OLD, 1, 60),
            "swap of a record of 1 second": await self._swapped(store, 1, OTHER, 60),
            "swap without a TTL": await self._swapped(store, 1, OTHER, None),
            "swap by identical bytes": await self._swapped(store, 1, OLD, 60),
            "swap by identical bytes without a TTL": await self._swapped(store, 1, OLD, None),
        }
        records = await asyncio.gather(*map(store.read, keys.values()))
        await self._let_a_record_expire(store)
        for (write, key), record in zip(keys.items(), records, strict=True):
            expect(f"read a second after {write}", await store.read(key), record)

    @rule
    async def test_an_expired_record_is_no_record(self, store: Store) -> None:
        """An expired record matches no swap except one that expects None."""
        key = await self._created(store, OLD, 1)
        await self._let_a_record_expire(store)
        result = await store.swap(key, OLD, NEW, 60)
        expect("swap that expects a record that has expired", result, False)
        expect("read after swap of an expired record", await store.read(key), None)
        result = await store.swap(key, None, NEW, 60)
        expect("swap with expected None over an expired record", result, True)
        expect("read after swap with expected None", await store.read(key), NEW)

    @rule
    async def test_a_ttl_may_be_longer_than_30_days(self, store: Store) -> None:
        """A TTL of any number of seconds is a duration, never a time of the calendar."""
        for days in (30, 400, 3650):
            ttl = days * _DAY + 1
            key = await self._created(store, OLD, ttl)
            what = f"with a TTL of {days} days and 1 second"
            expect(f"read after create {what}", await store.read(key), OLD)
            expect(f"swap {what}", await store.swap(key, OLD, NEW, ttl), True)
            expect(f"read after swap {what}", await store.read(key), NEW)

    @rule
    async def test_a_ttl_is_exact(self, store: Store) -> None:
        """A record lives for its TTL and no longer, whether for 2 seconds or for 400 days."""
        if type(self).advance is Contract.advance:
            raise unittest.SkipTest("advance() is not implemented, and the test would take a year")
        for ttl in (2, 60, 30 * _DAY, 30 * _DAY + 1, 400 * _DAY):
            keys = [await self._created(store, OLD, ttl), await self._swapped(store, 60, OLD, ttl)]
            await self.advance(0.9 * ttl - 1)
            for key in keys:
                expect(f"read before the end of a TTL of {ttl} s", await store.read(key), OLD)
            await self.advance(0.1 * ttl + 2)
            for key in keys:
                await self._wait_for_expiry(store, key, f"a record with a TTL of {ttl} seconds")

    async def _swapped(self, store: Store, old: int | None, payload: bytes, new: int | None) -> str:
        """Create a record with one TTL, swap it with another one, and return its key."""
        key = await self._created(store, OLD, old)
        expect("swap of the expected record", await store.swap(key, OLD, payload, new), True)
        return key

    async def _let_a_record_expire(self, store: Store) -> None:
        """Wait until the records have expired that were given a TTL of one second before."""
        witness = await self._created(store, OLD, 1)
        await self.advance(2)
        await self._wait_for_expiry(store, witness, "a record with a TTL of 1 second")

    async def _wait_for_expiry(self, store: Store, key: str, record: str) -> None:
        await self._wait_until(store, key, None, f"read must return None for {record}")
