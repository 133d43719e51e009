"""NearCache: what it keeps, and when it lets go of it."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import (
    BlockingConnectionPool,
    Connection,
    ConnectionPool,
    Redis,
    RedisCluster,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from valkey.asyncio import ValkeyCluster

from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.stores import _redis_tracking
from aiohttp_session.stores._redis_pipeline import WRITE, PipelinedConnection
from aiohttp_session.stores.kept_records import KeptRecords, Link
from aiohttp_session.stores.memory import MemoryStore
from aiohttp_session.stores.near_cache import NearCache, NearCacheInfo
from benchmarks import servers
from benchmarks.servers import HOST, Server
from tests.programs import run
from tests.proxy import Proxy
from tests.stores import innermost
from tests.waiting import PATIENCE, turns

NO_RETRY = Retry(NoBackoff(), 0)


class Clock:
    """A `time.monotonic` that stands still until it is set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def monotonic(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (sys.modules[KeptRecords.__module__], _redis_tracking):
        monkeypatch.setattr(module, "monotonic", clock)
    return clock


def live_link() -> Link:
    link = Link()
    link.until = float("inf")
    return link


class TestKeptRecords:
    """What is kept, apart from who tells of changes."""

    def keep(self, records: KeptRecords, key: str, payload: bytes, link: Link) -> None:
        records.keep(records.ask(key) or [key], payload, link)

    def test_an_answer_is_kept(self) -> None:
        records = KeptRecords(10, 1000)
        self.keep(records, "k", b"1", live_link())
        assert records.get("k") == b"1"
        assert (records.hits, records.misses, records.bytes) == (1, 0, 2)

    def test_what_is_kept_is_served_only_while_its_link_is_trusted(self, monotonic: Clock) -> None:
        records, link = KeptRecords(10, 1000), Link()
        self.keep(records, "k", b"1", link)
        assert records.get("k") is None
        link.until = monotonic.now + 2
        assert records.get("k") == b"1"
        monotonic.now += 2
        assert records.get("k") is None
        assert (records.hits, records.misses) == (1, 2)

    @pytest.mark.parametrize(
        "change",
        [
            lambda records: records.forget("k"),
            lambda records: records.begin_change("k"),
            lambda records: (records.begin_change("k"), records.end_change("k")),
            lambda records: records.ask_behind("k"),
            lambda records: records.forget_link(Link()),
        ],
    )
    def test_an_answer_that_was_under_way_when_the_record_was_changed_is_not_kept(
        self, change: Callable[[KeptRecords], object]
    ) -> None:
        records = KeptRecords(10, 1000)
        token = records.ask("k")
        assert token is not None
        assert records.ask("k") is token
        change(records)
        records.keep(token, b"1", live_link())
        assert records.get("k") is None
        assert records.bytes == 0

    def test_nothing_is_kept_while_a_change_by_another_way_is_under_way(self) -> None:
        records = KeptRecords(10, 1000)
        records.begin_change("k")
        records.begin_change("k")
        assert records.ask("k") is None
        assert records.ask_behind("k") is None
        records.end_change("k")
        assert records.ask("k") is None
        assert records.ask_behind("k") is None
        records.end_change("k")
        assert records.ask("k") is not None

    def test_the_answer_behind_the_last_of_several_changes_is_kept(self) -> None:
        records = KeptRecords(10, 1000)
        first, last = records.ask_behind("k"), records.ask_behind("k")
        assert first is not None
        assert last is not None
        records.keep(first, b"1", live_link())
        assert records.get("k") is None
        records.keep(last, b"2", live_link())
        assert records.get("k") == b"2"

    def test_a_change_drops_what_is_kept(self) -> None:
        records = KeptRecords(10, 1000)
        self.keep(records, "k", b"1", live_link())
        records.ask_behind("k")
        assert records.get("k") is None

    def test_only_the_first_of_several_answers_is_kept(self) -> None:
        records = KeptRecords(10, 1000)
        token = records.ask("k")
        assert token is not None
        records.keep(token, b"1", live_link())
        records.forget("k")
        records.keep(token, b"1", live_link())
        assert records.get("k") is None

    def test_nothing_is_kept_that_came_by_no_link(self) -> None:
        records = KeptRecords(10, 1000)
        records.keep(records.ask("k") or [], b"1", None)
        assert records.get("k") is None
        assert (len(records.by_key), records.bytes) == (0, 0)
        assert records.ask("k") == ["k"]

    def test_nothing_and_large_records_are_not_kept(self) -> None:
        records = KeptRecords(10, 10**9)
        for payload in (None, b"x" * (32 * 1024 + 1)):
            token = records.ask("k")
            assert token is not None
            records.keep(token, payload, live_link())
            assert records.get("k") is None
            assert not records._tokens  # or those who ask for ids at random would fill it
        self.keep(records, "k", b"x" * 32 * 1024, live_link())
        assert records.get("k") is not None

    def test_the_least_recently_used_goes_first(self) -> None:
        records, link = KeptRecords(2, 1000), live_link()
        self.keep(records, "a", b"1", link)
        self.keep(records, "b", b"2", link)
        assert records.get("a") == b"1"
        self.keep(records, "c", b"3", link)
        assert [*records.by_key] == ["a", "c"]

    def test_what_came_by_a_lost_link_is_dropped_and_nothing_else(self) -> None:
        records, lost, other = KeptRecords(10, 1000), live_link(), live_link()
        self.keep(records, "a", b"1", lost)
        self.keep(records, "b", b"2", other)
        records.forget_link(lost)
        assert [*records.by_key] == ["b"]
        assert records.bytes == 2
        records.forget_link(other)
        assert records.bytes == len(records.by_key) == 0

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["keep", "forget", "change", "link"]),
                st.sampled_from("abcdef"),
                st.integers(0, 40),
            )
        )
    )
    def test_bytes_are_counted_and_bounded(self, steps: list[tuple[str, str, int]]) -> None:
        records, links = KeptRecords(4, 60), [live_link(), live_link()]
        for step, key, size in steps:
            if step == "keep":
                self.keep(records, key, b"x" * size, links[size % 2])
            elif step == "forget":
                records.forget(key)
            elif step == "change":
                records.begin_change(key)
                records.end_change(key)
            else:
                records.forget_link(links[size % 2])
            kept = records.by_key.items()
            assert records.bytes == sum(len(key) + len(payload) for key, (payload, _) in kept)
            assert records.bytes <= 60
            assert len(kept) <= 4
        assert not records._changing


class Tracker:
    """Stands for a store that tells of changes."""

    records: Callable[[], KeptRecords]

    def track(self, records: Callable[[], KeptRecords]) -> None:
        self.records = records

    def keep(self, key: str, payload: bytes) -> None:
        self.records().keep(self.records().ask(key) or [key], payload, live_link())


async def test_a_hit_takes_no_turn_of_the_event_loop() -> None:
    tracker = Tracker()
    near = NearCache(MemoryStore(max_records=10), tracker, max_records=10)
    await near.create("k", b"1", None)
    tracker.keep("k", b"1")
    reading = near.read("k")
    with pytest.raises(StopIteration) as done:
        reading.send(None)
    assert done.value.value == b"1"
    assert await near.read_latest("k") == b"1"
    assert near.near_cache_info() == NearCacheInfo(records=1, bytes=2, hits=1, misses=0)
    assert near.timeout is None
    assert near.describe() == near.store.describe()
    await near.finish()


WITHOUT_SYSTEM_CALLS = """
import asyncio, ctypes, os, time
time.monotonic = time.time = lambda: 1.7e9  # on some machines a look at the clock is a system call
from aiohttp.test_utils import make_mocked_request
from aiohttp_session.server_storage import ServerStorage
from aiohttp_session.stores.memory import MemoryStore
from aiohttp_session.stores.near_cache import NearCache
from tests.test_near_cache import Tracker

async def main():
    tracker = Tracker()
    near = NearCache(MemoryStore(max_records=1), tracker, max_records=1)
    storage = ServerStorage(near)
    tracker.keep("AIOHTTP_SESSION_id", b'{"created":1700000000,"session":{"a":1}}')
    headers = {"Cookie": "AIOHTTP_SESSION=id"}
    requests = [make_mocked_request("GET", "/", headers=headers) for _ in range(50)]
    for i, request in enumerate(requests):
        if i == 40:  # Python has the memory that it needs
            PR_SET_SECCOMP, SECCOMP_MODE_STRICT = 22, 1
            assert ctypes.CDLL(None).prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT, 0, 0, 0) == 0
        session = await storage.load_session(request)
        assert session["a"] == 1
    os.write(1, f"{near.near_cache_info().hits} hits".encode())
    os.getpid()  # this one kills

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has seccomp")
def test_a_hit_makes_no_system_call(implementation: str) -> None:
    if implementation == "python" and sys.version_info < (3, 12):
        pytest.skip("asyncio's get_running_loop makes one")
    printed = run(WITHOUT_SYSTEM_CALLS, implementation=implementation, returncode=-signal.SIGKILL)
    assert printed == "50 hits"


def test_each_event_loop_has_its_own() -> None:
    store, tracker = MemoryStore(max_records=10), Tracker()
    near = NearCache(store, tracker, max_records=10)
    kept = []

    async def read() -> None:
        await store.create("k", b"1", None)
        tracker.keep("k", b"1")
        assert await near.read("k") == b"1"
        kept.append(tracker.records())

    asyncio.run(read())
    asyncio.run(read())
    assert kept[0] is not kept[1]
    assert near.near_cache_info().hits == 2


@pytest.fixture
async def proxy(redis_server: Server) -> AsyncIterator[Proxy]:
    async with Proxy(redis_server.port) as proxy:
        yield proxy


class Process:
    """A storage with a near cache, as one of several processes has it."""

    def __init__(self, port: int, **options: Any) -> None:
        self.client: Any = Redis(host=HOST, port=port, retry=NO_RETRY, **options)
        self.storage = RedisStorage(self.client, near_cache=100, timeout=PATIENCE)
        self.near: Any = self.storage.store

    @property
    def line(self) -> Any:
        return innermost(self.storage)._servers.get()._pipeline

    async def start(self) -> None:
        """Have the connection that tracks, and know how the server swaps."""
        await self.near.read("nothing")  # opens it
        await self.near.swap("nothing", b"0", b"1", None)
        await self.settle()

    async def settle(self) -> None:
        """Wait until all that was announced before has been heard."""
        await self.near.read_latest("nothing")

    async def is_hit(self, key: str, payload: bytes) -> bool:
        hits = self.near.near_cache_info().hits
        assert await self.near.read(key) == payload
        return bool(self.near.near_cache_info().hits > hits)

    async def close(self) -> None:
        await self.storage.finish()
        pool = self.client.connection_pool
        assert len(pool._in_use_connections) == 0
        await self.client.aclose()


@pytest.fixture
async def here(proxy: Proxy) -> AsyncIterator[Process]:
    process = Process(proxy.port)
    await process.client.flushall()
    await process.start()
    yield process
    await process.close()


@pytest.fixture
async def there(redis_server: Server, here: Process) -> AsyncIterator[Process]:
    process = Process(redis_server.port)
    await process.start()
    yield process
    await process.close()


async def test_what_is_read_is_kept(here: Process) -> None:
    await here.client.set("k", b"1")
    assert not await here.is_hit("k", b"1")
    assert await here.is_hit("k", b"1")
    assert here.near.near_cache_info()[:2] == (1, 2)


async def test_what_is_kept_can_be_asked_for(here: Process, redis_server: Server) -> None:
    assert here.storage.near_cache_info() == here.near.near_cache_info()
    assert RedisStorage(here.client).near_cache_info() is None


async def test_what_is_written_is_kept(here: Process) -> None:
    await here.near.create("k", b"1", 60)
    assert await here.is_hit("k", b"1")
    assert await here.near.swap("k", b"1", b"2", None)
    assert await here.is_hit("k", b"2")
    assert await here.near.swap("k", b"2", b"3", 60)
    assert await here.is_hit("k", b"3")
    assert not await here.near.swap("k", b"2", b"4", 60)
    assert await here.is_hit("k", b"3")
    assert await here.near.swap("new", None, b"1", 60)
    assert await here.is_hit("new", b"1")
    await here.near.delete("k")
    assert await here.near.read("k") is None
    assert not await here.near.swap("k", b"3", b"5", 60)
    assert await here.near.read("k") is None
    assert here.near.near_cache_info().records == 1


async def test_what_is_swapped_by_another_connection_is_kept_after_its_next_read(
    here: Process,
) -> None:
    await here.near.create("k", b"1", 60)
    await here.client.script_flush()
    assert await here.near.swap("k", b"1", b"2", 60)  # by EVAL, which is not sent where it tracks
    assert not await here.is_hit("k", b"2")
    assert await here.is_hit("k", b"2")


async def test_what_was_kept_after_a_write_is_tracked(here: Process, there: Process) -> None:
    for value in (b"1", b"2", b"3"):
        await here.near.create("k", value, 60)
        assert await here.is_hit("k", value)
        assert await there.near.swap("k", value, b"x" + value, 60)
        await here.settle()
        assert not await here.is_hit("k", b"x" + value)
        await there.near.delete("k")
        await here.settle()
        assert await here.near.read("k") is None


async def test_several_writes_at_once_keep_the_last(here: Process, there: Process) -> None:
    await here.near.create("k", b"0", 60)
    swaps = (here.near.swap("k", b"%d" % i, b"%d" % (i + 1), 60) for i in range(20))
    assert all(await asyncio.gather(*swaps))
    last = await there.near.read("k")
    assert last == b"20"
    assert await here.near.read("k") == last
    assert await here.is_hit("k", last)
    assert await there.near.swap("k", last, b"x", 60)
    await here.settle()
    assert not await here.is_hit("k", b"x")


@pytest.mark.parametrize("large", [False, True])  # by the connection that tracks; beside it
@pytest.mark.parametrize("change", ["create", "swap", "delete"])
async def test_a_record_is_not_served_from_when_its_change_begins(
    here: Process, proxy: Proxy, change: str, large: bool
) -> None:
    await here.near.create("k", b"1", 60)
    assert await here.is_hit("k", b"1")
    payload = b"x" * 40_000 if large else b"2"
    arguments = {"create": (payload, 60), "swap": (b"1", payload, 60), "delete": ()}[change]
    proxy.hold()
    changing = asyncio.ensure_future(getattr(here.near, change)("k", *arguments))
    await turns()
    assert here.near.near_cache_info().records == 0
    reading = asyncio.ensure_future(here.near.read("k"))
    await turns()
    assert not reading.done()
    proxy.resume()
    await changing
    await reading
    assert await here.near.read("k") == (None if change == "delete" else payload)


async def test_an_answer_that_a_change_beside_it_overtakes_is_not_kept(
    here: Process, there: Process, proxy: Proxy
) -> None:
    large = b"x" * 40_000
    await there.near.create("k", b"1", 60)
    await here.settle()
    line = here.line
    line._transport.pause_reading()
    reading = asyncio.ensure_future(here.near.read("k"))
    await turns()
    await here.near.create("k", large, 60)  # by another connection, as it is large
    line._hand_out(b"$1\r\n1\r\n")  # and that it was changed isn't yet in
    assert await reading == b"1"
    assert await here.near.read("k") == large
    line._transport.abort()


async def test_an_answer_that_a_change_on_a_connection_that_is_left_overtakes_is_not_kept(
    here: Process, there: Process, proxy: Proxy
) -> None:
    await here.near.create("k", b"1", 60)
    left = here.line
    proxy.hold()
    writing = asyncio.ensure_future(here.near.swap("k", b"1", b"2", 60))
    await turns()
    left.leave()
    assert here.near._records.get().ask("k") is None
    proxy.resume()
    assert await writing
    assert await here.near.read("k") == b"2"


async def test_a_cancelled_write_is_not_kept_from_being_seen(here: Process) -> None:
    await here.near.create("k", b"1", 60)
    swap = asyncio.ensure_future(here.near.swap("k", b"1", b"2", 60))
    await asyncio.sleep(0)
    swap.cancel()
    await asyncio.wait([swap])
    await here.settle()
    payload = await here.client.get("k")
    assert await here.near.read("k") == payload


async def test_when_the_database_is_flushed_all_is_dropped(here: Process) -> None:
    await here.near.create("k", b"1", 60)
    await here.near.create("l", b"1", 60)
    await here.client.flushdb()
    await here.settle()
    assert here.near.near_cache_info()[:2] == (0, 0)
    assert await here.near.read("k") is None


async def test_what_redis_evicts_from_its_table_is_dropped(redis_server: Server) -> None:
    with servers.redis("--tracking-table-max-keys", "1") as server:
        process = Process(server.port)
        await process.start()
        for key in "abcdefgh":
            await process.near.create(key, key.encode(), 60)
        while process.near.near_cache_info().records > 1:
            await process.settle()
        await process.close()


async def test_an_expired_record_is_dropped(here: Process) -> None:
    await here.near.create("k", b"1", 60)
    await here.client.pexpire("k", 1)
    while await here.client.exists("k"):  # noqa: ASYNC110
        await asyncio.sleep(0)
    await here.settle()
    assert await here.near.read("k") is None


async def test_large_records_are_read_from_the_store(here: Process) -> None:
    large = b"x" * 40_000
    await here.near.create("k", large, 60)
    assert not await here.is_hit("k", large)
    await here.client.set("l", large)
    for _ in range(3):
        assert not await here.is_hit("l", large)
    await here.near.create("k", b"1", 60)
    await here.near.create("k", b"2", 60)
    await here.settle()
    await here.near.read("k")
    assert await here.is_hit("k", b"2")


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_key_that_is_no_record_is_the_clients_error(
    redis_server: Server, here: Process, is_first: bool
) -> None:
    await here.client.lpush("k", b"1")
    process = Process(redis_server.port)
    if not is_first:
        await process.start()
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await process.near.read("k")
    await here.client.delete("k")
    await process.near.create("k", b"1", 60)
    await process.settle()
    await process.near.read("k")
    assert await process.is_hit("k", b"1")
    await process.close()


async def test_what_is_written_while_another_connection_writes_it_too_is_not_kept(
    here: Process,
) -> None:
    other = asyncio.get_running_loop().create_future()
    innermost(here.storage)._tracking.note((("k", b"", (), WRITE), other, 0, False, 0.0))
    await here.near.create("k", b"1", 60)
    await here.settle()
    assert here.near.near_cache_info().records == 0
    other.set_result(True)
    await turns()
    assert not await here.is_hit("k", b"1")
    assert await here.is_hit("k", b"1")


async def test_the_connection_that_tracks_is_kept_for_good(here: Process) -> None:
    line = here.line
    line._used = line._opened = line._loop.time() - 3600
    line._watch()
    assert here.line is line
    line.leave()
    line._beat()
    assert not line._unsent
    await asyncio.wait([line._task])
    assert await here.near.read("nothing") is None


@pytest.mark.parametrize("how", ["cut", "killed", "reset"])
async def test_with_its_connection_all_is_gone(
    here: Process, there: Process, proxy: Proxy, how: str
) -> None:
    await here.near.create("k", b"1", 60)
    line = here.line
    if how == "cut":
        await proxy.cut()
    elif how == "killed":
        await there.client.execute_command("CLIENT", "KILL", "TYPE", "normal")
    else:
        line._transport.abort()
    await asyncio.wait([line._task])
    assert here.near.near_cache_info()[:2] == (0, 0)
    assert not await here.is_hit("k", b"1")
    await here.settle()
    await here.settle()
    await here.near.read("k")
    assert here.line is not line
    assert await here.is_hit("k", b"1")


async def test_a_link_that_went_dead_is_not_relied_upon(
    proxy: Proxy, there: Process, monotonic: Clock
) -> None:
    here = Process(proxy.port)
    await here.start()
    await here.near.create("k", b"1", 60)
    proxy.hold()
    assert await there.near.swap("k", b"1", b"2", 60)
    monotonic.now += 1.9
    assert await here.is_hit("k", b"1")
    monotonic.now += 0.2
    reading = asyncio.ensure_future(here.near.read("k"))
    hits = here.near.near_cache_info().hits
    proxy.resume()
    assert await reading == b"2"
    assert here.near.near_cache_info().hits == hits
    await here.close()


async def test_a_heartbeat_vouches_for_what_was_before_it(here: Process, monotonic: Clock) -> None:
    line = here.line
    monotonic.now += 10
    line._beat()
    monotonic.now += 1
    await here.settle()
    assert line.until == monotonic.now - 1 + _redis_tracking.TRUST
    monotonic.now += 1.5
    assert here.line is line
    await here.near.create("k", b"1", 60)
    assert not await here.is_hit("k", b"1")
    line._beat()
    await here.settle()
    assert await here.is_hit("k", b"1")


async def test_a_server_that_became_a_replica_is_not_relied_upon() -> None:
    with servers.redis() as server, servers.redis() as primary:
        here = Process(server.port)
        await here.start()
        await here.near.create("k", b"1", 60)
        line = here.line
        await asyncio.to_thread(servers.ask, server, "REPLICAOF", HOST, primary.port)
        line._beat()
        await asyncio.wait([line._task])
        assert here.near.near_cache_info().records == 0
        await here.close()


async def test_merging_compares_with_the_store(here: Process, there: Process) -> None:
    requests = [
        make_mocked_request("GET", "/", headers={"Cookie": "AIOHTTP_SESSION=a"}) for _ in range(2)
    ]
    storage = RedisStorage(here.client, near_cache=10, on_conflict="merge", timeout=PATIENCE)
    await storage.store.create("AIOHTTP_SESSION_a", b'{"session":{"n":1}}', 60)
    await storage.store.read("AIOHTTP_SESSION_a")
    await storage.store.read("AIOHTTP_SESSION_a")
    session = await storage.load_session(requests[0])
    session["mine"] = 1
    record = b'{"session":{"n":1}}'
    assert await there.near.swap("AIOHTTP_SESSION_a", record, b'{"session":{"n":2}}', 60)
    await storage.save_session(requests[0], web.Response(), session)
    assert await storage.load_session(requests[1]) == {"n": 2, "mine": 1}
    await storage.finish()


async def test_sessions_never_share_an_object(here: Process) -> None:
    request = make_mocked_request("GET", "/", headers={"Cookie": "AIOHTTP_SESSION=a"})
    await here.near.create("AIOHTTP_SESSION_a", b'{"session":{"cart":[1]}}', 60)
    first = await here.storage.load_session(request)
    first["cart"].append(2)
    assert (await here.storage.load_session(request))["cart"] == [1]


async def test_a_user_s_sessions_are_looked_up_in_the_store(here: Process, there: Process) -> None:
    request = make_mocked_request("GET", "/")
    session = await here.storage.load_session(request)
    session.owner = "alice"
    session["n"] = 1
    await here.storage.save_session(request, web.Response(), session)
    assert len(await here.storage.sessions_of("alice")) == 1
    # What `there` tells `here` of is held back: only the store itself knows.
    other = await there.storage.load_session(request)
    other.owner = "alice"
    other["n"] = 1
    await there.storage.save_session(request, web.Response(), other)
    hits = here.near.near_cache_info().hits
    assert await here.storage.end_sessions("alice") == 2
    assert here.near.near_cache_info().hits == hits
    await here.settle()
    await there.settle()
    assert await here.client.keys("AIOHTTP_SESSION_*") == []


@pytest.mark.parametrize("near_cache", [-1, -10_000])
async def test_the_number_of_records_must_be_positive(
    redis_server: Server, near_cache: int
) -> None:
    with pytest.raises(ValueError, match="near_cache must be 0 or a number of records"):
        RedisStorage(Redis(port=redis_server.port), near_cache=near_cache)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"single_connection_client": True}, "single_connection_client"),
        ({"max_connections": 4}, "max_connections must be more than 4"),
    ],
)
async def test_a_client_that_cannot_do_it_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        RedisStorage(Redis(**options), near_cache=10)
    RedisStorage(Redis(**options))


async def test_a_cluster_that_cannot_do_it_is_refused() -> None:
    cluster: Any = RedisCluster(host=HOST, max_connections=4)
    with pytest.raises(ValueError, match="max_connections must be more than 4"):
        RedisStorage(cluster, near_cache=10)


async def test_a_cluster_whose_nodes_take_no_connection_back_is_refused() -> None:
    cluster: Any = ValkeyCluster(host=HOST)
    with pytest.raises(ValueError, match="its ClusterNode has no release"):
        RedisStorage(cluster, near_cache=10)
    RedisStorage(cluster)


async def test_a_connection_with_methods_of_its_own_is_refused() -> None:
    class Own(Connection):
        async def read_response(self, *args: Any, **options: Any) -> Any:
            raise NotImplementedError

    pool = ConnectionPool(connection_class=Own)
    with pytest.raises(ValueError, match="its Own has methods of its own"):
        RedisStorage(Redis(connection_pool=pool), near_cache=10)


async def test_a_client_with_methods_of_its_own_is_refused() -> None:
    class Own(Redis):
        async def execute_command(self, *args: Any, **options: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(ValueError, match=r"its execute_command\(\) is not the library's"):
        RedisStorage(Own(), near_cache=10)


async def test_a_blocking_pool_will_do(redis_server: Server) -> None:
    pool = BlockingConnectionPool(host=HOST, port=redis_server.port)
    storage = RedisStorage(Redis(connection_pool=pool), near_cache=10)
    near: Any = storage.store
    await near.create("k", b"1", 60)
    await near.read_latest("k")
    await near.read_latest("k")
    assert await near.read("k") == b"1"
    assert near.near_cache_info().hits == 1
    await storage.finish()
    await pool.disconnect()


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        ("CLIENT", "unknown command .CLIENT."),
        ("HELLO", "unknown command .HELLO."),
        ("WAIT", "unknown command .WAIT."),
        ("-client +client|id +client|info +client|kill", "NOPERM"),
        ("-wait", "NOPERM"),
    ],
)
async def test_a_server_that_refuses_is_used_uncached_with_one_warning(
    refused: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    renamed = ("--rename-command", refused, "") if refused.isalpha() else ()
    with servers.redis(*renamed) as server:
        if not renamed:
            servers.ask(server, f"ACL SETUSER default {refused}")
        process = Process(server.port, protocol=2)
        with caplog.at_level(logging.WARNING):
            for value in (b"1", b"2", b"3"):
                await process.near.create("k", value, 60)
                assert await process.near.read("k") == value
                assert not await process.is_hit("k", value)
        [warning] = [r.getMessage() for r in caplog.records if "near_cache" in r.getMessage()]
        assert "near_cache has no effect" in warning
        assert re.search(reason, warning)
        assert type(process.line) is PipelinedConnection
        await process.close()


def test_there_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    tracking = _redis_tracking.Tracking(lambda: KeptRecords(1, 1))
    tracking.give_up("once")
    tracking.give_up("twice")
    assert len(caplog.records) == 1


async def test_a_proxy_that_closes_is_used_uncached_with_one_warning(
    proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.intolerable = b"TRACKING"
    process = Process(proxy.port)
    for i in range(8):
        await process.near.create("k", b"%d" % i, 60)
        assert await process.near.read("k") == b"%d" % i
    [warning] = [r.getMessage() for r in caplog.records if "near_cache" in r.getMessage()]
    assert "the connection is closed" in warning
    assert process.near.near_cache_info().hits == 0
    await process.close()


@pytest.mark.parametrize(
    "push",
    [
        b">2\r\n$10\r\ninvalidate\r\n*2\r\n$1\r\nk\r\n$1\r\nl\r\n",
        b">2\r\n$7\r\nmessage\r\n%1\r\n+a\r\n:1\r\n",
        b">2\r\n$10\r\ninvalidate\r\n*-1\r\n",
    ],
)
async def test_a_push_that_is_not_known_costs_all(here: Process, push: bytes) -> None:
    await here.near.create("k", b"1", 60)
    await here.near.create("m", b"1", 60)
    line = here.line
    line._hand_out(push)
    assert here.near.near_cache_info().records == 0
    assert here.line is line


@pytest.mark.parametrize(
    "message", [b"%1\r\n+a\r\n:1\r\n", b"*0\r\n", b"#t\r\n", b"$1\r\nab\r\n", b">" + b"x" * 70_000]
)
async def test_what_is_no_reply_costs_the_connection(
    proxy: Proxy, here: Process, message: bytes
) -> None:
    await here.near.create("k", b"1", 60)
    line = here.line
    proxy.fake_reply = message
    reading = asyncio.ensure_future(here.near.read_latest("k"))
    await asyncio.wait([line._task])
    assert here.near.near_cache_info().records == 0
    proxy.fake_reply = None
    assert await reading in {b"1", None}
    assert await here.near.read("k") == b"1"


async def test_when_all_tasks_are_cancelled_it_can_go_on(here: Process, proxy: Proxy) -> None:
    await here.near.create("k", b"1", 60)
    proxy.hold()
    swap = asyncio.ensure_future(here.near.swap("k", b"1", b"2", 60))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    here.line._task.cancel()
    await asyncio.wait([swap])
    assert swap.cancelled()
    assert here.near.near_cache_info().records == 0
    proxy.resume()
    assert await here.near.read("k") in {b"1", b"2"}
