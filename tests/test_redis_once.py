"""Each write to Redis is done once, or known to have failed; and never late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from aiohttp_session._core import write_command
from aiohttp_session.stores import UnsettledError, _redis_fence
from aiohttp_session.stores import redis as redis_store
from aiohttp_session.stores._redis_pipeline import WRITE
from aiohttp_session.stores.per_loop import PerLoop
from aiohttp_session.stores.redis import RedisStore
from benchmarks import servers
from benchmarks.servers import HOST, Server
from tests.held_proxy import HeldProxy
from tests.waiting import PATIENCE, LoopClock

LARGE = b"x" * 50_000


@pytest.fixture
async def proxy(redis_server: Server) -> AsyncIterator[HeldProxy]:
    async with HeldProxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: HeldProxy, direct: Any) -> AsyncIterator[Any]:
    async with Redis(host=HOST, port=proxy.port, retry=Retry(NoBackoff(), 0)) as client:
        yield client


@pytest.fixture
async def store(client: Any) -> RedisStore:
    """A store whose pipelined connection is open."""
    store = RedisStore(client, timeout=PATIENCE)
    await store.read("other")
    return store


Write = Callable[[RedisStore], Awaitable[Any]]
WRITES: dict[str, Write] = {
    "create": lambda store: store.create("k", b"1", 100),
    "update": lambda store: store.update("k", b"1", 100),
    "swap": lambda store: store.swap("k", b"0", b"1", 100),
    "delete": lambda store: store.delete("k"),
}


def begin(store: RedisStore, write: Write) -> asyncio.Future[Any]:
    return asyncio.ensure_future(write(store))


async def stall(proxy: HeldProxy, store: RedisStore) -> None:
    """Hold what is under way until its connection is given up, as when it has stalled."""
    await proxy.holds(b"k")
    server = store._servers.get()
    if server._pipeline is not None:
        server._pipeline.give_up()


async def undisturbed(store: RedisStore) -> None:
    """Wait until what the network holds would have been done if it ever were."""
    for _ in range(20):
        await store.read("other")


@pytest.mark.parametrize("write", ["create", "update"])
async def test_a_write_that_is_held_is_never_done_and_its_waiter_is_told(
    proxy: HeldProxy, store: RedisStore, direct: Any, write: str
) -> None:
    await direct.set("k", b"0")
    proxy.hold_requests()
    writing = begin(store, WRITES[write])
    await stall(proxy, store)
    with pytest.raises(UnsettledError):
        await writing
    await store.update("k", b"2", None)
    proxy.release()
    await undisturbed(store)
    assert await direct.get("k") == b"2"


async def test_a_swap_that_is_held_is_done_once_by_another_connection(
    proxy: HeldProxy, store: RedisStore, direct: Any
) -> None:
    await direct.set("k", b"0")
    proxy.hold_requests()
    writing = begin(store, WRITES["swap"])
    await stall(proxy, store)
    assert await writing
    assert await store.swap("k", b"1", b"0", 100)
    proxy.release()
    await undisturbed(store)
    assert await direct.get("k") == b"0"


async def test_a_deletion_that_is_held_is_done_once_by_another_connection(
    proxy: HeldProxy, store: RedisStore, direct: Any
) -> None:
    await direct.set("k", b"0")
    proxy.hold_requests()
    writing = begin(store, WRITES["delete"])
    await stall(proxy, store)
    await writing
    assert await direct.get("k") is None
    await direct.set("k", b"1")
    proxy.release()
    await undisturbed(store)
    assert await direct.get("k") == b"1"


@pytest.mark.parametrize("write", WRITES)
async def test_a_write_whose_reply_is_lost_was_done(
    proxy: HeldProxy, store: RedisStore, direct: Any, write: str
) -> None:
    await direct.set("k", b"0")
    proxy.hold()
    passed = proxy.passed
    writing = begin(store, WRITES[write])
    while proxy.passed == passed:  # noqa: ASYNC110
        await asyncio.sleep(0)
    while await direct.get("k") == b"0":
        pass
    if write in ("create", "update"):
        await direct.persist("k")  # as if only its TTL had been missing
    await proxy.cut()
    proxy.resume()
    assert await writing in (None, True)
    assert await direct.get("k") == (None if write == "delete" else b"1")
    assert (await direct.ttl("k") > 0) is (write != "delete")


@pytest.mark.parametrize("write", ["create", "update", "swap"])
async def test_a_write_that_was_done_and_changed_by_another_is_unsettled(
    proxy: HeldProxy, store: RedisStore, direct: Any, write: str
) -> None:
    await direct.set("k", b"0")
    proxy.hold()
    writing = begin(store, WRITES[write])
    while await direct.get("k") != b"1":  # noqa: ASYNC110
        await asyncio.sleep(0)
    await direct.set("k", b"2")
    await proxy.cut()
    proxy.resume()
    with pytest.raises(UnsettledError):
        await writing
    assert await direct.get("k") == b"2"


@pytest.mark.parametrize("write", WRITES)
async def test_what_nobody_waits_for_is_not_sent_again(
    proxy: HeldProxy, store: RedisStore, direct: Any, write: str
) -> None:
    await direct.set("k", b"0")
    proxy.hold_requests()
    abandoned = begin(store, WRITES[write])
    await proxy.holds(b"k")
    abandoned.cancel()
    later = begin(store, lambda store: store.swap("k", b"0", b"2", None))
    await asyncio.sleep(0)
    await stall(proxy, store)
    assert await later
    proxy.release()
    await undisturbed(store)
    assert await direct.get("k") == b"2"


async def test_a_write_does_not_overtake_one_that_nobody_waits_for(
    proxy: HeldProxy, store: RedisStore, direct: Any
) -> None:
    await direct.set("k", b"0")
    await store.update("k", LARGE, None)  # by a connection of its own
    proxy.hold_requests()
    abandoned = begin(store, lambda store: store.update("k", LARGE, None))
    await proxy.holds(b"k")
    abandoned.cancel()
    small = begin(store, lambda store: store.update("k", b"2", None))
    await asyncio.sleep(0)
    proxy.release()
    assert await small
    await store.finish()
    assert await direct.get("k") == b"2"


async def test_a_large_write_that_is_given_up_is_never_done(
    proxy: HeldProxy, client: Any, direct: Any, loop_clock: LoopClock
) -> None:
    store = RedisStore(client, timeout=PATIENCE)
    await store.read("other")
    await direct.set("k", b"0")
    await store.update("k", LARGE, None)  # by a connection of its own
    await direct.set("k", b"0")
    proxy.hold_requests()
    given_up = begin(store, lambda store: store.update("k", LARGE, None))
    await proxy.holds(b"k")
    await loop_clock.pass_until(given_up.done)
    with pytest.raises((OSError, exceptions.RedisError)):  # the client's own limit may be first
        await given_up
    assert await store.update("k", b"2", None)
    proxy.release()
    await undisturbed(store)
    assert await direct.get("k") == b"2"


async def test_a_write_that_was_not_sent_is_sent_by_another_connection(
    store: RedisStore, direct: Any
) -> None:
    server = store._servers.get()
    pipeline = server._pipeline
    pipeline.give_up()
    operation = ("k", write_command(b"SET", b"k", b"1"), (), WRITE)
    cancelled = pipeline.submit(("k", write_command(b"SET", b"k", b"2"), (), WRITE))
    cancelled.cancel()
    assert await pipeline.submit(operation) == b"OK"
    await store.finish()
    assert await direct.get("k") == b"1"


async def test_a_server_that_is_gone_leaves_the_fate_of_a_write_unknown(
    proxy: HeldProxy, store: RedisStore
) -> None:
    proxy.hold_requests()
    writing = begin(store, WRITES["create"])
    await proxy.holds(b"k")
    await proxy.refuse()
    with pytest.raises(exceptions.ConnectionError) as caught:
        await writing
    assert not isinstance(caught.value, UnsettledError)


async def test_a_write_for_which_there_is_no_connection_was_not_done(
    client: Any, direct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RedisStore(client)

    async def acquire() -> Any:
        raise exceptions.MaxConnectionsError("none")

    monkeypatch.setattr(store._servers.get().connections, "acquire", acquire)
    with pytest.raises(exceptions.MaxConnectionsError):
        await store.create("k", b"1", None)
    assert await direct.get("k") is None


async def test_a_batch_that_is_cancelled_is_fenced(
    proxy: HeldProxy, store: RedisStore, direct: Any
) -> None:
    await store.update("k", LARGE, None)  # opens a connection of its own
    await direct.set("k", b"0")
    proxy.hold_requests()
    abandoned = begin(store, lambda store: store.update("k", LARGE, None))
    await proxy.holds(b"k")
    server = store._servers.get()
    assert server._pipeline is not None
    for worker in server._batch._deadlines:
        worker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    await server._batch.finish()
    assert server._pipeline is None  # the next one puts up the fence first
    assert await store.update("k", b"2", None)
    proxy.release()
    await undisturbed(store)
    assert await direct.get("k") == b"2"


@pytest.mark.parametrize(
    ("commands", "error"),
    [
        (["+client"], UnsettledError),
        (["+client|id", "+client|kill"], UnsettledError),  # as before Redis 6.2
        (["+client|id", "+client|info"], ConnectionError),
    ],
)
async def test_a_fence_needs_an_id_and_to_kill(
    proxy: HeldProxy, direct: Any, commands: list[str], error: type[Exception]
) -> None:
    commands = [*commands, "+get", "+set", "+del", "+eval"]
    await direct.acl_setuser("web", enabled=True, passwords=["+x"], keys=["*"], commands=commands)
    retry = Retry(NoBackoff(), 0)
    async with Redis(
        host=HOST, port=proxy.port, username="web", password="x", retry=retry
    ) as client:
        store = RedisStore(client)
        await store.read("other")
        proxy.hold_requests()
        writing = begin(store, WRITES["create"])
        await stall(proxy, store)
        with pytest.raises(ConnectionError) as caught:
            await writing
        assert type(caught.value) is error
        await store.finish()
    await direct.acl_deluser("web")


async def test_a_restarted_server_has_forgotten_its_connections() -> None:
    port = servers.free_port()
    retry = Retry(NoBackoff(), 0)
    async with Redis(host=HOST, port=port, retry=retry) as client:
        store = RedisStore(client)
        with servers.redis(port=port):
            await store.read("other")
            pipeline = store._servers.get()._pipeline
            assert pipeline is not None
        with servers.redis(port=port):
            server = store._servers.get()
            while server._pipeline is not None:  # noqa: ASYNC110
                await asyncio.sleep(0)
            server._fence.lose(pipeline._client)
            bystander = Redis(host=HOST, port=port)  # gets the id that the lost one had
            await bystander.ping()
            await store.read("other")
            assert server._fence.holds(pipeline._client)
            assert len(await bystander.client_list()) >= 2
            await bystander.aclose()
        await store.finish()


def test_a_fence_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_redis_fence, "_LIMIT", 2)
    fence = _redis_fence.Fence()
    clients = [_redis_fence.Client("server", number, None) for number in range(3)]
    for client in clients:
        fence.lose(client)
    fence.lose(None)
    assert list(fence._lost) == clients[1:]
    assert [fence.holds(client) for client in [*clients, None]] == [False] * 4


async def test_an_error_that_nobody_waits_for_harms_nobody(
    proxy: HeldProxy, store: RedisStore, direct: Any
) -> None:
    await direct.lpush("list", "x")
    proxy.hold()
    passed = proxy.passed
    doomed = begin(store, lambda store: store.read("list"))
    while proxy.passed == passed:  # noqa: ASYNC110
        await asyncio.sleep(0)
    doomed.cancel()
    await asyncio.sleep(0)
    proxy.resume()
    assert await store.read("k") is None
    assert proxy.accepted == 1


async def test_a_write_that_cannot_be_settled_says_so(
    proxy: HeldProxy, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*args: Any) -> bool:
        raise exceptions.ResponseError("no")

    monkeypatch.setattr(store, "_swap", refuse)
    proxy.hold_requests()
    writing = begin(store, WRITES["create"])
    await stall(proxy, store)
    with pytest.raises(UnsettledError) as caught:
        await writing
    assert isinstance(caught.value.__cause__, exceptions.ResponseError)


async def test_a_fake_needs_no_fence() -> None:
    assert await _redis_fence.Fence().open(object()) is None


async def test_where_the_fence_is_refused_an_unknown_fate_is_an_error(
    proxy: HeldProxy, direct: Any, caplog: pytest.LogCaptureFixture
) -> None:
    commands = ["+get", "+set", "+del", "+eval", "-client"]
    await direct.acl_setuser("web", enabled=True, nopass=True, keys=["*"], commands=commands)
    retry = Retry(NoBackoff(), 0)
    async with Redis(host=HOST, port=proxy.port, username="web", retry=retry) as client:
        store = RedisStore(client)
        with caplog.at_level("INFO"):
            await store.read("other")
        assert "Redis refuses CLIENT ID" in caplog.text
        proxy.hold_requests()
        writing = begin(store, WRITES["create"])
        await stall(proxy, store)
        with pytest.raises(ConnectionError, match="be done later") as told:
            await writing
        assert not isinstance(told.value, UnsettledError)
        assert await store.read("k") is None
        proxy.release()
        await store.finish()
    await direct.acl_deluser("web")


async def test_the_time_of_a_write_whose_outcome_is_looked_up_counts_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, store = asyncio.get_running_loop(), RedisStore(Redis())
    clock = iter([100.0, 107.0])

    class Unsettled:
        def submit(self, *_: object) -> asyncio.Future[Any]:
            future = loop.create_future()
            future.set_exception(UnsettledError())
            return future

    async def swap(*arguments: Any) -> bool:
        *_, since = arguments
        seen.append(since)
        return True

    seen: list[float] = []
    monkeypatch.setattr(redis_store, "monotonic", lambda: next(clock))
    monkeypatch.setattr(store, "_servers", PerLoop(Unsettled))
    monkeypatch.setattr(store, "_swap", swap)
    before = loop.time()
    assert await store.update("k", b"1", 100)
    assert before - 7 <= seen[0] <= loop.time() - 7
