"""The contract of a store that many callers use at the same time."""

from __future__ import annotations

import asyncio
import unittest
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

from ._contract import NEW, OLD, OTHER, Contract, expect, rule, show
from .stores import Store

_Call: TypeAlias = Callable[[], Awaitable[Any]]


class Concurrency(Contract):
    """Atomicity, cancellation, and the end of a store's use."""

    @rule
    async def test_one_of_many_concurrent_swaps_succeeds(self, store: Store) -> None:
        """Of concurrent swaps from one record exactly one returns True, and its payload stays."""
        self._require_atomicity()
        payloads = [b"payload %d" % number for number in range(16)]
        async with self._opened() as other:
            for expected in (OLD, None) * 3:
                key = self._new_key()
                if expected is not None:
                    await store.create(key, expected, 60)
                swaps = [
                    (store, other)[number % 2].swap(key, expected, payload, 60)
                    for number, payload in enumerate(payloads)
                ]
                results = await asyncio.gather(*swaps)
                what = f"the number of concurrent swaps from {show(expected)} that return True"
                expect(what, results.count(True), 1)
                winner = payloads[results.index(True)]
                expect("read after concurrent swaps", await store.read_latest(key), winner)

    @rule
    async def test_no_change_is_lost(self, store: Store) -> None:
        """A number is incremented as often as callers that read and swap it succeed."""
        self._require_atomicity()
        key = await self._created(store, b"0")

        async def increment(store: Store, times: int) -> None:
            for _ in range(1000):
                number = int(await store.read_latest(key) or b"0")
                times -= await store.swap(key, b"%d" % number, b"%d" % (number + 1), 60)
                if not times:
                    return
                await asyncio.sleep(0)
            raise AssertionError("swap of the current record: expected True, not 1,000 times False")

        async with self._opened() as other:
            await asyncio.gather(*(increment(each, 5) for each in (store, other) * 4))
        expect("read after 40 increments by swap", await store.read_latest(key), b"40")

    @rule
    async def test_a_swap_beside_a_deletion_restores_nothing(self, store: Store) -> None:
        """If a record is swapped and deleted at the same time, it is deleted in the end."""
        self._require_atomicity()
        async with self._opened() as other:
            keys = [await self._created(store, OLD) for _ in range(20)]
            swaps = [store.swap(key, OLD, NEW, 60) for key in keys]
            await asyncio.gather(*swaps, *map(other.delete, keys))
            for key in keys:
                expect("read after swap beside delete", await store.read_latest(key), None)

    @rule
    async def test_readers_see_whole_records(self, store: Store) -> None:
        """A read beside swaps returns a whole record, never a part of one, and never None."""
        records = [bytes([letter]) * 100_000 for letter in b"abcd"]
        key = await self._created(store, records[0])
        writers = 2

        async def write(store: Store) -> None:
            nonlocal writers
            for record in records * 2:
                await store.swap(key, await store.read_latest(key), record, 60)
                await asyncio.sleep(0)
            writers -= 1

        async def read(store: Store) -> None:
            number = 0
            while writers:
                record = await store.read(key)
                if record not in records:
                    raise AssertionError(
                        f"read beside swaps: expected a whole record, not {show(record)}"
                    )
                number += 1
                if number % 2:  # in all steps of a swap, also of one that takes two turns
                    await asyncio.sleep(0)

        async with self._opened() as other:
            await asyncio.gather(write(store), read(store), write(other), read(other))

    @rule
    async def test_many_tasks_may_use_a_store(self, store: Store) -> None:
        """Concurrent operations on different keys do not disturb each other."""

        async def use(key: str) -> None:
            payload = key.encode()
            await store.create(key, payload, 60)
            expect("read beside other tasks", await store.read(key), payload)
            expect("swap beside other tasks", await store.swap(key, payload, NEW, 60), True)
            result = await store.swap(key, payload, OTHER, 60)
            expect("swap of a replaced record beside other tasks", result, False)
            expect("read after swap beside other tasks", await store.read(key), NEW)
            await store.delete(key)
            expect("read after delete beside other tasks", await store.read(key), None)

        await asyncio.gather(*(use(self._new_key()) for _ in range(100)))

    @rule
    async def test_a_cancelled_caller_disturbs_no_other(self, store: Store) -> None:
        """If some callers are cancelled, the other operations and all later ones succeed."""
        for turns in range(6):
            read, *keys = [self._new_key() for _ in range(9)]
            swapped, created, deleted = keys[:4], keys[4:6], keys[6:]
            for key in (read, *swapped, *deleted):
                await store.create(key, key.encode(), 60)
            # Several reads of one key, since a store may serve all of them by one.
            calls: list[_Call] = [partial(store.read, read)] * 4
            calls += [partial(store.swap, key, key.encode(), NEW, 60) for key in swapped]
            calls += [partial(store.create, key, key.encode(), 60) for key in created]
            calls += [partial(store.delete, key) for key in deleted]
            expected = [read.encode()] * 4 + [True] * 4 + [None] * 4
            await self._cancel_half(calls, expected, turns)
            what = "after other callers were cancelled"
            expect(f"read {what}", await store.read(read), read.encode())
            for key in swapped[1::2]:
                expect(f"read after swap {what}", await store.read(key), NEW)
            expect(f"read after create {what}", await store.read(created[1]), created[1].encode())
            expect(f"read after delete {what}", await store.read(deleted[1]), None)
            for key in keys:
                if (record := await store.read(key)) not in (None, key.encode(), NEW):
                    raise AssertionError(f"read {what}: expected a record, not {show(record)}")

    @rule
    async def test_a_store_may_be_used_after_finish(self, store: Store) -> None:
        """``finish`` may be called at any time and repeatedly; the next operation succeeds."""
        await store.finish()
        key = await self._created(store, OLD)
        await store.finish()
        await store.finish()
        expect("read after finish", await store.read(key), OLD)
        expect("swap after finish", await store.swap(key, OLD, NEW, 60), True)
        await store.finish()
        await store.delete(key)
        expect("read after finish and delete", await store.read(key), None)

    @rule
    async def test_finish_interrupts_no_operation(self, store: Store) -> None:
        """The operations that are in progress when ``finish`` is called succeed."""
        key, created, added = await self._created(store, OLD), self._new_key(), self._new_key()
        calls: list[_Call] = [
            partial(store.read, key),
            partial(store.create, created, OLD, 60),
            partial(store.swap, added, None, OLD, 60),
        ]
        tasks = [asyncio.ensure_future(_call(call)) for call in calls]
        await asyncio.sleep(0)
        await store.finish()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        verbs = ("read", OLD), ("create", None), ("swap", True)
        for (verb, right), result in zip(verbs, results, strict=True):
            expect(f"{verb} in progress at finish", result, right)
        for key in (created, added):
            expect("read after a write in progress at finish", await store.read(key), OLD)

    def _require_atomicity(self) -> None:
        if not self.is_atomic:
            raise unittest.SkipTest("is_atomic is False: swap reads a record, and then writes it")

    async def _cancel_half(self, calls: list[_Call], expected: list[Any], turns: int) -> None:
        """Cancel every other call after some turns of the event loop, and wait for all calls."""
        tasks = [asyncio.ensure_future(_call(call)) for call in calls]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for number, (result, right) in enumerate(zip(results, expected, strict=True)):
            if number % 2:
                expect("an operation beside cancelled ones", result, right)
            elif not isinstance(result, asyncio.CancelledError):
                expect("an operation that ended before it was cancelled", result, right)


async def _call(call: _Call) -> Any:
    return await call()
