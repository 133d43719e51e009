"""MemoryStorage: the contract, its bounds and its expiry."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from aiohttp import web

from aiohttp_session import Session, get_session
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.stores.memory import MemoryStore
from tests.conftest import Clock
from tests.contract import NAME, Browser, Memory, ServerContract


class TestMemoryStorage(Memory, ServerContract):
    pass


@pytest.mark.parametrize("name", ["max_sessions", "max_bytes"])
@pytest.mark.parametrize("number", [0, -1])
def test_it_must_have_room_for_a_session(name: str, number: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not {number}"):
        MemoryStorage(**{name: number})  # type: ignore[arg-type]


async def test_the_least_recently_used_goes_first() -> None:
    storage = MemoryStorage(max_sessions=3)
    browsers = [Browser(storage) for _ in range(5)]
    for number, browser in enumerate(browsers[:3]):
        await browser.set(n=number)
    await browsers[0].load()
    await browsers[3].set(n=3)  # at the cost of 1
    assert await browsers[1].load() == {}
    await browsers[2].set(n=2)
    await browsers[4].set(n=4)  # at the cost of 0
    assert len(storage) == 3
    assert [(await browser.load()).get("n") for browser in browsers] == [None, None, 2, 3, 4]


async def test_it_holds_one_session_if_that_is_its_bound() -> None:
    storage = MemoryStorage(max_sessions=1)
    browsers = [Browser(storage), Browser(storage)]
    for number, browser in enumerate(browsers):
        await browser.set(n=number)
        assert await browser.load() == {"n": number}
        await browser.set(m=number)
    assert len(storage) == 1
    assert await browsers[0].load() == {}


async def test_the_least_recently_used_go_first_when_there_are_too_many_bytes() -> None:
    store = MemoryStore(max_records=100, max_bytes=40)
    for key in "abcd":
        await store.create(key, b"9 bytes..", None)
    assert await store.read("a") == b"9 bytes.."
    await store.create("e", b"another 9", None)  # at the cost of b
    assert [await store.read(key) is not None for key in "abcde"] == [True, False, *[True] * 3]
    assert await store.swap("e", b"another 9", b"15 bytes by now", None)  # of c
    assert await store.swap("e", b"15 bytes by now", b"x" * 39, None)
    assert [await store.read(key) is not None for key in "abcde"] == [*[False] * 4, True]
    await store.delete("e")
    for key in "abcd":
        await store.create(key, b"9 bytes..", None)
    assert len(store) == 4


async def test_bytes_that_expired_make_room(clock: Clock) -> None:
    store = MemoryStore(max_records=100, max_bytes=40)
    await store.create("a", b"x" * 30, 10)
    clock.now += 11
    assert await store.read("a") is None
    for key in "bcde":
        await store.create(key, b"9 bytes..", None)
    assert len(store) == 4


async def test_a_record_that_is_larger_than_all_room_is_an_error() -> None:
    store = MemoryStore(max_records=100, max_bytes=40)
    await store.create("a", b"1", None)
    with pytest.raises(ValueError, match="A record of 41 bytes is more than max_bytes=40"):
        await store.create("b", b"x" * 40, None)
    with pytest.raises(ValueError, match="41 bytes"):
        await store.swap("a", b"1", b"x" * 40, None)
    with pytest.raises(ValueError, match="41 bytes"):
        await store.swap("b", None, b"x" * 40, None)
    assert (await store.read("a"), len(store)) == (b"1", 1)


# In threads


class Paused(OrderedDict[str, Any]):
    """Records that call a function before the n-th use of them."""

    uses = -1
    call: Callable[[], None]

    def _pause(self) -> None:
        self.uses -= 1
        if self.uses == -1:
            self.call()

    def get(self, key: str, default: Any = None) -> Any:
        self._pause()
        return super().get(key, default)

    def pop(self, key: str, default: Any = None) -> Any:
        self._pause()
        return super().pop(key, default)

    def popitem(self, last: bool = True) -> tuple[str, Any]:
        self._pause()
        return super().popitem(last)

    def move_to_end(self, key: str, last: bool = True) -> None:
        self._pause()
        super().move_to_end(key, last)

    def __setitem__(self, key: str, value: Any) -> None:
        self._pause()
        super().__setitem__(key, value)


class WatchedLock:
    """A lock that calls a function when it has to wait."""

    def __init__(self, on_wait: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._on_wait = on_wait

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._on_wait()
            self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


Operation = Callable[[MemoryStore], Coroutine[Any, Any, Any]]
OPERATIONS: dict[str, Operation] = {
    "read": lambda store: store.read("a"),
    "read another": lambda store: store.read("b"),
    "create": lambda store: store.create("a", b"created", None),
    "create another": lambda store: store.create("b", b"created", None),
    "add": lambda store: store.swap("b", None, b"added", None),
    "swap": lambda store: store.swap("a", b"1", b"swapped", None),
    "swap too": lambda store: store.swap("a", b"1", b"swapped too", None),
    "delete": lambda store: store.delete("a"),
}


def do(operation: Operation, store: MemoryStore) -> Any:
    coroutine = operation(store)
    with pytest.raises(StopIteration) as done:
        coroutine.send(None)
    return done.value.value


def full(is_expired: bool, others: str) -> MemoryStore:
    """Return a store without room for another record."""
    store = MemoryStore(max_records=1 + len(others))
    for key in others:
        store._records[key] = b"1", None
        store._bytes += 2
    do(lambda store: store.create("a", b"1", None), store)
    if is_expired:
        store._records["a"] = b"1", 0.0
    return store


def in_turn(store: MemoryStore, *operations: Operation) -> tuple[Any, ...]:
    """Return the results, and what is stored after."""
    results = [do(operation, store) for operation in operations]
    return results, [*store._records.items()], store._bytes


def interleaved(
    store: MemoryStore, one: Operation, other: Operation, uses: int
) -> tuple[Any, ...] | None:
    """Do one operation, and in another thread the other before the n-th use of the records.

    :return: results, and what is stored after; None if one operation has fewer uses.
    """
    results: list[Any] = [None]
    waits_or_done = threading.Event()

    def do_other() -> None:
        results.append(do(other, store))
        waits_or_done.set()

    def start_other() -> None:
        thread.start()
        waits_or_done.wait()

    thread = threading.Thread(target=do_other)
    store._records = records = Paused(store._records)
    records.uses, records.call = uses, start_other
    store._lock = WatchedLock(waits_or_done.set)  # type: ignore[assignment]
    results[0] = do(one, store)
    if thread.ident is None:
        return None
    thread.join()
    return results, [*store._records.items()], store._bytes


@pytest.mark.parametrize(("is_expired", "others"), [(False, ""), (False, "c"), (True, "")])
@pytest.mark.parametrize("other", OPERATIONS)
@pytest.mark.parametrize("one", OPERATIONS)
def test_operations_of_two_threads_are_one_after_the_other(
    one: str, other: str, is_expired: bool, others: str
) -> None:
    first, second = OPERATIONS[one], OPERATIONS[other]
    results, *after = in_turn(full(is_expired, others), second, first)
    possible = [in_turn(full(is_expired, others), first, second), (results[::-1], *after)]
    for uses in itertools.count():
        result = interleaved(full(is_expired, others), first, second, uses)
        if result is None:
            break
        assert result in possible
    assert uses


async def test_a_record_expires_ttl_seconds_after_its_last_write(clock: Clock) -> None:
    storage = MemoryStorage()
    await storage.store.create("key", b"1", 10)
    clock.now += 9.9
    assert await storage.store.read("key") == b"1"
    assert await storage.store.swap("key", b"1", b"2", 10)
    clock.now += 9.9
    assert await storage.store.read("key") == b"2"
    clock.now += 0.1
    assert len(storage) == 1
    assert await storage.store.read("key") is None
    assert len(storage) == 0
    assert not await storage.store.swap("key", b"2", b"3", 10)
    assert await storage.store.read("key") is None
    assert await storage.store.swap("key", None, b"3", 10)
    assert await storage.store.read("key") == b"3"


async def test_a_record_without_a_ttl_stays(clock: Clock) -> None:
    storage = MemoryStorage()
    await storage.store.create("key", b"1", None)
    clock.now += 1e9
    assert await storage.store.read("key") == b"1"


async def test_a_record_is_swapped_only_for_the_expected_one(clock: Clock) -> None:
    storage = MemoryStorage()
    await storage.store.create("key", b"1", 10)
    assert not await storage.store.swap("key", b"0", b"2", 10)
    assert await storage.store.read("key") == b"1"
    assert await storage.store.swap("key", b"1", b"2", 10)
    assert await storage.store.read("key") == b"2"
    clock.now += 11
    assert not await storage.store.swap("key", b"2", b"3", 10)
    assert not await storage.store.swap("other", b"2", b"3", 10)
    assert await storage.store.swap("key", None, b"3", 10)
    assert not await storage.store.swap("key", None, b"4", 10)
    assert await storage.store.read("key") == b"3"


async def test_a_deleted_record_is_gone() -> None:
    storage = MemoryStorage()
    await storage.store.create("key", b"1", None)
    await storage.store.delete("key")
    await storage.store.delete("key")
    assert await storage.store.read("key") is None
    assert len(storage) == 0


async def test_a_storage_is_true_even_when_it_is_empty() -> None:
    assert MemoryStorage()
    assert MemoryStore()


async def test_what_is_stored_is_a_copy() -> None:
    items = [1]
    browser = Browser(MemoryStorage())
    await browser.set(items=items)
    items.append(2)
    (await browser.load())["items"].append(3)
    assert await browser.load() == {"items": [1]}


async def test_a_session_that_is_deleted_while_it_gets_a_new_id_stays_deleted() -> None:
    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        session.regenerate_id()
        session["b"] = 2
        await storage.store.delete(f"{NAME}_{session.identity}")
        return web.Response()

    storage = MemoryStorage(on_conflict="merge")
    browser = Browser(storage)
    await browser.set(a=1)
    await browser.visit(handler)
    assert len(storage) == 0
    assert await browser.load() == {}


@pytest.mark.parametrize(
    ("here", "there", "kept"), [(7, 5, 7), (None, 5, 5), (7, None, 7), (None, None, 100)]
)
async def test_a_merge_keeps_the_max_age_that_was_set_last(
    here: int | None, there: int | None, kept: int
) -> None:
    def put(session: Session, key: str, max_age: int | None) -> None:
        session[key] = 1
        if max_age is not None:
            session.max_age = max_age

    async def handler(request: web.Request) -> web.Response:
        put(await get_session(request), "here", here)
        await Browser(storage, browser.cookie).do(lambda session: put(session, "there", there))
        return web.Response()

    storage = MemoryStorage(on_conflict="merge", max_age=100)
    browser = Browser(storage)
    await browser.set(a=1)
    await browser.visit(handler)
    session = await browser.load()
    assert session == {"a": 1, "here": 1, "there": 1}
    assert session.max_age == kept
