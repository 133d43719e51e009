"""Reads of one key that begin in one tick are one read; a read never joins an older one."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import pytest
from redis.asyncio import Redis

from aiohttp_session import StoreUnavailableError
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.server_storage import ServerStorage
from aiohttp_session.stores import Store
from aiohttp_session.stores.memory import MemoryStore
from aiohttp_session.stores.near_cache import NearCache
from aiohttp_session.stores.outage import CircuitBreaker
from aiohttp_session.stores.shared_reads import SharedReads
from benchmarks.servers import HOST, Server
from tests.contract import NAME, Browser, make_request
from tests.test_near_cache import Tracker
from tests.waiting import turns, until


class Held(MemoryStore):
    """A store whose reads are answered when a test says so."""

    reads_locally = False

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[asyncio.Future[bytes | None]] = []
        self.keys: list[str] = []
        self.readers: list[Any] = []  # tasks

    def read(self, key: str) -> asyncio.Future[bytes | None]:  # type: ignore[override]
        self.keys.append(key.removeprefix(f"{NAME}_"))
        self.readers.append(asyncio.current_task())
        self.reads.append(asyncio.get_running_loop().create_future())
        return self.reads[-1]


@pytest.fixture
async def store() -> Held:
    return Held()


class Reads(Protocol):
    """What shares reads."""

    async def read(self, key: str) -> bytes | None: ...


class Loads:
    """Reads the records of sessions by loading the sessions, which takes a way of its own."""

    def __init__(self, store: Store) -> None:
        self._storage = ServerStorage(store)

    async def read(self, key: str) -> bytes | None:
        session = await self._storage.load_session(make_request(f"{NAME}={key}"))
        return session._record


WAYS: dict[str, Callable[[Store], Reads]] = {
    "SharedReads": lambda store: SharedReads(lambda: store),
    "load_session": Loads,
}
each_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(params=WAYS)
async def reads(request: pytest.FixtureRequest, store: Held) -> Reads:
    return WAYS[request.param](store)


@pytest.fixture(autouse=True)
async def complaints() -> AsyncIterator[None]:
    """No exception may be left that nobody has seen."""
    seen: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context))
    yield
    gc.collect()
    assert seen == []


def begin(reads: Reads, *keys: str) -> list[asyncio.Task[bytes | None]]:
    return [asyncio.ensure_future(reads.read(key)) for key in keys]


async def test_eight_reads_in_one_tick_are_one(store: Held, reads: Reads) -> None:
    tasks = begin(reads, *["k"] * 8)
    await turns()
    assert store.keys == ["k"]
    assert not any(task.done() for task in tasks)
    store.reads[0].set_result(b"1")
    assert await asyncio.gather(*tasks) == [b"1"] * 8


async def test_reads_of_other_keys_are_others(store: Held, reads: Reads) -> None:
    tasks = begin(reads, "a", "b", "a", "c", "b")
    await turns()
    assert store.keys == ["a", "b", "c"]
    for read, record in zip(store.reads, (b"1", None, b"3"), strict=True):
        read.set_result(record)
    assert await asyncio.gather(*tasks) == [b"1", None, b"1", b"3", None]


async def test_a_read_in_a_later_tick_does_not_join(store: Held, reads: Reads) -> None:
    tasks = begin(reads, "k")
    for count in range(1, 5):
        await turns(2)
        tasks += begin(reads, "k", "k")
        await turns(1)
        assert len(store.keys) == 1 + count
    for number, read in enumerate(store.reads):
        read.set_result(b"%d" % number)
    expected = [b"0", *(b"%d" % number for number in (1, 2, 3, 4) for _ in range(2))]
    assert await asyncio.gather(*tasks) == expected


async def test_who_was_told_of_a_write_reads_it_though_an_older_read_goes_on(
    store: Held, reads: Reads
) -> None:
    before = begin(reads, "k", "k")
    await turns(1)
    written = asyncio.get_running_loop().create_future()

    async def read_after_a_write() -> bytes | None:
        await written
        return await reads.read("k")

    after = asyncio.ensure_future(read_after_a_write())
    await turns(1)
    asyncio.get_running_loop().call_soon(written.set_result, None)  # as its reply comes in
    await turns()
    assert len(store.reads) == 2
    store.reads[1].set_result(b"new")
    assert await after == b"new"
    store.reads[0].set_result(b"old")  # which the server had read before the write
    assert await asyncio.gather(*before) == [b"old"] * 2


async def test_a_later_read_may_be_answered_first(store: Held, reads: Reads) -> None:
    (first,) = begin(reads, "k")
    await turns()
    second = begin(reads, "k", "k")
    await turns()
    store.reads[1].set_result(b"1")
    assert await asyncio.gather(*second) == [b"1"] * 2
    assert not first.done()
    store.reads[0].set_result(b"0")
    assert await first == b"0"


@pytest.mark.parametrize("ticks", [0, 1, 2, 3])
async def test_a_first_reader_that_is_cancelled_leaves_the_others_undisturbed(
    store: Held, reads: Reads, ticks: int
) -> None:
    first, *others = begin(reads, *["k"] * 8)
    await turns(ticks)
    first.cancel()
    await turns()
    assert first.cancelled()
    assert store.keys == ["k"] * (1 if ticks == 0 else 2)  # it may not even have begun
    store.reads[-1].set_result(b"1")
    assert await asyncio.gather(*others) == [b"1"] * 7


async def test_each_first_reader_may_be_cancelled(store: Held, reads: Reads) -> None:
    tasks = begin(reads, *["k"] * 8)
    for number in range(7):
        await turns()
        assert len(store.keys) == 1 + number
        tasks.remove(store.readers[-1])
        store.readers[-1].cancel()
    await turns()
    (last,) = tasks
    store.reads[-1].set_result(b"1")
    assert await last == b"1"


async def test_another_reader_that_is_cancelled_leaves_all_undisturbed(
    store: Held, reads: Reads
) -> None:
    first, second, third = begin(reads, *["k"] * 3)
    await turns()
    second.cancel()
    await turns()
    assert second.cancelled()
    store.reads[0].set_result(b"1")
    assert (await first, await third) == (b"1", b"1")
    assert store.keys == ["k"]


async def test_when_all_are_cancelled_nothing_is_read_again(store: Held, reads: Reads) -> None:
    tasks = begin(reads, *["k"] * 8)
    await turns()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await turns()
    assert all(task.cancelled() for task in tasks)
    assert store.keys == ["k"]


@pytest.mark.parametrize(
    "error", [ConnectionResetError("lost"), TimeoutError("late"), ValueError()]
)
async def test_an_error_reaches_all(store: Held, reads: Reads, error: Exception) -> None:
    tasks = begin(reads, *["k"] * 8)
    await turns()
    store.reads[0].set_exception(error)
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in errors} == {type(error)}
    assert {str(each) for each in errors} == {str(error)}
    assert len({id(each) for each in errors}) == 8  # each gets a traceback of its own
    assert store.keys == ["k"]


async def test_an_error_of_which_a_cancelled_reader_would_be_told_is_no_complaint(
    store: Held, reads: Reads
) -> None:
    first, second = begin(reads, "k", "k")
    await turns()
    second.cancel()
    await turns()
    store.reads[0].set_exception(ConnectionResetError("lost"))
    with pytest.raises(ConnectionResetError):
        await first
    del first, second
    store.reads.clear()  # `complaints` looks for the exception


class Local(MemoryStore):
    """A store that answers at once, but does not say so."""

    reads_locally = False
    error: Exception | None = None

    async def read(self, key: str) -> bytes | None:
        if self.error is not None:
            raise self.error
        return await super().read(key)


async def outcomes(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    """Return what came of tasks that have nothing to wait for."""
    await turns(10)
    hanging = [task for task in tasks if not task.done()]
    for task in hanging:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert not hanging
    return results


@each_way
@pytest.mark.parametrize("error", [None, ConnectionResetError("lost")])
async def test_a_store_that_answers_at_once(error: Exception | None, way: str) -> None:
    store = Local()
    for key in ("k", f"{NAME}_k"):
        await store.create(key, b"1", None)
    store.error = error
    reads = WAYS[way](store)
    for _ in range(3):
        results = await outcomes(begin(reads, "k", "k", "none", "k"))
        if error is None:
            assert results == [b"1", b"1", None, b"1"]
        else:
            assert {type(result) for result in results} == {ConnectionResetError}


@pytest.mark.parametrize("way", [*WAYS, "near cache"])
async def test_all_are_told_at_once_that_the_store_is_down(way: str) -> None:
    store = Local()
    store.timeout = 5
    store.error = TimeoutError("late")
    breaker = CircuitBreaker(store)
    near = NearCache(breaker, Tracker(), max_records=10)
    read = near.read if way == "near cache" else WAYS[way](breaker).read
    with pytest.raises(TimeoutError):
        await read("k")
    results = await outcomes([asyncio.ensure_future(read("k")) for _ in range(8)])
    assert {type(result) for result in results} == {StoreUnavailableError}
    await breaker.finish()


async def test_a_near_cache_reads_once_for_all(store: Held) -> None:
    near = NearCache(store, Tracker(), max_records=10)
    tasks = [asyncio.ensure_future(near.read("k")) for _ in range(8)]
    await turns()
    assert store.keys == ["k"]
    latest = asyncio.ensure_future(near.read_latest("k"))
    await turns()
    assert store.keys == ["k", "k"]
    store.reads[0].set_result(b"1")
    store.reads[1].set_result(b"2")
    assert await asyncio.gather(*tasks) == [b"1"] * 8
    assert await latest == b"2"


async def test_eight_requests_of_one_visitor_load_sessions_of_their_own(store: Held) -> None:
    storage = ServerStorage(store)
    loads = [asyncio.ensure_future(Browser(storage, "id").load()) for _ in range(8)]
    await until(lambda: store.reads)
    await turns()
    assert len(store.reads) == 1
    store.reads[0].set_result(b'{"created":1700000000,"session":{"cart":[1]}}')
    sessions = await asyncio.gather(*loads)
    for number, session in enumerate(sessions):
        assert session["cart"] == [1]
        session["cart"].append(number)
    assert len({id(session) for session in sessions}) == 8


async def test_redis_is_asked_once(redis_server: Server, direct: Any) -> None:
    async with Redis(host=HOST, port=redis_server.port) as client:
        storage = RedisStorage(client)
        await direct.set("AIOHTTP_SESSION_id", b'{"created":1700000000,"session":{"a":1}}')
        await storage.store.read("other")
        await direct.config_resetstat()
        loads = [Browser(storage, "id").load() for _ in range(8)]
        assert await asyncio.gather(*loads) == [{"a": 1}] * 8
        assert (await direct.info("commandstats"))["cmdstat_get"]["calls"] == 1
        await storage.finish()


@each_way
def test_each_event_loop_has_its_own(way: str) -> None:
    store = Held()
    reads = WAYS[way](store)

    async def main() -> list[Any]:
        tasks = begin(reads, *["k"] * 3)
        await turns()
        number = len(store.reads)
        store.reads[-1].set_result(b"%d" % number)
        return await asyncio.gather(*tasks)

    assert [asyncio.run(main()) for _ in range(2)] == [[b"1"] * 3, [b"2"] * 3]


def test_a_read_that_begins_when_something_comes_in_does_not_join() -> None:
    """The compiled futures wake up their waiters at once when a reply comes in.

    uvloop hands out what came in before it runs the callbacks of the next tick, so this does not
    hold there (see `SharedReads`).
    """
    store = Held()
    reads = WAYS["SharedReads"](store)
    here, there = socket.socketpair()

    async def main() -> None:
        loop, heard = asyncio.get_running_loop(), asyncio.Event()
        later: list[Any] = []

        def hear() -> None:
            here.recv(1)
            later.append(reads.read("k"))
            later[0].send(None)
            heard.set()

        loop.add_reader(here, hear)
        (first,) = begin(reads, "k")
        await turns(1)
        assert len(store.reads) == 1
        there.send(b"!")  # the reply to a write, say
        await heard.wait()
        later[0].close()
        loop.remove_reader(here)
        store.reads[0].set_result(b"1")
        await first
        assert len(store.reads) == 2

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
        here.close()
        there.close()
