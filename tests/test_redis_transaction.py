"""Where Redis refuses scripts, a transaction replaces records: it is done once, or has failed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import MaxConnectionsError, NoPermissionError

from aiohttp_session.stores import UnsettledError, _redis_fence, _redis_transaction
from aiohttp_session.stores._redis_cluster import Cluster
from aiohttp_session.stores._redis_pipeline import WRITE
from aiohttp_session.stores.per_loop import PerLoop
from aiohttp_session.stores.redis import RedisStore
from benchmarks.servers import HOST, Server
from tests.held_proxy import HeldProxy
from tests.waiting import PATIENCE, LoopClock

pytestmark = pytest.mark.once  # the store has no twin


@pytest.fixture
async def proxy(redis_server: Server) -> AsyncIterator[HeldProxy]:
    async with HeldProxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture(params=["fenced", "not fenced"])
async def store(
    request: pytest.FixtureRequest, proxy: HeldProxy, direct: Any, loop_clock: LoopClock
) -> AsyncIterator[RedisStore]:
    """A store whose user may not run scripts, and perhaps not close connections."""
    refused = "-@scripting" if request.param == "fenced" else "-@scripting -client"
    await direct.execute_command(*f"ACL SETUSER web on nopass ~* +@all {refused}".split())
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


def is_fenced(request: pytest.FixtureRequest) -> bool:
    return "not fenced" not in request.node.name


def disturb(patch: pytest.MonkeyPatch, before: Any = None, after: Any = None) -> None:
    """Have something happen when a transaction is about to be sent, or done, for once."""
    exchange = _redis_fence.exchange
    is_disturbed = False

    async def exchange_and_disturb(connection: Any, commands: list[bytes]) -> list[Any]:
        nonlocal is_disturbed
        if b"MULTI" not in commands[0] or is_disturbed:
            return await exchange(connection, commands)
        is_disturbed = True
        if before is not None:
            await before()
        replies = await exchange(connection, commands)
        if after is not None:
            await after()
        return replies

    patch.setattr(_redis_transaction, "exchange", exchange_and_disturb)


async def test_a_transaction_that_is_held_is_done_once_or_has_failed(
    request: pytest.FixtureRequest,
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
    accepted = proxy.accepted
    await loop_clock.pass_until(lambda: swap.done() or proxy.accepted > accepted)
    if is_fenced(request):
        assert await swap
        assert await direct.get("k") == b"1"
    else:
        with pytest.raises(ConnectionError, match="be done later"):
            await swap
        assert await direct.get("k") == b"0"
    assert loop_clock() - begun < PATIENCE
    await direct.set("k", b"2")
    proxy.release()
    await asyncio.gather(*(store.read("other") for _ in range(20)))
    assert await direct.get("k") == b"2"


async def test_a_transaction_whose_answer_is_lost_was_done_or_has_failed(
    request: pytest.FixtureRequest,
    store: RedisStore,
    direct: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def lose() -> None:
        raise ConnectionResetError

    disturb(monkeypatch, after=lose)
    swap = store.swap("k", b"0", b"1", 100)
    if is_fenced(request):
        assert await swap
    else:
        with pytest.raises(ConnectionError) as caught:
            await swap
        assert not isinstance(caught.value, UnsettledError)
    assert await direct.get("k") == b"1"


async def test_a_transaction_is_not_done_if_the_record_is_changed_meanwhile(
    store: RedisStore, direct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def change() -> None:
        await direct.set("k", b"2")

    disturb(monkeypatch, before=change)
    assert not await store.swap("k", b"0", b"1", None)
    assert await direct.get("k") == b"2"


async def test_a_transaction_that_is_refused_is_the_servers_error(
    store: RedisStore, direct: Any
) -> None:
    for refused in ("set", "watch"):
        await direct.execute_command("ACL", "SETUSER", "web", f"-{refused}")
        with pytest.raises(NoPermissionError, match=refused):
            await store.swap("k", b"0", b"1", None)
    assert await direct.get("k") == b"0"


async def test_a_transaction_needs_a_connection(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def acquire() -> Any:
        raise MaxConnectionsError("none")

    monkeypatch.setattr(store._servers.get().connections, "acquire", acquire)
    with pytest.raises(MaxConnectionsError):
        await store.swap("k", b"0", b"1", None)


async def test_a_transaction_is_not_done_by_the_client_s_own_methods(store: RedisStore) -> None:
    store._servers.get().connections = None
    with pytest.raises(NotImplementedError, match=r"\+eval"):
        await store.swap("k", b"0", b"1", None)
    store._servers = PerLoop(store._connect)


async def test_a_transaction_needs_a_node_that_has_the_record() -> None:
    client = mock.Mock()
    client.get_node_from_key.side_effect = KeyError
    cluster = Cluster(client, PATIENCE)
    with pytest.raises(ConnectionError, match="No node"):
        cluster.submit_transaction(("k", b"", (client,), WRITE), 0)
