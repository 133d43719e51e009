"""Where Redis refuses scripts, a transaction replaces records."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any
from unittest import mock

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import MaxConnectionsError, NoPermissionError, ResponseError

from aiohttp_session.stores import UnsettledError, _redis_client, _redis_transaction
from aiohttp_session.stores._redis_cluster import Cluster
from aiohttp_session.stores._redis_pipeline import WRITE
from aiohttp_session.stores.per_loop import PerLoop
from aiohttp_session.stores.redis import RedisStore
from benchmarks.servers import HOST, Server
from tests.held_proxy import HeldProxy
from tests.waiting import PATIENCE, LoopClock

pytestmark = pytest.mark.once  # the store has no twin


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What was logged about the way in which Redis is asked, as if for the first time."""
    with mock.patch.object(_redis_client, "told", set()), caplog.at_level("INFO"):
        yield caplog


@pytest.fixture
async def proxy(redis_server: Server) -> AsyncIterator[HeldProxy]:
    async with HeldProxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
async def store(proxy: HeldProxy, direct: Any, loop_clock: LoopClock) -> AsyncIterator[RedisStore]:
    """A store whose user may not run scripts."""
    rights = ("+@all", "-@scripting")
    await direct.execute_command("ACL", "SETUSER", "web", "on", "nopass", "~*", *rights)
    retry = Retry(NoBackoff(), 0)
    async with Redis(
        host=HOST, port=proxy.port, username="web", retry=retry, socket_timeout=None
    ) as client:
        store = RedisStore(client, timeout=PATIENCE)
        await direct.set("k", b"0")
        assert await store.swap("k", b"0", b"0", None)
        yield store
        await store.finish()
    await direct.acl_deluser("web")


def disturb(
    patch: pytest.MonkeyPatch, *, at: bytes = b"EXEC", before: Any = None, after: Any = None
) -> None:
    """Have something happen when a transaction is about to be sent, or done, for once."""
    exchange = _redis_transaction.exchange
    is_disturbed = False

    async def exchange_and_disturb(connection: Any, commands: list[bytes]) -> list[Any]:
        nonlocal is_disturbed
        if at not in commands[-1] or is_disturbed:
            return await exchange(connection, commands)
        is_disturbed = True
        if before is not None:
            await before()
        replies = await exchange(connection, commands)
        if after is not None:
            await after()
        return replies

    patch.setattr(_redis_transaction, "exchange", exchange_and_disturb)


async def test_a_swap_is_a_transaction_from_the_first_refusal_on(
    store: RedisStore, direct: Any, told: pytest.LogCaptureFixture
) -> None:
    await direct.config_resetstat()
    assert await store.swap("k", b"0", b"1", 100)
    assert 0 < await direct.ttl("k") <= 100
    assert not await store.swap("k", b"0", b"2", None)
    assert await store.swap("k", b"1", b"2", None)
    assert (await direct.get("k"), await direct.ttl("k")) == (b"2", -1)
    stats = await direct.info("commandstats")
    assert "cmdstat_evalsha" not in stats
    assert stats["cmdstat_multi"]["calls"] == stats["cmdstat_exec"]["calls"] == 2
    (record,) = [*told.get_records("setup"), *told.records]
    assert record.levelname == "INFO"
    assert "Redis refuses EVALSHA" in record.getMessage()


async def test_one_of_many_transactions_at_once_wins(store: RedisStore, direct: Any) -> None:
    won = await asyncio.gather(*(store.swap("k", b"0", b"1%d" % n, None) for n in range(20)))
    assert won.count(True) == 1
    assert await direct.get("k") == b"1%d" % won.index(True)


async def test_a_transaction_that_is_held_is_unsettled_and_does_not_undo_a_later_write(
    proxy: HeldProxy,
    store: RedisStore,
    direct: Any,
    loop_clock: LoopClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def hold() -> None:
        proxy.hold_requests()

    disturb(monkeypatch, before=hold)
    begun = loop_clock()
    swap = asyncio.ensure_future(store.swap("k", b"0", b"1", 100))
    await proxy.holds(b"EXEC")
    await loop_clock.pass_until(swap.done)
    with pytest.raises(UnsettledError):
        await swap
    assert await direct.get("k") == b"0"
    assert loop_clock() - begun < PATIENCE
    assert await store.swap("k", b"0", b"2", None)
    proxy.release()
    await asyncio.gather(*(store.read("other") for _ in range(20)))
    assert await direct.get("k") == b"2"


async def test_a_transaction_whose_answer_is_lost_is_unsettled(
    store: RedisStore, direct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose() -> None:
        raise ConnectionResetError

    disturb(monkeypatch, after=lose)
    with pytest.raises(UnsettledError, match="unknown whether the write was applied"):
        await store.swap("k", b"0", b"1", 100)
    assert await direct.get("k") == b"1"
    assert not await store.swap("k", b"0", b"1", 100)


async def test_a_transaction_is_not_done_if_the_record_is_changed_meanwhile(
    store: RedisStore, direct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def change() -> None:
        await direct.set("k", b"2")

    disturb(monkeypatch, before=change)
    assert not await store.swap("k", b"0", b"1", None)
    assert await direct.get("k") == b"2"


async def test_a_transaction_whose_write_is_refused_is_the_servers_error(
    store: RedisStore, direct: Any
) -> None:
    await direct.execute_command("ACL", "SETUSER", "web", "-set")
    with pytest.raises(NoPermissionError, match="set"):
        await store.swap("k", b"0", b"1", None)
    assert await direct.get("k") == b"0"


async def test_a_transaction_that_fails_for_another_reason_is_not_done_without_watch(
    store: RedisStore, direct: Any, told: pytest.LogCaptureFixture
) -> None:
    await direct.config_set("min-replicas-to-write", "1")
    try:
        with pytest.raises(ResponseError, match="NOREPLICAS"):
            await store.swap("k", b"0", b"1", None)
    finally:
        await direct.config_set("min-replicas-to-write", "0")
    await direct.lpush("list", "x")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await store.swap("list", b"0", b"1", None)
    await direct.config_resetstat()
    assert await store.swap("k", b"0", b"1", None)
    assert "cmdstat_exec" in await direct.info("commandstats")
    assert "WARNING" not in [record.levelname for record in told.records]


async def test_a_transaction_needs_a_connection(
    store: RedisStore, direct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def acquire() -> Any:
        raise MaxConnectionsError("none")

    with monkeypatch.context() as patch:
        patch.setattr(store._servers.get().connections, "acquire", acquire)
        with pytest.raises(MaxConnectionsError):
            await store.swap("k", b"0", b"1", None)
    await direct.config_resetstat()
    assert await store.swap("k", b"0", b"1", None)
    assert "cmdstat_exec" in await direct.info("commandstats")


async def test_where_watch_is_refused_a_record_is_read_and_set(
    store: RedisStore, direct: Any, told: pytest.LogCaptureFixture
) -> None:
    await direct.execute_command("ACL", "SETUSER", "web", "-watch")
    assert await store.swap("k", b"0", b"1", 100)
    assert not await store.swap("k", b"0", b"2", None)
    assert await direct.get("k") == b"1"
    warnings = [record.getMessage() for record in told.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "one may undo the other" in warnings[0]


async def test_where_multi_is_refused_nothing_is_written_outside_a_transaction(
    store: RedisStore, direct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await direct.execute_command("ACL", "SETUSER", "web", "-multi")

    async def change() -> None:
        await direct.set("k", b"2")

    disturb(monkeypatch, at=b"MULTI", before=change)
    assert not await store.swap("k", b"0", b"1", None)
    assert await direct.get("k") == b"2"
    assert await store.swap("k", b"2", b"3", None)


async def test_a_transaction_is_not_done_by_the_client_s_own_methods(
    store: RedisStore, direct: Any, told: pytest.LogCaptureFixture
) -> None:
    store._servers.get().connections = None
    with pytest.raises(NotImplementedError, match="no transactions"):
        store._servers.get().submit_transaction(("k", b"", (), WRITE), 0)
    assert await store.swap("k", b"0", b"1", None)
    assert not await store.swap("k", b"0", b"2", None)
    assert await direct.get("k") == b"1"
    assert [record.levelname for record in told.records].count("WARNING") == 1
    store._servers = PerLoop(store._connect)


async def test_a_transaction_needs_a_node_that_has_the_record() -> None:
    client = mock.Mock()
    client.get_node_from_key.side_effect = KeyError
    cluster = Cluster(client, PATIENCE)
    with pytest.raises(ConnectionError, match="No node"):
        cluster.submit_transaction(("k", b"", (client,), WRITE), 0)
