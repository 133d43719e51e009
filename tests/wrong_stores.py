"""Stores that break the contract in one way each, beside one that keeps it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

from aiohttp_session import Store

Records: TypeAlias = "dict[str, tuple[bytes, float | None]]"


class RightStore(Store):
    """A store in a dict, without a mistake; each of the following classes makes one."""

    def __init__(self, records: Records) -> None:
        self.records = records

    def find(self, key: str) -> bytes | None:
        payload, end = self.records.get(key, (None, None))
        return payload if end is None or time.time() < end else None

    def put(self, key: str, payload: bytes, ttl: int | None) -> None:
        self.records[key] = payload, None if ttl is None else time.time() + ttl

    async def read(self, key: str) -> bytes | None:
        await asyncio.sleep(0)
        return self.find(key)

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        await asyncio.sleep(0)
        self.put(key, payload, ttl)

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        await asyncio.sleep(0)
        if not self.matches(key, expected):
            return False
        self.put(key, payload, ttl)
        return True

    def matches(self, key: str, expected: bytes | None) -> bool:
        return self.find(key) == expected

    async def delete(self, key: str) -> None:
        await asyncio.sleep(0)
        self.records.pop(key, None)


class ReadRaises(RightStore):
    async def read(self, key: str) -> bytes | None:
        return self.records[key][0]


class ReadReturnsNothing(RightStore):
    async def read(self, key: str) -> bytes | None:
        return self.find(key) or b""


class ReadLatestIsAbsent(RightStore):
    async def read_latest(self, key: str) -> bytes | None:
        raise NotImplementedError("a replica")


class ReadReturnsAnotherType(RightStore):
    async def read(self, key: str) -> Any:
        payload = self.find(key)
        return None if payload is None else bytearray(payload)


class ReadIsLocal(RightStore):
    def __init__(self, records: Records) -> None:
        super().__init__({})


class CreateRefuses(RightStore):
    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        if self.find(key) is not None:
            raise LookupError("UNIQUE constraint failed")
        self.put(key, payload, ttl)


class CreateKeeps(RightStore):
    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        if self.find(key) is None:
            self.put(key, payload, ttl)


class KeysHaveNoCase(RightStore):
    def find(self, key: str) -> bytes | None:
        return super().find(key.lower())

    def put(self, key: str, payload: bytes, ttl: int | None) -> None:
        super().put(key.lower(), payload, ttl)


class KeysArePatterns(RightStore):
    async def delete(self, key: str) -> None:
        for other in list(self.records):
            if re.fullmatch(re.escape(key).replace("_", "."), other):
                del self.records[other]


class KeysAreShort(RightStore):
    def find(self, key: str) -> bytes | None:
        return super().find(key[:200])

    def put(self, key: str, payload: bytes, ttl: int | None) -> None:
        super().put(key[:200], payload, ttl)


class PayloadsAreText(RightStore):
    def put(self, key: str, payload: bytes, ttl: int | None) -> None:
        super().put(key, payload.decode("utf-8", "replace").encode(), ttl)


class PayloadsAreStripped(RightStore):
    def put(self, key: str, payload: bytes, ttl: int | None) -> None:
        super().put(key, payload.rstrip(b"\0"), ttl)


class PayloadsAreShort(RightStore):
    def put(self, key: str, payload: bytes, ttl: int | None) -> None:
        super().put(key, payload[: 2**16 - 1], ttl)


class SwapNeverMatches(RightStore):
    def matches(self, key: str, expected: bytes | None) -> bool:
        return False


class SwapIgnoresExpected(RightStore):
    def matches(self, key: str, expected: bytes | None) -> bool:
        return self.find(key) is not None


class SwapComparesValues(RightStore):
    def matches(self, key: str, expected: bytes | None) -> bool:
        found = self.find(key)
        try:
            return bool(json.loads(found or b"null") == json.loads(expected or b"null"))
        except ValueError:
            return found == expected


class SwapComparesStarts(RightStore):
    def matches(self, key: str, expected: bytes | None) -> bool:
        found = self.find(key)
        if found is None or expected is None:
            return found is expected
        return found.startswith(expected)


class SwapOfNoneReplaces(RightStore):
    def matches(self, key: str, expected: bytes | None) -> bool:
        return expected is None or super().matches(key, expected)


class SwapOfNoneRefuses(RightStore):
    def matches(self, key: str, expected: bytes | None) -> bool:
        return expected is not None and super().matches(key, expected)


class SwapOfMissingStores(RightStore):
    def matches(self, key: str, expected: bytes | None) -> bool:
        return self.find(key) in (None, expected)


class SwapOfMissingMatchesNothing(RightStore):
    def matches(self, key: str, expected: bytes | None) -> bool:
        return self.find(key) == (expected or None)


class SwapCountsChanges(RightStore):
    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        return await super().swap(key, expected, payload, ttl) and expected != payload


class SwapReturnsANumber(RightStore):
    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> Any:
        return int(await super().swap(key, expected, payload, ttl))


class SwapIsIdempotent(RightStore):
    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        return await super().swap(key, expected, payload, ttl) or self.find(key) == payload


class SwapIsNotAtomic(RightStore):
    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        if await self.read(key) != expected:
            return False
        await self.create(key, payload, ttl)
        return True


class SwapDeletesFirst(RightStore):
    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        if not self.matches(key, expected):
            return False
        await self.delete(key)
        await self.create(key, payload, ttl)
        return True


class SwapWritesInPieces(RightStore):
    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        if not self.matches(key, expected):
            return False
        self.put(key, payload[:4096], ttl)
        await asyncio.sleep(0)
        self.put(key, payload, ttl)
        return True


class SwapIsCutShort(RightStore):
    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        if not self.matches(key, expected):
            return False
        self.put(key, payload[:3], ttl)
        await asyncio.sleep(0)
        self.put(key, payload, ttl)
        return True


class SwapComesLater(RightStore):
    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        if self.matches(key, expected):
            asyncio.get_running_loop().call_later(0.001, self.put, key, payload, ttl)
            return True
        return False


class DeleteRaises(RightStore):
    async def delete(self, key: str) -> None:
        del self.records[key]


class DeleteForgets(RightStore):
    async def delete(self, key: str) -> None:
        pass


class DeleteIsForEver(RightStore):
    deleted: ClassVar[set[str]] = set()

    async def delete(self, key: str) -> None:
        self.deleted.add(key)
        await super().delete(key)

    def matches(self, key: str, expected: bytes | None) -> bool:
        return key not in self.deleted and super().matches(key, expected)


class CacheIsStale(RightStore):
    """Keeps what was read, for its own reads only; its own writes are read anew."""

    def __init__(self, records: Records) -> None:
        super().__init__(records)
        self.kept: dict[str, bytes | None] = {}

    async def read(self, key: str) -> bytes | None:
        if key not in self.kept:
            self.kept[key] = await super().read(key)
        return self.kept[key]

    async def read_latest(self, key: str) -> bytes | None:
        return await super().read(key)

    def put(self, key: str, payload: bytes, ttl: int | None) -> None:
        self.kept.pop(key, None)
        super().put(key, payload, ttl)

    async def delete(self, key: str) -> None:
        self.kept.pop(key, None)
        await super().delete(key)


class ReadLatestIsStale(CacheIsStale):
    async def read_latest(self, key: str) -> bytes | None:
        return await self.read(key)


class TtlIsIgnored(RightStore):
    def put(self, key: str, payload: bytes, ttl: int | None) -> None:
        super().put(key, payload, None)


class TtlIsOfTheFirstWrite(RightStore):
    def put(self, key: str, payload: bytes, ttl: int | None) -> None:
        end = self.records[key][1] if self.find(key) is not None else None
        super().put(key, payload, ttl)
        if end is not None:
            self.records[key] = payload, end


class TtlIsSetByARefusedSwap(RightStore):
    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        if await super().swap(key, expected, payload, ttl):
            return True
        if (found := self.find(key)) is not None:
            self.put(key, found, ttl)
        return False


class TtlIsADate(RightStore):
    def put(self, key: str, payload: bytes, ttl: int | None) -> None:
        super().put(key, payload, ttl)
        if ttl is not None and ttl > 30 * 86400:
            self.records[key] = payload, ttl


class TtlIsShort(RightStore):
    def put(self, key: str, payload: bytes, ttl: int | None) -> None:
        super().put(key, payload, None if ttl is None else min(ttl, 300 * 86400))


class TtlIsLong(RightStore):
    def put(self, key: str, payload: bytes, ttl: int | None) -> None:
        super().put(key, payload, None if ttl is None or ttl > 30 * 86400 else ttl)


class ExpiredMatches(RightStore):
    def matches(self, key: str, expected: bytes | None) -> bool:
        return self.records.get(key, (None,))[0] == expected


class OperationsMeet(RightStore):
    """Keeps the key of the operation in progress where another operation replaces it."""

    key = ""

    async def read(self, key: str) -> bytes | None:
        self.key = key
        await asyncio.sleep(0)
        return self.find(self.key)


class CallersShareTheirEnd(RightStore):
    """Shares reads of one key in progress, and the cancellation of one of the callers."""

    def __init__(self, records: Records) -> None:
        super().__init__(records)
        self.reads: dict[str, asyncio.Task[bytes | None]] = {}

    async def read(self, key: str) -> bytes | None:
        if key not in self.reads:
            self.reads[key] = asyncio.ensure_future(super().read(key))
            self.reads[key].add_done_callback(lambda _: self.reads.pop(key))
        return await self.reads[key]


class CancellationHolds(RightStore):
    """Holds its lock for ever if the caller is cancelled."""

    def __init__(self, records: Records) -> None:
        super().__init__(records)
        self.lock = asyncio.Lock()

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        await self.lock.acquire()
        result = await super().swap(key, expected, payload, ttl)
        self.lock.release()
        return result


class CancellationIsHidden(RightStore):
    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        try:
            return await super().swap(key, expected, payload, ttl)
        except asyncio.CancelledError:
            return False


class FinishIsTheEnd(RightStore):
    is_finished = False

    async def finish(self) -> None:
        self.is_finished = True

    def find(self, key: str) -> bytes | None:
        if self.is_finished:
            raise RuntimeError("Event loop is closed")
        return super().find(key)


class FinishCancels(RightStore):
    def __init__(self, records: Records) -> None:
        super().__init__(records)
        self.reads: set[asyncio.Task[bytes | None]] = set()

    async def read(self, key: str) -> bytes | None:
        task = asyncio.ensure_future(super().read(key))
        self.reads.add(task)
        return await task

    async def finish(self) -> None:
        for task in self.reads:
            task.cancel()


class SystemIsUnknown(RightStore):
    def describe(self) -> Mapping[str, str | int]:
        return {"server.address": "host"}


class PortIsText(RightStore):
    def describe(self) -> Mapping[str, str | int]:
        return {"db.system.name": "right", "server.port": "6379"}


class TimeoutIsZero(RightStore):
    timeout = 0


class ServersChange(RightStore):
    server_of = staticmethod(lambda key: object())


WRONG: list[tuple[type[RightStore], str, str]] = [
    # A store, a test that it fails, and what the test says
    (ReadRaises, "read_returns_none_if_there_is_no_record", "'CONTRACT_"),
    (
        ReadReturnsNothing,
        "read_returns_none_if_there_is_no_record",
        "read of a key without a record: expected None, not b''",
    ),
    (ReadLatestIsAbsent, "read_returns_none_if_there_is_no_record", "a replica"),
    (ReadReturnsAnotherType, "create_stores_a_record", "not bytearray"),
    (ReadIsLocal, "create_stores_a_record", "by another store after create: expected b'{"),
    (CreateRefuses, "create_replaces_a_record", "must replace a record; it raised LookupError"),
    (CreateKeeps, "create_replaces_a_record", "read after create over a record: expected"),
    (KeysHaveNoCase, "keys_are_independent", "resembles another key: expected None"),
    (KeysArePatterns, "keys_are_independent", "read after records of other keys were deleted"),
    (KeysAreShort, "keys_are_printable_ascii_of_up_to_250_bytes", "a key of 250 bytes"),
    (PayloadsAreText, "payloads_are_any_bytes", "read after create of all 256 bytes"),
    (PayloadsAreStripped, "payloads_are_any_bytes", "read after create of a zero byte"),
    (PayloadsAreShort, "payloads_are_any_bytes", r"100,000 bytes: .*\(100000 bytes\), not"),
    (SwapNeverMatches, "swap_replaces_the_expected_record", "expected True, not False"),
    (SwapNeverMatches, "no_change_is_lost", "not 1,000 times False"),
    (SwapReturnsANumber, "swap_replaces_the_expected_record", "expected True, not 1"),
    (SwapComesLater, "swap_replaces_the_expected_record", "read after swap: expected"),
    (SwapIgnoresExpected, "swap_of_another_record_changes_nothing", "expected False, not True"),
    (SwapComparesValues, "swap_of_another_record_changes_nothing", "expected False, not True"),
    (SwapComparesStarts, "swap_of_another_record_changes_nothing", "expected False, not True"),
    (SwapOfNoneReplaces, "swap_with_expected_none_changes_no_record", "expected False"),
    (SwapOfNoneRefuses, "swap_with_expected_none_stores_a_first_record", "expected True"),
    (SwapOfMissingStores, "swap_of_a_missing_record_stores_nothing", "a missing record that"),
    (SwapOfMissingMatchesNothing, "swap_of_a_missing_record_stores_nothing", "expects b''"),
    (SwapCountsChanges, "swap_by_identical_bytes_succeeds", "identical bytes: expected True"),
    (SwapIsIdempotent, "a_late_swap_changes_nothing", "repeated: expected False, not True"),
    (SwapIsNotAtomic, "one_of_many_concurrent_swaps_succeeds", "True: expected 1, not 16"),
    (SwapIsNotAtomic, "no_change_is_lost", "read after 40 increments by swap: expected b'40'"),
    (SwapIsNotAtomic, "a_swap_beside_a_deletion_restores_nothing", "expected None"),
    (SwapDeletesFirst, "readers_see_whole_records", "expected a whole record, not None"),
    (SwapWritesInPieces, "readers_see_whole_records", r"a whole record, not .* \(4096 bytes\)"),
    (DeleteRaises, "delete_of_nothing_is_no_error", "must have no effect; it raised KeyError"),
    (DeleteForgets, "delete_removes_a_record", "read after delete: expected None"),
    (DeleteIsForEver, "delete_removes_a_record", "None after delete: expected True"),
    (ReadLatestIsStale, "a_write_is_seen_when_it_returns", "another store deleted: expected None"),
    (CacheIsStale, "a_read_is_at_most_a_moment_behind", "what another store wrote by swap; -1 s"),
    (TtlIsIgnored, "a_record_expires_after_its_ttl", "for the record that create stored; "),
    (TtlIsOfTheFirstWrite, "a_record_expires_after_its_ttl", "swap of a record with a longer TTL"),
    (TtlIsOfTheFirstWrite, "a_record_lives_until_its_ttl", "over a record of 1 second: expected"),
    (TtlIsSetByARefusedSwap, "a_record_expires_after_its_ttl", "before a swap that returned False"),
    (TtlIsADate, "a_ttl_may_be_longer_than_30_days", "30 days and 1 second: expected b'{"),
    (TtlIsShort, "a_ttl_is_exact", "before the end of a TTL of 34560000 s"),
    (TtlIsLong, "a_ttl_is_exact", "a record with a TTL of 2592001 seconds; "),
    (ExpiredMatches, "an_expired_record_is_no_record", "that has expired: expected False"),
    (OperationsMeet, "many_tasks_may_use_a_store", "read beside other tasks: expected"),
    (CallersShareTheirEnd, "a_cancelled_caller_disturbs_no_other", "beside cancelled ones"),
    (SwapIsCutShort, "a_cancelled_caller_disturbs_no_other", "expected a record, not b'{\"n'"),
    (CancellationHolds, "a_cancelled_caller_disturbs_no_other", "has not ended after 0.5 seconds"),
    (CancellationIsHidden, "a_cancelled_caller_disturbs_no_other", "before it was cancelled"),
    (FinishIsTheEnd, "a_store_may_be_used_after_finish", "Event loop is closed"),
    (FinishCancels, "finish_interrupts_no_operation", "read in progress .*, not CancelledError"),
    (SystemIsUnknown, "a_store_describes_itself", "'db.system.name'.* non-empty str, not None"),
    (PortIsText, "a_store_describes_itself", "'server.port'.* must be a non-empty int, not '6379'"),
    (TimeoutIsZero, "timeout_is_none_or_positive", "must be None or a positive number .*, not 0"),
    (ServersChange, "server_of_returns_the_server_of_a_key", "one key: expected 1, not 2"),
]
