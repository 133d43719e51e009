"""Which clients RedisStorage takes, and the way in which it asks each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any
from unittest import mock

import pytest
from redis import exceptions
from redis.asyncio import Connection, ConnectionPool, Redis, RedisCluster
from valkey.asyncio import Valkey

from aiohttp_session.stores import UnsettledError, _redis_client
from aiohttp_session.stores.redis import RedisStore
from benchmarks.servers import HOST, Server
from tests.proxy import Proxy

BY_METHODS = (
    "Redis is asked by the client's own methods, one operation at a time for each connection: "
)
BY_CONNECTION = "Redis is asked by CountingConnection's own methods, a batch at a time: "


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What was logged about the way in which Redis is asked, as if for the first time."""
    with mock.patch.object(_redis_client, "told", set()), caplog.at_level("INFO"):
        yield caplog


@pytest.fixture
async def direct(redis_server: Server) -> AsyncIterator[Any]:
    async with Redis(host=HOST, port=redis_server.port) as client:
        await client.flushall()
        yield client


async def check(store: RedisStore) -> None:
    """Do each operation, and many at once."""
    await store.create("k", b"1", 100)
    assert await asyncio.gather(*(store.read("k") for _ in range(20))) == [b"1"] * 20
    assert await store.swap("k", b"1", b"2", 100)
    assert await store.swap("k", b"2", b"3", 100)
    assert not await store.swap("k", b"2", b"4", None)
    assert await store.read("k") == b"3"
    await store.delete("k")
    assert await store.read("k") is None
    await store.finish()


class ForeignClient:
    """What looks like redis-py's client, and is none: coredis, say."""

    async def execute_command(self, *args: Any) -> Any:
        raise AssertionError

    get = set = delete = eval = evalsha = execute_command


@pytest.mark.parametrize("thing", [mock.Mock(), mock.AsyncMock(), ForeignClient()])
def test_what_only_looks_like_a_client_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected redis\.asyncio\.Redis got <class"):
        RedisStore(thing)


@pytest.mark.parametrize("kind", [Redis, RedisCluster, Valkey])
def test_a_stand_in_for_a_client_is_taken(kind: type[Any]) -> None:
    RedisStore(mock.AsyncMock(spec=kind))


@pytest.mark.parametrize(
    "options",
    [{}, {"health_check_interval": 1}, {"socket_timeout": 2}, {"socket_timeout": None}],
    ids=str,
)
async def test_the_fast_way_is_no_news(
    redis_server: Server, told: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    async with Redis(host=HOST, port=redis_server.port, **options) as client:
        store = RedisStore(client, timeout=10)
        await store.read("k")
        assert store._servers.get()._pipeline is not None
        await check(store)
    assert told.messages == []


async def test_a_replaced_method_is_used_and_told(
    redis_server: Server, direct: Any, told: pytest.LogCaptureFixture
) -> None:
    commands = []
    await direct.script_flush()

    async def traced(self: Any, *args: Any, **options: Any) -> Any:
        commands.append(args[0])
        return await execute_command(self, *args, **options)  # type: ignore[no-untyped-call]

    execute_command = Redis.execute_command
    with mock.patch.object(Redis, "execute_command", traced):
        async with Redis(host=HOST, port=redis_server.port) as client:
            await check(RedisStore(client))
            await check(RedisStore(client))
    assert [commands.count(name) for name in ("SET", "EVALSHA", "EVAL")] == [3, 6, 1]
    assert told.messages == [BY_METHODS + "its execute_command() is not the library's own"]


class CountingConnection(Connection):
    """A connection with a way of its own, which a storage must not go around."""

    sent = 0

    async def send_packed_command(self, *args: Any, **options: Any) -> None:
        CountingConnection.sent += 1
        await super().send_packed_command(*args, **options)


async def test_a_connection_class_of_ones_own_is_used_and_told(
    redis_server: Server, told: pytest.LogCaptureFixture
) -> None:
    pool = ConnectionPool(CountingConnection, host=HOST, port=redis_server.port)
    async with Redis.from_pool(pool) as client:
        store = RedisStore(client)
        await check(store)
        before = CountingConnection.sent
        await asyncio.gather(*(store.read("k") for _ in range(50)))
        assert CountingConnection.sent == before + 1
        await client.lpush("list", "x")
        with pytest.raises(exceptions.ResponseError, match="WRONGTYPE"):
            await store.read("list")
        await client.delete("list")
    assert told.messages == [BY_CONNECTION + "they are not the library's"]


async def test_a_connection_class_of_ones_own_that_is_cut_harms_no_read(
    redis_server: Server, direct: Any
) -> None:
    async with Proxy(redis_server.port) as proxy:
        pool = ConnectionPool(CountingConnection, host=HOST, port=proxy.port)
        async with Redis.from_pool(pool) as client:
            store = RedisStore(client, timeout=5)
            await store.create("k", b"1", 100)
            assert await store.swap("k", b"1", b"1", 100)
            proxy.hold()
            passed = proxy.passed
            write = asyncio.ensure_future(store.swap("k", b"1", b"2", 50))
            read = asyncio.ensure_future(store.read("k"))
            while proxy.passed == passed:  # noqa: ASYNC110
                await asyncio.sleep(0)
            while await direct.get("k") != b"2":
                pass
            await proxy.cut()
            proxy.resume()
            with pytest.raises(UnsettledError):
                await write
            assert await read == b"2"


async def test_a_small_pool_is_told(redis_server: Server, told: pytest.LogCaptureFixture) -> None:
    async with Redis(host=HOST, port=redis_server.port, max_connections=2) as client:
        await check(RedisStore(client))
    assert told.messages == ["Redis is asked a batch at a time: its pool has only 2 connections"]


async def test_a_swap_needs_no_scripting(
    redis_server: Server, direct: Any, told: pytest.LogCaptureFixture
) -> None:
    await direct.acl_setuser(
        "web",
        enabled=True,
        nopass=True,
        keys=["*"],
        categories=["+@all", "-@scripting"],
    )
    async with Redis(host=HOST, port=redis_server.port, username="web", password="x") as client:
        await check(RedisStore(client))
        store = RedisStore(client)
        await direct.set("k", b"1")
        swaps = [store.swap("k", b"1", b"%d" % n, None) for n in (5, 6)]
        assert sorted(await asyncio.gather(*swaps)) == [False, True]
        assert await direct.ttl("k") == -1
        await direct.delete("k")
        await direct.lpush("k", "x")
        with pytest.raises(exceptions.ResponseError, match="WRONGTYPE"):
            await store.swap("k", b"1", b"2", None)
    await direct.acl_deluser("web")
    assert [message for message in told.messages if "Redis refuses EVAL" not in message] == []
    assert len(told.messages) == 1


def test_a_pool_that_is_not_the_librarys_is_left_to_the_client() -> None:
    client: Any = Redis()
    client.connection_pool = mock.Mock()
    assert _redis_client.why_not_plain(client) == "its connection pool is not the library's own"


@pytest.mark.parametrize("trouble", ["raises", "hangs"])
async def test_a_client_that_cannot_close_a_connection_holds_up_nobody(
    redis_server: Server, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    class Broken(Connection):
        async def disconnect(self, nowait: bool = False, *args: Any, **options: Any) -> None:
            await super().disconnect(nowait, *args, **options)
            if trouble == "hangs":
                await asyncio.Event().wait()
            if nowait:
                raise TypeError("disconnect() got an unexpected keyword argument 'nowait'")

    monkeypatch.setattr(_redis_client, "_CLOSING", 0.01)
    async with Proxy(redis_server.port) as proxy:
        pool = ConnectionPool(Broken, host=HOST, port=proxy.port)
        store = RedisStore(Redis(connection_pool=pool))
        await store.create("k", b"1", 100)
        proxy.hold()
        passed = proxy.passed
        reads = [asyncio.ensure_future(store.read("k")) for _ in range(3)]
        while proxy.passed == passed:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await proxy.cut()
        proxy.resume()
        assert await asyncio.gather(*reads) == [b"1"] * 3
        await store.finish()
        assert len(pool._in_use_connections) == 0
        trouble = ""
        await pool.disconnect()
