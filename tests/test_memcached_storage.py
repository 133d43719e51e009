"""What MemcachedStorage does beyond the contract of server storages."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from typing import Any

import aiomcache
import pytest

from aiohttp_session.memcached_storage import MemcachedStorage
from benchmarks import servers
from benchmarks.servers import HOST, Server
from tests.conftest import Clock
from tests.contract import Browser
from tests.proxy import Proxy
from tests.waiting import turns, until

MONTH = 30 * 24 * 60 * 60


@pytest.fixture
async def storage(proxy: Proxy) -> AsyncIterator[MemcachedStorage]:
    storage = MemcachedStorage(aiomcache.Client(HOST, proxy.port, pool_size=4))
    await storage.conn.flush_all()
    await storage.conn.close()
    await proxy.settles(0)
    proxy.accepted = 0
    yield storage
    await storage.finish()


class FakeClient:
    """A client of the user's own, which keeps records and the calls that were made."""

    def __init__(self) -> None:
        self.records: dict[bytes, bytes] = {}
        self.calls: list[tuple[str, int]] = []
        self.competitors = 0  # programs that change the next record just before it is replaced

    async def get(self, key: bytes) -> bytes | None:
        return self.records.get(key)

    async def gets(self, key: bytes) -> tuple[bytes | None, int | None]:
        return self.records.get(key), 1 if key in self.records else None

    async def set(self, key: bytes, value: bytes, exptime: int = 0) -> bool:
        self.calls.append(("set", exptime))
        self.records[key] = value
        return True

    async def add(self, key: bytes, value: bytes, exptime: int = 0) -> bool:
        self.calls.append(("add", exptime))
        return self.records.setdefault(key, value) is value

    async def cas(self, key: bytes, value: bytes, token: int, exptime: int = 0) -> bool:
        self.calls.append(("cas", exptime))
        if self.competitors:
            self.competitors -= 1
            return False
        self.records[key] = value
        return True

    async def delete(self, key: bytes) -> bool:
        return self.records.pop(key, None) is not None


def with_fake_client(**options: Any) -> tuple[MemcachedStorage, FakeClient]:
    client = FakeClient()
    return MemcachedStorage(client, **options), client  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0, -1])
def test_time_limit_is_positive(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        MemcachedStorage(FakeClient(), timeout=timeout)  # type: ignore[arg-type]


def test_storage_can_be_made_before_its_client() -> None:
    assert MemcachedStorage(None).conn is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ttl", "expiry"),
    [
        (None, 0),
        (1, 1),
        (MONTH, MONTH),
        (MONTH + 1, 1_700_000_000 + MONTH + 1),
    ],
)
async def test_expiry_is_relative_up_to_a_month(clock: Clock, ttl: int | None, expiry: int) -> None:
    storage, client = with_fake_client()
    await storage.store.create("k", b"1", ttl)
    await storage.store.swap("k", b"1", b"2", ttl)
    await storage.store.swap("new", None, b"3", ttl)
    assert client.calls == [("set", expiry), ("cas", expiry), ("add", expiry)]


@pytest.mark.parametrize("ttl", [1, MONTH, MONTH + 100, None])
async def test_server_takes_any_ttl(storage: MemcachedStorage, ttl: int | None) -> None:
    await storage.store.create("k", b"1", ttl)
    assert await storage.store.read("k") == b"1"


@pytest.mark.parametrize("key", ["a b", "a\nb", "\xe9", "\x7f", "k" * 251])
async def test_impossible_keys_are_refused_without_naming_them(
    storage: MemcachedStorage, key: str
) -> None:
    async def read() -> None:
        await storage.store.read(key)

    for attempt in (
        read(),
        storage.store.create(key, b"1", None),
        storage.store.swap(key, b"1", b"2", None),
        storage.store.swap(key, None, b"2", None),
        storage.store.delete(key),
    ):
        with pytest.raises(ValueError, match=rf"at most 250 .* has {len(key)}$"):
            await attempt


async def test_largest_key_is_taken(storage: MemcachedStorage) -> None:
    await storage.store.create("k" * 250, b"1", None)
    assert await storage.store.read("k" * 250) == b"1"


@pytest.mark.parametrize("size", [1024**2, 10 * 1024**2])
async def test_record_beyond_the_servers_limit_is_refused_and_nothing_else_suffers(
    storage: MemcachedStorage, size: int
) -> None:
    # Were the payload taken for commands, this would empty the store.
    huge = b"flush_all\r\n" * (size // 11 + 1)
    await storage.store.create("small", b"1", None)
    await storage.store.create("large", b"1", None)
    results = await asyncio.gather(
        storage.store.swap("small", b"1", b"2", None),
        storage.store.swap("large", b"1", huge, None),
        storage.store.create("other", huge, None),
        storage.store.read("small"),
        return_exceptions=True,
    )
    assert results[0] is True
    assert results[3] in {b"1", b"2"}
    for error in results[1:3]:
        assert isinstance(error, ValueError)
        assert f"{len(huge)} bytes" in str(error)
        assert "1 MB" in str(error)
    assert await storage.store.read("small") == b"2"
    assert await storage.store.read("large") == b"1"


async def test_largest_record_is_taken(storage: MemcachedStorage) -> None:
    payload = b"\r\nEND\r\n" * 140_000  # nearly 1 MB
    await storage.store.create("k", payload, None)
    assert await storage.store.read("k") == payload


async def test_foreign_record_with_flags_is_an_error_of_its_own(
    storage: MemcachedStorage, memcached_server: Server
) -> None:
    async def pickled(value: object) -> tuple[bytes, int]:
        return b"\x80", 7

    foreign: aiomcache.FlagClient[object] = aiomcache.FlagClient(
        HOST, memcached_server.port, set_flag_handler=pickled
    )
    await foreign.set(b"flagged", object())
    await foreign.close()
    await storage.store.create("plain", b"1", None)
    flagged, plain = await asyncio.gather(
        storage.store.read("flagged"), storage.store.read("plain"), return_exceptions=True
    )
    assert isinstance(flagged, aiomcache.ClientException)
    assert plain == b"1"


async def test_operations_of_one_turn_share_a_connection_and_a_write(
    storage: MemcachedStorage, proxy: Proxy
) -> None:
    await storage.store.read("k")
    before = proxy.passed
    await asyncio.gather(
        *(storage.store.create(f"k{number}", b"%d" % number, None) for number in range(50))
    )
    assert await asyncio.gather(*(storage.store.read(f"k{number}") for number in range(50))) == [
        b"%d" % number for number in range(50)
    ]
    assert proxy.accepted == 1
    assert proxy.passed - before <= 4  # the first of a turn may go ahead


async def test_every_reader_of_one_key_gets_it(storage: MemcachedStorage) -> None:
    await storage.store.create("k", b"1", None)
    records = await asyncio.gather(*(storage.store.read(key) for key in ["k", "none", "k", "k"]))
    assert records == [b"1", None, b"1", b"1"]


@pytest.mark.parametrize("fragment", [1, 7, 2**16])
async def test_replies_may_come_in_pieces(
    storage: MemcachedStorage, proxy: Proxy, fragment: int
) -> None:
    proxy.fragment = fragment
    await storage.store.create("a", b"1\r\nEND\r\n", None)
    await storage.store.create("b", b"2", None)
    results = await asyncio.gather(
        storage.store.read("a"),
        storage.store.read("none"),
        storage.store.swap("b", b"2", b"3", None),
        storage.store.swap("b", None, b"4", None),
        storage.store.swap("a", b"1\r\nEND\r\n", b"", None),
        storage.store.swap("none", b"1", b"2", None),
        storage.store.delete("none"),
        storage.store.swap("new", None, b"5", None),
    )
    assert results[:5] == [b"1\r\nEND\r\n", None, True, False, True]
    assert results[5:] == [False, None, True]
    assert await storage.store.read("a") == b""
    assert await storage.store.read("b") == b"3"
    assert await storage.store.read("new") == b"5"


async def test_more_and_longer_keys_than_one_command_holds(storage: MemcachedStorage) -> None:
    keys = [f"{number:0250}" for number in range(300)]
    await asyncio.gather(*(storage.store.create(key, key.encode(), None) for key in keys))
    records = await asyncio.gather(*(storage.store.read(key) for key in keys))
    assert records == [key.encode() for key in keys]


async def test_large_record_does_not_hold_up_a_small_one(
    storage: MemcachedStorage, proxy: Proxy
) -> None:
    await storage.store.create("small", b"1", None)
    await storage.store.create("large", b"x" * 900_000, None)
    proxy.fragment = 4096
    proxy.hold(after=4096)
    large = asyncio.ensure_future(storage.store.read("large"))
    await until(lambda: proxy.held_replies)  # it has begun
    await turns()
    assert await storage.store.read("small") == b"1"
    assert not large.done()
    proxy.fragment = 2**16
    proxy.resume()
    assert await large == b"x" * 900_000


async def test_large_records_share_the_connections_that_there_may_be(proxy: Proxy) -> None:
    storage = MemcachedStorage(aiomcache.Client(HOST, proxy.port, pool_size=2))
    records = {f"large{number}": b"%d" % number * 100_000 for number in range(7)}
    await asyncio.gather(*(storage.store.create(key, text, None) for key, text in records.items()))
    assert proxy.accepted == 2
    assert await asyncio.gather(*map(storage.store.read, records)) == list(records.values())
    await storage.finish()


async def test_a_server_without_cas_will_do() -> None:
    with servers.memcached("-C") as server:
        storage = MemcachedStorage(aiomcache.Client(HOST, server.port))
        assert await storage.store.swap("k", None, b"1", None)
        assert not await storage.store.swap("k", b"other", b"2", None)
        assert await storage.store.swap("k", b"1", b"2", None)
        browser = Browser(storage)
        await browser.set(a=1)
        await browser.set(b=2)
        assert await browser.load() == {"a": 1, "b": 2}
        await browser.do(lambda session: session.invalidate())
        assert await browser.load() == {}
        await storage.finish()


@pytest.mark.parametrize("workers", [1, 20])
async def test_swap_lets_one_of_many_win(storage: MemcachedStorage, workers: int) -> None:
    await storage.store.create("k", b"old", None)
    won = await asyncio.gather(
        *(storage.store.swap("k", b"old", b"%d" % number, None) for number in range(workers))
    )
    assert won.count(True) == 1
    assert await storage.store.read("k") == b"%d" % won.index(True)


async def test_finish_waits_for_a_save_whose_request_is_gone(
    storage: MemcachedStorage, proxy: Proxy
) -> None:
    await storage.store.create("k", b"1", None)
    await storage.store.read("k")
    proxy.hold_requests()
    save = asyncio.ensure_future(storage.store.swap("k", b"1", b"2", None))
    await until(lambda: proxy.held_requests)
    save.cancel()
    finish = asyncio.ensure_future(storage.finish())
    await turns()
    assert not finish.done()
    proxy.resume_requests()
    await finish
    assert await storage.store.read("k") == b"2"


async def test_finish_waits_for_saves_that_began_in_the_same_turn(
    storage: MemcachedStorage, proxy: Proxy
) -> None:
    proxy.fragment = 1  # or the replies would come all at once
    await storage.store.read("k")
    first, second, finish = (
        storage.store.create("a", b"1", None),
        storage.store.create("b", b"2", None),
        storage.finish(),
    )
    await asyncio.gather(first, second, finish)
    proxy.fragment = 2**16
    assert await asyncio.gather(*map(storage.store.read, "ab")) == [b"1", b"2"]


async def test_finish_closes_the_connections_and_use_opens_new_ones(
    storage: MemcachedStorage, proxy: Proxy
) -> None:
    await storage.store.create("k", b"1", None)
    assert proxy.open == 1
    await storage.finish()
    await proxy.settles(0)
    assert await storage.store.read("k") == b"1"
    await storage.finish()
    await storage.finish()


def test_one_storage_serves_several_loops(memcached_server: Server) -> None:
    storage = MemcachedStorage(aiomcache.Client(HOST, memcached_server.port))

    async def serve(loop_name: str) -> None:
        async def user(number: int) -> None:
            key = f"{loop_name}-{number}"
            for turn in range(30):
                await storage.store.create(key, f"{key}-{turn}".encode(), None)
                assert await storage.store.read(key) == f"{key}-{turn}".encode()

        await asyncio.gather(*(user(number) for number in range(5)))

    # Nobody calls finish: the connections close with their loops, or the suite sees a warning.
    failures: list[BaseException] = []

    def thread(name: str) -> None:
        try:
            asyncio.run(serve(name))
            asyncio.run(serve(name))
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=thread, args=(f"thread{number}",)) for number in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failures


@pytest.mark.parametrize("finish", [True, False])
def test_a_loop_that_has_ended_is_forgotten(
    young_heap: None, memcached_server: Server, finish: bool
) -> None:
    storage = MemcachedStorage(aiomcache.Client(HOST, memcached_server.port))
    loops = []

    async def serve() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await storage.store.create("k", b"1", None)
        if finish:
            await storage.finish()

    for _ in range(3):
        asyncio.run(serve())
    gc.collect()
    assert [loop() for loop in loops] == [None] * 3


def test_uvloop(memcached_server: Server) -> None:
    uvloop = pytest.importorskip("uvloop")
    storage = MemcachedStorage(aiomcache.Client(HOST, memcached_server.port))

    async def serve() -> None:
        await storage.store.create("k", b"x" * 200_000, None)
        assert (
            await asyncio.gather(*(storage.store.read("k") for _ in range(3)))
            == [b"x" * 200_000] * 3
        )
        assert await storage.store.swap("k", b"x" * 200_000, b"2", None)
        await storage.finish()

    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(serve())
    finally:
        loop.close()


async def test_client_of_the_users_own_is_called() -> None:
    storage, client = with_fake_client()
    await storage.store.create("k", b"1", None)
    assert client.records == {b"k": b"1"}
    assert await storage.store.read("k") == b"1"
    assert await storage.store.swap("k", b"1", b"2", None)
    assert not await storage.store.swap("none", b"1", b"2", None)
    assert await storage.store.swap("k", b"2", b"3", None)
    assert not await storage.store.swap("k", b"2", b"4", None)
    await storage.store.delete("k")
    assert client.records == {}
    await storage.finish()


async def test_client_of_the_users_own_says_if_another_program_was_faster() -> None:
    storage, client = with_fake_client()
    await storage.store.create("k", b"1", None)
    client.competitors = 1
    assert not await storage.store.swap("k", b"1", b"2", None)
    assert client.records == {b"k": b"1"}
    assert await storage.store.swap("k", b"1", b"3", None)
    assert client.records == {b"k": b"3"}
    assert not await storage.store.swap("k", None, b"4", None)
    assert await storage.store.swap("new", None, b"4", None)


async def test_calls_that_a_subclass_overrides_are_made(memcached_server: Server) -> None:
    class Counting(aiomcache.Client):
        reads = 0

        async def get(self, key: bytes, default: Any = None) -> Any:
            self.reads += 1
            return await super().get(key, default)

    client = Counting(HOST, memcached_server.port)
    storage = MemcachedStorage(client)
    await storage.store.create("k", b"1", None)
    assert await storage.store.read("k") == b"1"
    assert client.reads == 1
    await client.close()


async def test_client_can_be_exchanged_and_its_calls_patched(
    storage: MemcachedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    await storage.store.create("k", b"1", None)

    async def get(key: bytes) -> bytes:
        return b"patched"

    with monkeypatch.context() as patch:
        patch.setattr(storage.conn, "get", get)
        assert await storage.store.read("k") == b"patched"
    assert await storage.store.read("k") == b"1"
    client = storage.conn
    await storage.finish()
    storage.conn = FakeClient()  # type: ignore[assignment]
    assert await storage.store.read("k") is None
    storage.conn = client
    assert await storage.store.read("k") == b"1"
