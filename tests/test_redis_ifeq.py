"""RedisStore on a server that supports SET IFEQ: Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any
from unittest import mock

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from valkey.asyncio import Valkey

from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.stores import UnsettledError, _redis_client
from aiohttp_session.stores.redis import RedisStore
from benchmarks import servers
from benchmarks.servers import HOST, Server
from tests.held_proxy import HeldProxy
from tests.redis_swaps import Commands, check_swaps
from tests.waiting import PATIENCE

NO_RETRY = Retry(NoBackoff(), 0)


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What was logged about the way in which Redis is asked, as if for the first time."""
    with mock.patch.object(_redis_client, "told", set()), caplog.at_level("INFO"):
        yield caplog


@pytest.fixture(scope="module")
def valkey_server() -> Iterator[Server]:
    try:
        with servers.valkey() as server:
            yield server
    except servers.MissingServerError as error:
        pytest.skip(str(error))


@pytest.fixture
async def valkey(valkey_server: Server) -> AsyncIterator[Any]:
    """A client that sees what is stored in Valkey."""
    async with Redis(host=HOST, port=valkey_server.port, retry=NO_RETRY) as client:
        await client.flushall()
        await client.config_resetstat()
        yield client


@pytest.mark.parametrize("kind", [Redis, Valkey])
@pytest.mark.parametrize("options", [{}, {"single_connection_client": True}, {"protocol": 3}])
async def test_where_the_server_supports_ifeq_that_is_all_that_is_sent(
    valkey_server: Server, valkey: Any, kind: Any, options: dict[str, Any]
) -> None:
    client: Any = kind(host=HOST, port=valkey_server.port, **options)
    store = RedisStore(client)
    await store.create("k", b"0", None)
    await valkey.config_resetstat()
    assert await store.swap("k", b"0", b"1", 100) is True
    assert await store.swap("k", b"0", b"2", 100) is False
    assert await Commands(valkey).seen() == {"set": (2, 0)}
    assert await valkey.get("k") == b"1"
    await check_swaps(store, valkey)
    assert not {"eval", "evalsha"} & (await Commands(valkey).seen()).keys()
    await valkey.lpush("list", "x")
    with pytest.raises(Exception, match="WRONGTYPE"):
        await store.swap("list", b"0", b"1", None)
    await client.aclose()


async def test_a_user_of_a_server_that_supports_ifeq_needs_get_and_set_alone(
    valkey_server: Server, valkey: Any, told: pytest.LogCaptureFixture
) -> None:
    servers.ask(valkey_server, "ACL SETUSER web reset on nopass ~* +get +set")
    async with Redis(host=HOST, port=valkey_server.port, username="web") as client:
        await check_swaps(RedisStore(client), valkey)
    await valkey.acl_deluser("web")
    assert told.messages == []


@pytest.mark.parametrize("later", [b"2", None])
async def test_ifeq_that_is_held_is_unsettled_and_does_not_undo_a_later_write(
    valkey_server: Server, valkey: Any, later: bytes | None
) -> None:
    async with (
        HeldProxy(valkey_server.port) as proxy,
        Redis(host=HOST, port=proxy.port, retry=NO_RETRY) as client,
    ):
        store = RedisStore(client, timeout=PATIENCE)
        await store.create("k", b"0", None)
        await store.read("k")
        proxy.hold_requests()
        swap = asyncio.ensure_future(store.swap("k", b"0", b"1", None))
        await proxy.holds(b"IFEQ")
        proxy.cut_held()
        with pytest.raises(UnsettledError):
            await swap
        if later is None:
            await store.delete("k")
        else:
            assert await store.swap("k", b"0", later, None)
        proxy.release()
        for _ in range(20):
            await store.read("k")
        assert await valkey.get("k") == later
        await store.finish()


async def test_what_is_swapped_by_ifeq_is_kept_near_and_changes_are_heard_of(
    valkey_server: Server, valkey: Any
) -> None:
    async with Redis(host=HOST, port=valkey_server.port) as client:
        storage = RedisStorage(client, near_cache=100)
        near: Any = storage.store
        await near.read_latest("k")
        await near.read_latest("k")
        await near.create("k", b"0", None)
        for n in range(1, 4):
            assert await near.swap("k", b"%d" % (n - 1), b"%d" % n, None)
            hits = near.near_cache_info().hits
            assert await near.read("k") == b"%d" % n
            assert near.near_cache_info().hits == hits + 1
        assert not await near.swap("k", b"0", b"1", None)
        assert await near.read("k") == b"3"
        assert await valkey.execute_command("SET", "k", b"4", "IFEQ", b"3")
        await near.read_latest("k")
        assert await near.read("k") == b"4"
        await storage.finish()


async def test_each_client_finds_out_for_itself(
    redis_server: Server, direct: Any, valkey_server: Server, valkey: Any
) -> None:
    for server in (redis_server, valkey_server, redis_server, valkey_server):
        async with Redis(host=HOST, port=server.port) as client:
            store = RedisStore(client)
            await client.set("k", b"0")
            await valkey.config_resetstat()
            assert await store.swap("k", b"0", b"1", None)
            if server is valkey_server:
                assert await Commands(valkey).seen() == {"set": (1, 0)}
            await store.finish()


async def test_a_server_that_is_replaced_by_an_older_one_is_asked_in_its_way(
    valkey_server: Server,
) -> None:
    port = servers.free_port()
    async with Redis(host=HOST, port=port, retry=NO_RETRY) as client:
        store = RedisStore(client)
        for start in (servers.valkey, servers.redis, servers.valkey):
            with start(port=port):
                await check_swaps(store, client)
                await client.connection_pool.disconnect()
