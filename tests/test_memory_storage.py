"""MemoryStorage: the contract, its bounds and its expiry."""

from __future__ import annotations

import pytest
from aiohttp import web

from aiohttp_session import Session, get_session
from aiohttp_session.memory_storage import MemoryStorage
from tests.conftest import Clock
from tests.contract import NAME, Browser, Memory, ServerContract


class TestMemoryStorage(Memory, ServerContract):
    pass


@pytest.mark.parametrize("number", [0, -1])
def test_it_must_have_room_for_a_session(number: int) -> None:
    with pytest.raises(ValueError, match=f"max_sessions must be at least 1, not {number}"):
        MemoryStorage(max_sessions=number)


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


async def test_a_record_expires_ttl_seconds_after_its_last_write(clock: Clock) -> None:
    storage = MemoryStorage()
    await storage.store.create("key", b"1", 10)
    clock.now += 9.9
    assert await storage.store.read("key") == b"1"
    assert await storage.store.update("key", b"2", 10)
    clock.now += 9.9
    assert await storage.store.read("key") == b"2"
    clock.now += 0.1
    assert len(storage) == 1
    assert await storage.store.read("key") is None
    assert len(storage) == 0
    assert not await storage.store.update("key", b"3", 10)
    assert await storage.store.read("key") is None


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


async def test_a_deleted_record_is_gone() -> None:
    storage = MemoryStorage()
    await storage.store.create("key", b"1", None)
    await storage.store.delete("key")
    await storage.store.delete("key")
    assert await storage.store.read("key") is None
    assert len(storage) == 0


async def test_a_storage_is_true_even_when_it_is_empty() -> None:
    assert MemoryStorage()


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
