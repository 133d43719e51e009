"""The contract of a store's four verbs, for one caller at a time."""

from __future__ import annotations

import string

from ._contract import NEW, OLD, OTHER, Contract, expect, rule
from .stores import Store

_PAYLOADS = {
    "no bytes": b"",
    "a zero byte": b"\0",
    "a space": b" ",
    "line ends": b"\r\n\r\nEND\r\n",
    "an empty object": b"{}",
    "all 256 bytes": bytes(range(256)),
    "bytes that are not UTF-8": b"\xff\xfe\xed\xa0\x80",
    "100,000 bytes": bytes(range(250)) * 400,
}
# A comparison of text, of values or of a part of a record would take these for `OLD`.
_LOOKALIKES = (b"", b'{"n": 1', b'{"n": 1} ', b'{"n": 1}\0', b'{"n":1}', b'{"N": 1}', b'{"n": 1.0}')


class Verbs(Contract):
    """Reading, creating, swapping and deleting records."""

    @rule
    async def test_read_returns_none_if_there_is_no_record(self, store: Store) -> None:
        """A read of a key without a record returns None; it is no error."""
        key = self._new_key()
        expect("read of a key without a record", await store.read(key), None)
        expect("read_latest of a key without a record", await store.read_latest(key), None)

    @rule
    async def test_create_stores_a_record(self, store: Store) -> None:
        """A created record is read by the same store and by another one."""
        async with self._opened() as other:
            key = await self._created(store, OLD)
            expect("read after create", await store.read(key), OLD)
            expect("read_latest after create", await store.read_latest(key), OLD)
            expect("read by another store after create", await other.read(key), OLD)

    @rule
    async def test_create_replaces_a_record(self, store: Store) -> None:
        """If there is a record under the key, ``create`` stores the payload all the same."""
        key = await self._created(store, OLD)
        try:
            await store.create(key, NEW, 60)
        except Exception as error:
            raise AssertionError(f"create must replace a record; it raised {error!r}") from error
        expect("read after create over a record", await store.read(key), NEW)

    @rule
    async def test_keys_are_independent(self, store: Store) -> None:
        """A record belongs to one key only, even if another key resembles this key."""
        key = self._new_key("Key")
        await store.create(key, OLD, 60)
        for other in (key + "0", key[:-1], key[:-3] + "key", key[:-3] + "KEY", key[:-3] + "K_y"):
            expect("read of a key that resembles another key", await store.read(other), None)
            await store.create(other, NEW, 60)
            await store.delete(other)
        expect("read after records of other keys were deleted", await store.read(key), OLD)

    @rule
    async def test_keys_are_printable_ascii_of_up_to_250_bytes(self, store: Store) -> None:
        """A key contains any printable ASCII character except the space, and up to 250 bytes."""
        printable = string.digits + string.ascii_letters + string.punctuation
        filling = "x" * (249 - len(self._new_key(printable)))
        keys = [self._new_key(printable), self._new_key(printable + filling + "1")]
        keys.append(keys[1][:-1] + "2")
        for key in keys:
            await store.create(key, key.encode(), 60)
        for key in keys:
            what = f"a key of {len(key)} bytes"
            expect(f"read of {what}", await store.read(key), key.encode())
            expect(f"swap of {what}", await store.swap(key, key.encode(), NEW, 60), True)
            await store.delete(key)
            expect(f"read after delete of {what}", await store.read(key), None)

    @rule
    async def test_payloads_are_any_bytes(self, store: Store) -> None:
        """A payload is stored and compared as it is: binary, empty, or of 100,000 bytes."""
        for name, payload in _PAYLOADS.items():
            key = await self._created(store, payload)
            expect(f"read after create of {name}", await store.read(key), payload)
            expect(f"swap from {name}", await store.swap(key, payload, NEW, 60), True)
            expect(f"swap to {name}", await store.swap(key, NEW, payload, 60), True)
            expect(f"read after swap to {name}", await store.read(key), payload)
            result = await store.swap(key, None, NEW, 60)
            expect(f"swap with expected None over {name}", result, False)

    @rule
    async def test_swap_replaces_the_expected_record(self, store: Store) -> None:
        """A swap that expects the current record replaces it, and returns True."""
        key = await self._created(store, OLD)
        expect("swap of the expected record", await store.swap(key, OLD, NEW, 60), True)
        expect("read after swap", await store.read(key), NEW)

    @rule
    async def test_swap_of_another_record_changes_nothing(self, store: Store) -> None:
        """A swap that expects other bytes than those of the current record returns False."""
        key = await self._created(store, OLD)
        for expected in (OTHER, *_LOOKALIKES):
            what = f"swap that expects {expected!r} where {OLD!r} is stored"
            expect(what, await store.swap(key, expected, NEW, 60), False)
            expect(f"read after a {what}", await store.read(key), OLD)

    @rule
    async def test_swap_with_expected_none_stores_a_first_record(self, store: Store) -> None:
        """A swap that expects None stores the payload if there is no record."""
        key = self._new_key()
        result = await store.swap(key, None, NEW, 60)
        expect("swap with expected None and no record", result, True)
        expect("read after swap with expected None", await store.read(key), NEW)

    @rule
    async def test_swap_with_expected_none_changes_no_record(self, store: Store) -> None:
        """A swap that expects None returns False if there is a record."""
        key = await self._created(store, OLD)
        result = await store.swap(key, None, NEW, 60)
        expect("swap with expected None over a record", result, False)
        expect("read after swap with expected None over a record", await store.read(key), OLD)

    @rule
    async def test_swap_of_a_missing_record_stores_nothing(self, store: Store) -> None:
        """A swap that expects a record returns False if there is none: no write undoes a logout."""
        missing, deleted = self._new_key(), await self._created(store, OLD)
        await store.delete(deleted)
        for key, what in ((missing, "missing"), (deleted, "deleted")):
            for expected in (OLD, NEW, b"", b"{}"):
                result = await store.swap(key, expected, NEW, 60)
                expect(f"swap of a {what} record that expects {expected!r}", result, False)
                expect(f"read after swap of a {what} record", await store.read(key), None)

    @rule
    async def test_swap_by_identical_bytes_succeeds(self, store: Store) -> None:
        """A swap of a record by the same bytes returns True, as often as it is repeated."""
        key = await self._created(store, OLD)
        for _ in range(2):
            result = await store.swap(key, OLD, OLD, 60)
            expect("swap of a record by identical bytes", result, True)
            expect("read after swap by identical bytes", await store.read(key), OLD)

    @rule
    async def test_a_late_swap_changes_nothing(self, store: Store) -> None:
        """A swap that is applied once more, after it or others were applied, returns False."""
        key = await self._created(store, OLD)
        await store.swap(key, OLD, NEW, 60)
        expect("swap that is repeated", await store.swap(key, OLD, NEW, 60), False)
        await store.swap(key, NEW, OTHER, 60)
        expect("swap after two others", await store.swap(key, OLD, NEW, 60), False)
        expect("read after a late swap", await store.read(key), OTHER)
        await store.delete(key)
        expect("swap after delete", await store.swap(key, OTHER, NEW, 60), False)
        expect("read after delete and a late swap", await store.read(key), None)

    @rule
    async def test_a_write_is_seen_when_it_returns(self, store: Store) -> None:
        """A write is seen at once by ``read`` of its store, and by ``read_latest`` of any store."""
        async with self._opened() as other:
            key = await self._created(store, b"0")
            for number in range(10):
                record, new = b"%d" % number, b"%d" % (number + 1)
                writer, reader = (store, other) if number % 2 else (other, store)
                expect("read_latest after a write", await reader.read_latest(key), record)
                result = await writer.swap(key, record, new, 60)
                expect("swap of a record that another store wrote", result, True)
                expect("read after swap", await writer.read(key), new)
                result = await reader.swap(key, record, b"lost", 60)
                expect("swap of a record that another store replaced", result, False)
            await store.delete(key)
            what = "read_latest of a record that another store deleted"
            expect(what, await other.read_latest(key), None)

    @rule
    async def test_a_read_is_at_most_a_moment_behind(self, store: Store) -> None:
        """A record that a store keeps for further reads is forgotten soon after it was changed."""
        async with self._opened() as other:
            key = await self._created(store, OLD)
            expect("read by another store after create", await other.read(key), OLD)
            await store.swap(key, OLD, NEW, 60)
            complaint = "read must return what another store wrote by swap"
            await self._wait_until(other, key, NEW, complaint)
            await store.delete(key)
            complaint = "read must return None for a record that another store deleted"
            await self._wait_until(other, key, None, complaint)

    @rule
    async def test_delete_removes_a_record(self, store: Store) -> None:
        """A deleted record is gone, and its key can be used again."""
        key = await self._created(store, OLD)
        await store.delete(key)
        expect("read after delete", await store.read(key), None)
        result = await store.swap(key, None, OTHER, 60)
        expect("swap with expected None after delete", result, True)
        await store.delete(key)
        await store.create(key, NEW, 60)
        expect("read after delete and create", await store.read(key), NEW)

    @rule
    async def test_delete_of_nothing_is_no_error(self, store: Store) -> None:
        """A deletion of a record that does not exist has no effect, and raises no exception."""
        key = self._new_key()
        for _ in range(2):
            try:
                await store.delete(key)
            except Exception as error:
                raise AssertionError(
                    f"delete of a key without a record must have no effect; it raised {error!r}"
                ) from error
        expect("read after delete of a key without a record", await store.read(key), None)

    @rule
    async def test_a_store_describes_itself(self, store: Store) -> None:
        """``describe`` returns ``db.system.name``, and perhaps the server's address and port."""
        attributes = store.describe()
        for name, kind in (("db.system.name", str), ("server.address", str), ("server.port", int)):
            value = attributes.get(name)
            is_optional = name != "db.system.name" and name not in attributes
            if not (is_optional or (isinstance(value, kind) and value)):
                raise AssertionError(
                    f"describe()[{name!r}] must be a non-empty {kind.__name__}, not {value!r}"
                )

    @rule
    async def test_timeout_is_none_or_positive(self, store: Store) -> None:
        """``timeout`` is None or a positive number of seconds."""
        timeout: object = store.timeout
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
            raise AssertionError(
                f"timeout must be None or a positive number of seconds, not {timeout!r}"
            )

    @rule
    async def test_server_of_returns_the_server_of_a_key(self, store: Store) -> None:
        """``server_of`` is None, or a function that returns equal names for equal keys."""
        if store.server_of is not None:
            key = await self._created(store, OLD)
            names = {store.server_of(key) for _ in range(2)}
            expect("the number of servers of one key", len(names), 1)
