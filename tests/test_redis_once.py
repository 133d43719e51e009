"""Each write to Redis is sent once. If it is applied late, it does not undo a later write."""

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
from aiohttp_session.stores import UnsettledError
from aiohttp_session.stores._redis_pipeline import WRITE
from aiohttp_session.stores.redis import RedisStore
from benchmarks.servers import HOST, Server
from tests.held_proxy import HeldProxy
from tests.waiting import PATIENCE, LoopClock

LARGE, LARGER = b"x" * 50_000, b"x" * 60_000


@pytest.fixture
async def proxy(redis_server: Server) -> AsyncIterator[HeldProxy]:
    async with HeldProxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: HeldProxy, direct: Any) -> AsyncIterator[Any]:
    async with Redis(
        host=HOST, port=proxy.port, retry=Retry(NoBackoff(), 0), socket_timeout=None
    ) as client:
        yield client


@pytest.fixture
async def store(client: Any, direct: Any) -> RedisStore:
    """A store whose pipelined connection is open, and which swaps by a script that is loaded."""
    store = RedisStore(client, timeout=PATIENCE)
    await store.read("other")
    assert not await store.swap("other", b"0", b"1", None)
    return store


Write = Callable[[RedisStore], Awaitable[Any]]
WRITES: dict[str, Write] = {
    "create": lambda store: store.create("new", b"1", 100),
    "add": lambda store: store.swap("new", None, b"1", 100),
    "swap": lambda store: store.swap("k", b"0", b"1", 100),
    "delete": lambda store: store.delete("k"),
}
KEYS = {"create": "new", "add": "new", "swap": "k", "delete": "k"}
SENT_ONCE = ["create", "add", "swap"]


def begin(store: RedisStore, write: Write) -> asyncio.Future[Any]:
    return asyncio.ensure_future(write(store))


async def stall(proxy: HeldProxy, store: RedisStore, key: str = "k") -> None:
    """Hold what is under way until its connection is given up, as when it has stalled."""
    await proxy.holds(key.encode())
    server = store._servers.get()
    if server._pipeline is not None:
        server._pipeline.give_up()


async def undisturbed(store: RedisStore) -> None:
    """Wait until what was released has been applied."""
    for _ in range(20):
        await store.read("other")


async def writes_seen(direct: Any) -> int:
    """Return how many writes the server was sent since `CONFIG RESETSTAT`."""
    stats = await direct.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("set", "evalsha"))


@pytest.mark.parametrize("write", SENT_ONCE)
async def test_a_write_whose_connection_is_lost_is_unsettled_at_once_and_not_sent_again(
    proxy: HeldProxy, store: RedisStore, direct: Any, write: str
) -> None:
    await direct.set("k", b"0")
    await direct.config_resetstat()
    proxy.hold_requests()
    writing = begin(store, WRITES[write])
    await stall(proxy, store, KEYS[write])
    passed = proxy.passed
    with pytest.raises(UnsettledError, match="unknown whether the write was applied"):
        await writing
    assert (proxy.passed, await writes_seen(direct)) == (passed, 0)
    assert await direct.get(KEYS[write]) == (b"0" if write == "swap" else None)
    proxy.release()
    await undisturbed(store)
    assert await direct.get(KEYS[write]) == b"1"  # so it may be applied late


@pytest.mark.parametrize(
    ("write", "later"),
    [
        ("swap", lambda store: store.swap("k", b"0", b"2", None)),
        ("swap", lambda store: store.delete("k")),
        ("add", lambda store: store.swap("new", None, b"2", None)),
    ],
)
async def test_a_swap_that_is_held_does_not_undo_what_was_written_later(
    proxy: HeldProxy, store: RedisStore, direct: Any, write: str, later: Write
) -> None:
    await direct.set("k", b"0")
    proxy.hold_requests()
    writing = begin(store, WRITES[write])
    await stall(proxy, store, KEYS[write])
    with pytest.raises(UnsettledError):
        await writing
    assert await later(store) in (True, None)
    written = await direct.get(KEYS[write])
    proxy.release()
    await undisturbed(store)
    assert await direct.get(KEYS[write]) == written != b"1"


async def test_a_swap_that_is_held_and_repeated_is_applied_once(
    proxy: HeldProxy, store: RedisStore, direct: Any
) -> None:
    await direct.set("k", b"0")
    proxy.hold_requests()
    writing = begin(store, WRITES["swap"])
    await stall(proxy, store)
    with pytest.raises(UnsettledError):
        await writing
    assert await WRITES["swap"](store) is True
    await direct.persist("k")
    proxy.release()
    await undisturbed(store)
    assert await direct.get("k") == b"1"
    assert await direct.ttl("k") == -1


async def test_a_deletion_that_is_held_is_done_by_another_connection(
    proxy: HeldProxy, store: RedisStore, direct: Any
) -> None:
    await direct.set("k", b"0")
    proxy.hold_requests()
    writing = begin(store, WRITES["delete"])
    await stall(proxy, store)
    await writing
    assert await direct.get("k") is None
    proxy.release()
    await undisturbed(store)


@pytest.mark.parametrize("write", WRITES)
async def test_a_write_whose_reply_is_lost_was_applied(
    proxy: HeldProxy, store: RedisStore, direct: Any, write: str
) -> None:
    await direct.set("k", b"0")
    before = await direct.get(KEYS[write])
    proxy.hold()
    writing = begin(store, WRITES[write])
    while await direct.get(KEYS[write]) == before:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await proxy.cut()
    proxy.resume()
    if write == "delete":
        await writing
    else:
        with pytest.raises(UnsettledError):
            await writing
    assert await direct.get(KEYS[write]) == (None if write == "delete" else b"1")
    assert (await direct.ttl(KEYS[write]) > 0) is (write != "delete")
    if write in {"swap", "add"}:  # so a repeated swap does nothing, and says so
        assert await WRITES[write](store) is False


@pytest.mark.parametrize("write", SENT_ONCE)
async def test_a_write_that_was_applied_and_changed_by_another_is_unsettled(
    proxy: HeldProxy, store: RedisStore, direct: Any, write: str
) -> None:
    await direct.set("k", b"0")
    proxy.hold()
    writing = begin(store, WRITES[write])
    while await direct.get(KEYS[write]) != b"1":  # noqa: ASYNC110
        await asyncio.sleep(0)
    await direct.set(KEYS[write], b"2")
    await proxy.cut()
    proxy.resume()
    with pytest.raises(UnsettledError):
        await writing
    assert await direct.get(KEYS[write]) == b"2"


@pytest.mark.parametrize("write", WRITES)
async def test_what_nobody_waits_for_is_not_sent_again(
    proxy: HeldProxy, store: RedisStore, direct: Any, write: str
) -> None:
    await direct.set("k", b"0")
    await direct.config_resetstat()
    proxy.hold_requests()
    abandoned = begin(store, WRITES[write])
    await proxy.holds(KEYS[write].encode())
    abandoned.cancel()
    later = asyncio.ensure_future(store.read("k"))
    await asyncio.sleep(0)
    await stall(proxy, store, KEYS[write])
    assert await later == b"0"
    stats = await direct.info("commandstats")
    assert not {"cmdstat_set", "cmdstat_evalsha", "cmdstat_del"} & stats.keys()
    proxy.release()


async def test_a_large_write_that_nobody_waits_for_and_a_later_one_are_in_order(
    proxy: HeldProxy, store: RedisStore, direct: Any
) -> None:
    await store.create("k", LARGE, None)  # by a connection of its own
    proxy.hold_requests()
    abandoned = begin(store, lambda store: store.swap("k", LARGE, LARGER, None))
    await proxy.holds(b"k")
    abandoned.cancel()
    small = begin(store, lambda store: store.swap("k", LARGE, b"2", None))
    await asyncio.sleep(0)
    proxy.release()
    won = await small
    await store.finish()
    assert await direct.get("k") == (b"2" if won else LARGER)


async def test_a_large_write_that_is_given_up_does_not_undo_a_later_one(
    proxy: HeldProxy, client: Any, direct: Any, loop_clock: LoopClock
) -> None:
    store = RedisStore(client, timeout=PATIENCE)
    await store.create("k", LARGE, None)  # by a connection of its own
    assert await store.swap("k", LARGE, LARGE, None)
    proxy.hold_requests()
    given_up = begin(store, lambda store: store.swap("k", LARGE, LARGER, None))
    await proxy.holds(b"k")
    await loop_clock.pass_until(given_up.done)
    with pytest.raises((UnsettledError, TimeoutError)):
        await given_up
    assert await store.swap("k", LARGE, b"2", None)
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


@pytest.mark.parametrize("write", SENT_ONCE)
async def test_a_server_that_is_gone_leaves_the_outcome_of_a_write_unknown(
    proxy: HeldProxy, store: RedisStore, write: str
) -> None:
    proxy.hold_requests()
    writing = begin(store, WRITES[write])
    await proxy.holds(KEYS[write].encode())
    await proxy.refuse()
    with pytest.raises(UnsettledError):
        await writing
    with pytest.raises(exceptions.ConnectionError) as caught:  # this one was not sent
        await WRITES[write](store)
    assert not isinstance(caught.value, UnsettledError)


async def test_a_deletion_fails_once_the_server_is_gone(
    proxy: HeldProxy, store: RedisStore
) -> None:
    proxy.hold_requests()
    deleting = begin(store, WRITES["delete"])
    await proxy.holds(b"k")
    await proxy.refuse()
    with pytest.raises(exceptions.ConnectionError):
        await deleting


@pytest.mark.parametrize("write", SENT_ONCE)
async def test_a_write_for_which_there_is_no_connection_was_not_applied(
    client: Any, direct: Any, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    store = RedisStore(client)
    await direct.set("k", b"0")

    async def acquire() -> Any:
        raise exceptions.MaxConnectionsError("none")

    monkeypatch.setattr(store._servers.get().connections, "acquire", acquire)
    with pytest.raises(exceptions.MaxConnectionsError):
        await WRITES[write](store)
    assert await direct.get("new") is None
    assert await direct.get("k") == b"0"


async def test_a_batch_that_is_cancelled_does_not_undo_a_later_write(
    proxy: HeldProxy, store: RedisStore, direct: Any
) -> None:
    await store.create("k", LARGE, None)  # opens a connection of its own
    proxy.hold_requests()
    abandoned = begin(store, lambda store: store.swap("k", LARGE, LARGER, None))
    await proxy.holds(b"k")
    server = store._servers.get()
    for worker in server._batch._deadlines:
        worker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    await server._batch.finish()
    assert await store.swap("k", LARGE, b"2", None)
    proxy.release()
    await undisturbed(store)
    assert await direct.get("k") == b"2"


async def test_a_batch_whose_connection_is_lost_is_unsettled_but_for_its_reads(
    proxy: HeldProxy, client: Any, direct: Any
) -> None:
    store = RedisStore(client, timeout=PATIENCE)
    await client.mset({"k": b"0", "l": b"0"})  # opens a connection

    async def read(key: str) -> bytes | None:
        return await store.read(key)

    proxy.replies_to_lose = 1
    results = await asyncio.gather(
        read("l"),
        store.create("new", b"1", None),
        store.swap("l", None, b"1", None),
        store.delete("k"),
        read("new"),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [
        *(bytes, UnsettledError, UnsettledError, type(None), bytes)
    ]
    assert [await direct.get(key) for key in ("k", "l", "new")] == [None, b"0", b"1"]


async def test_writes_need_only_the_commands_that_write(
    proxy: HeldProxy, direct: Any, redis_server: Server
) -> None:
    commands = ["+get", "+set", "+del", "+evalsha", "+eval"]
    await direct.acl_setuser("web", enabled=True, passwords=["+x"], keys=["*"], commands=commands)
    async with Redis(
        host=HOST, port=proxy.port, username="web", password="x", retry=Retry(NoBackoff(), 0)
    ) as client:
        store = RedisStore(client)
        await store.create("k", b"0", None)
        proxy.hold_requests()
        writing = begin(store, WRITES["swap"])
        await stall(proxy, store)
        with pytest.raises(UnsettledError):
            await writing
        assert await store.swap("k", b"0", b"2", None)
        await store.delete("k")
        await store.finish()
    await direct.acl_deluser("web")


@pytest.mark.parametrize("write", WRITES)
async def test_a_server_is_never_told_to_forget_a_connection(
    proxy: HeldProxy, store: RedisStore, direct: Any, write: str
) -> None:
    await direct.set("k", b"0")
    await direct.config_resetstat()
    proxy.replies_to_lose = 1
    try:
        await WRITES[write](store)
    except UnsettledError:
        assert write != "delete"
    await store.read("k")
    await store.finish()
    stats = await direct.info("commandstats")
    assert not [
        name for name in stats if name.startswith(("cmdstat_client|id", "cmdstat_client|k"))
    ]


async def test_an_error_that_nobody_waits_for_harms_nobody(
    proxy: HeldProxy, store: RedisStore, direct: Any
) -> None:
    await direct.lpush("list", "x")
    accepted = proxy.accepted
    proxy.hold()
    passed = proxy.passed
    doomed = begin(store, lambda store: store.read("list"))
    while proxy.passed == passed:  # noqa: ASYNC110
        await asyncio.sleep(0)
    doomed.cancel()
    await asyncio.sleep(0)
    proxy.resume()
    assert await store.read("k") is None
    assert proxy.accepted == accepted
