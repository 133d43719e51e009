"""What the tests of a store's contract have in common: how each test runs, waits and complains."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import reprlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias, TypeVar

from .stores import Store

OLD, NEW, OTHER = b'{"n": 1}', b'{"n": 2}', b'{"n": 3}'
_LATENESS = 5  # seconds after its TTL within which a record must be gone

_C = TypeVar("_C", bound="Contract")
_Test: TypeAlias = Callable[[_C, Store], Coroutine[Any, Any, None]]


def rule(test: _Test[_C]) -> Callable[[_C], None]:
    """Make a coroutine function that tests a store a test without arguments."""

    @functools.wraps(test)
    def run(self: _C) -> None:
        asyncio.run(self._run(lambda store: test(self, store)))

    del vars(run)["__wrapped__"]  # pytest would look for its arguments
    return run


class Contract:
    """A class of tests of a store, each of which runs an event loop of its own."""

    is_atomic: bool = True
    """Whether ``swap`` compares and replaces a record in one step.

    It is False for a store that reads the record and then writes it. The tests that need an atomic
    swap are then reported as skipped, and concurrent requests may undo each other's changes.
    """

    patience: float = 60
    """Seconds after which a test fails because an operation has not ended."""

    def open_store(self) -> AsyncIterator[Store]:
        """Yield a store, and then close its client: an asynchronous generator.

        A test calls this method once or twice. Both stores must contain the same records, as the
        stores of two processes do. They may be one object if that object contains the records.
        """
        raise NotImplementedError("A subclass of StoreContract must implement open_store()")

    async def advance(self, seconds: float) -> None:
        """Put the store's clock forward, if this is possible; otherwise the tests wait."""

    async def _run(self, test: Callable[[Store], Coroutine[Any, Any, None]]) -> None:
        self._contract_keys: list[str] = []
        task = asyncio.ensure_future(self._test(test))
        await asyncio.wait({task}, timeout=self.patience)
        if not task.done():
            raise AssertionError(f"An operation has not ended after {self.patience:g} seconds")
        await task

    async def _test(self, test: Callable[[Store], Coroutine[Any, Any, None]]) -> None:
        async with self._opened() as store:
            await test(store)
            for key in self._contract_keys:
                with contextlib.suppress(Exception):  # a test of delete fails if it raises
                    await store.delete(key)

    def _opened(self) -> AbstractAsyncContextManager[Store]:
        return asynccontextmanager(self.open_store)()

    def _new_key(self, end: str = "") -> str:
        key = f"CONTRACT_{uuid.uuid4().hex}{end}"
        self._contract_keys.append(key)
        return key

    async def _created(self, store: Store, payload: bytes, *ttls: int | None) -> str:
        """Create a record under a new key, once for each TTL; return the key."""
        key = self._new_key()
        for ttl in ttls or (60,):
            await store.create(key, payload, ttl)
        return key

    async def _wait_until(
        self, store: Store, key: str, expected: bytes | None, complaint: str
    ) -> None:
        """Read a record until it is the expected one, for some seconds at the most."""
        end = time.monotonic() + _LATENESS + 1
        while True:
            # This is asked before the read, since the machine may stand still after it.
            is_late = time.monotonic() > end
            record = await store.read(key)
            if record == expected:
                return
            if is_late:
                raise AssertionError(f"{complaint}; {_LATENESS} seconds later it is {show(record)}")
            await asyncio.sleep(0.02)


def expect(what: str, actual: object, expected: object) -> None:
    """Raise AssertionError unless an operation has returned the expected value, of its type."""
    __tracebackhide__ = True  # pytest shows the line of the test instead
    if not isinstance(actual, type(expected)) or actual != expected:
        raise AssertionError(f"{what}: expected {show(expected)}, not {show(actual)}")


def show(value: object) -> str:
    """Return the text of a value for a message."""
    size = f" ({len(value)} bytes)" if isinstance(value, bytes) and len(value) > 20 else ""
    return f"{reprlib.repr(value)}{size}"
