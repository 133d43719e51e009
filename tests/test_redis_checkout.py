"""Operations on Redis whose connection is lost, or silent, have time left for another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from aiohttp_session.stores import UnsettledError
from aiohttp_session.stores._redis_checkout import Checkout
from aiohttp_session.stores._redis_pipeline import PipelinedConnection
from aiohttp_session.stores.redis import RedisStore
from benchmarks.servers import HOST, Server
from tests.held_proxy import HeldProxy
from tests.waiting import PATIENCE, LoopClock, turns, until

pytestmark = pytest.mark.once  # the store has no twin


@pytest.fixture
async def proxy(redis_server: Server) -> AsyncIterator[HeldProxy]:
    async with HeldProxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: HeldProxy) -> AsyncIterator[Any]:
    """A client that has three connections."""
    async with Redis(
        host=HOST, port=proxy.port, retry=Retry(NoBackoff(), 0), socket_timeout=None
    ) as client:
        await client.flushall()
        await asyncio.gather(*(client.set(f"k{number}", b"0") for number in range(3)))
        assert proxy.accepted == 3
        yield client


@pytest.fixture
async def store(client: Any, loop_clock: LoopClock) -> RedisStore:
    """A store whose pipelined connection is open; it has a minute, by the clock of the test."""
    store = RedisStore(client, timeout=PATIENCE)
    assert await store.read("k0") == b"0"
    return store


def end_before_anything_is_sent(times: int, patch: pytest.MonkeyPatch) -> None:
    """Have the server close connections at the moment when they are taken."""
    prepare = Checkout._prepare
    left = [None] * times

    async def prepare_and_end(checkout: Checkout, connection: Any) -> None:
        await prepare(checkout, connection)
        if left:
            left.pop()
            connection._reader.feed_eof()

    patch.setattr(Checkout, "_prepare", prepare_and_end)


@pytest.mark.parametrize("times", [1, 2])
async def test_what_was_not_sent_is_sent_by_another_connection(
    client: Any, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """It was queued again behind the batch that waited for it, until its time was up."""
    store = RedisStore(client)
    end_before_anything_is_sent(times, monkeypatch)
    await asyncio.gather(
        store.swap("k0", b"0", b"1", None), store.create("new", b"1", None), store.read("k1")
    )
    assert [await client.get(key) for key in ("k0", "new")] == [b"1"] * 2


async def test_when_one_connection_is_silent_those_that_were_idle_are_not_relied_upon(
    proxy: HeldProxy, store: RedisStore, loop_clock: LoopClock
) -> None:
    proxy.hold_requests()  # on all that are open: a network that has forgotten them
    begun, before = loop_clock(), proxy.accepted
    swap = asyncio.ensure_future(store.swap("k1", b"0", b"1", None))
    read = asyncio.ensure_future(store.read("k0"))
    await loop_clock.pass_until(lambda: proxy.accepted > before)
    assert await read == b"0"
    with pytest.raises(UnsettledError):
        await swap
    assert await store.swap("k1", b"0", b"1", None)
    assert loop_clock() - begun < 0.75 * PATIENCE


async def test_a_second_connection_that_is_silent_leaves_time_for_a_third(
    proxy: HeldProxy, store: RedisStore, loop_clock: LoopClock
) -> None:
    proxy.hold_requests()
    begun, before = loop_clock(), proxy.accepted
    read = asyncio.ensure_future(store.read("k0"))
    await loop_clock.pass_until(lambda: proxy.accepted == before + 1)
    proxy.hold_requests()
    await loop_clock.pass_until(lambda: proxy.accepted == before + 2)
    assert await read == b"0"
    assert loop_clock() - begun < PATIENCE


async def test_a_connection_that_falls_silent_in_a_batch_leaves_time_for_another(
    proxy: HeldProxy, client: Any, loop_clock: LoopClock
) -> None:
    store = RedisStore(client, timeout=PATIENCE)
    proxy.hold_requests()
    begun, before = loop_clock(), proxy.accepted
    operations = asyncio.gather(store.read("k0"), store.read("k1"))
    await loop_clock.pass_until(lambda: proxy.accepted > before)
    assert [*await operations] == [b"0"] * 2
    assert loop_clock() - begun < 0.5 * PATIENCE


async def test_two_batches_whose_connection_falls_silent_leave_time_for_a_third(
    proxy: HeldProxy, client: Any, loop_clock: LoopClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RedisStore(client, timeout=PATIENCE)
    prepare = Checkout._prepare
    prepared = 0

    async def prepare_and_hold(checkout: Checkout, connection: Any) -> None:
        nonlocal prepared
        await prepare(checkout, connection)
        prepared += 1
        if prepared <= 2:
            proxy.hold_requests()

    monkeypatch.setattr(Checkout, "_prepare", prepare_and_hold)
    begun = loop_clock()
    read = asyncio.ensure_future(store.read("k0"))
    for number in (1, 2):
        await until(lambda number=number: prepared == number)  # type: ignore[misc]
        accepted = proxy.accepted
        await loop_clock.pass_until(lambda accepted=accepted: proxy.accepted > accepted)  # type: ignore[misc]
    assert await read == b"0"
    assert loop_clock() - begun < 0.9 * PATIENCE


async def test_finish_waits_for_a_connection_that_takes_no_more(
    proxy: HeldProxy, client: Any, store: RedisStore
) -> None:
    pipeline = store._servers.get()._pipeline
    assert pipeline is not None
    proxy.hold_requests()
    read = store.read("k0")
    await proxy.holds(b"k0")
    pipeline.leave()
    finish = asyncio.ensure_future(store.finish())
    await turns(20)
    assert not finish.done()
    proxy.release()
    await finish
    assert await read == b"0"
    assert not client.connection_pool._in_use_connections


@pytest.mark.parametrize("times", [1, 2])
async def test_a_connection_lost_before_it_is_used_is_replaced_once(
    client: Any, store: RedisStore, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    checkout = store._servers.get()._checkout
    lost = [RedisConnectionError("lost")] * times

    async def lose(connection: Any) -> None:
        if lost:
            raise lost.pop()
        await Checkout._prepare(checkout, connection)

    monkeypatch.setattr(checkout, "_prepare", lose)
    if times == 1:
        connection = await checkout.take()
        await checkout.give_back(connection, is_clean=True)
    else:
        with pytest.raises(RedisConnectionError, match="lost"):
            await checkout.take()
    assert not lost
    await store.finish()
    assert not client.connection_pool._in_use_connections


async def test_a_connection_that_is_none_is_taken_as_it_is() -> None:
    """As a fake's is."""

    class Fakes:
        limit = 1

        async def acquire(self) -> str:
            return "fake"

        async def release(self, connection: str) -> None:
            pass

    fakes: Any = Fakes()
    checkout = Checkout(fakes, PATIENCE)
    checkout.distrust(0)
    assert await checkout.take() == "fake"
    await checkout.give_back("fake", is_clean=True)


def lose_replies(times: int, patch: pytest.MonkeyPatch) -> None:
    """Have connections break when the reply to what was done comes."""
    hand_out = PipelinedConnection._hand_out
    left = [None] * times

    def lose(connection: PipelinedConnection, data: bytes) -> int:
        if left:
            left.pop()
            raise ConnectionResetError
        return hand_out(connection, data)

    patch.setattr(PipelinedConnection, "_hand_out", lose)


@pytest.mark.parametrize(
    ("write", "key"),
    [
        (lambda store: store.create("new", b"1", None), "new"),
        (lambda store: store.swap("new", None, b"1", None), "new"),
        (lambda store: store.swap("k0", b"0", b"1", None), "k0"),
    ],
)
async def test_a_write_that_loses_its_connection_is_not_sent_again(
    store: RedisStore,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[RedisStore], Awaitable[bool | None]],
    key: str,
) -> None:
    assert not await store.swap("k0", b"other", b"1", None)  # so the script is loaded
    lose_replies(1, monkeypatch)
    with pytest.raises(UnsettledError):
        await write(store)
    assert await store.read(key) == b"1"


async def test_a_deletion_that_loses_its_connections_again_and_again_is_done(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_replies(3, monkeypatch)
    await store.delete("k0")
    assert await store.read("k0") is None


async def test_a_deletion_that_loses_its_connections_for_ever_has_failed(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_replies(4, monkeypatch)
    with pytest.raises(UnsettledError):
        await store.delete("k0")
