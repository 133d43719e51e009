"""The ways in which RedisStore swaps a record, and how it finds the best that a server allows."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from time import monotonic
from typing import Any
from unittest import mock

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, ResponseError

from aiohttp_session.stores import UnsettledError, _redis_client
from aiohttp_session.stores import redis as redis_store
from aiohttp_session.stores.per_loop import PerLoop
from aiohttp_session.stores.redis import RedisStore
from benchmarks import servers
from benchmarks.servers import HOST, Server
from tests.proxy import Proxy
from tests.redis_swaps import Commands, check_swaps
from tests.waiting import PATIENCE

NO_RETRY = Retry(NoBackoff(), 0)


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What was logged about the way in which Redis is asked, as if for the first time."""
    with mock.patch.object(_redis_client, "told", set()), caplog.at_level("INFO"):
        yield caplog


@pytest.fixture
async def commands(direct: Any) -> Commands:
    """What the server of Redis is sent; no script is loaded there."""
    await direct.script_flush()
    await direct.set("k", b"0")
    await direct.config_resetstat()
    return Commands(direct)


@pytest.fixture
async def client(redis_server: Server, direct: Any) -> AsyncIterator[Any]:
    async with Redis(host=HOST, port=redis_server.port, retry=NO_RETRY) as client:
        yield client


@pytest.fixture
async def as_user(redis_server: Server, direct: Any) -> AsyncIterator[Any]:
    """Makes clients whose user has the given rights."""
    clients: list[Any] = []

    async def as_user(rights: str, keys: str = "~*", **options: Any) -> Any:
        await direct.execute_command(*f"ACL SETUSER web reset on nopass {keys} {rights}".split())
        clients.append(
            Redis(host=HOST, port=redis_server.port, username="web", retry=NO_RETRY, **options)
        )
        return clients[-1]

    yield as_user
    for client in clients:
        await client.aclose()
    await direct.acl_deluser("web")


async def test_what_a_server_does_not_support_is_found_out_once_for_a_client(
    client: Any, commands: Commands, direct: Any
) -> None:
    first = RedisStore(client)
    assert await first.swap("k", b"0", b"1", None)
    assert await commands.seen() == {
        "set": (2, 1),
        "evalsha": (1, 1),
        "eval": (1, 0),
        "get": (1, 0),
    }
    second = RedisStore(client)  # a storage may be made for each request
    for n in range(1, 5):
        store = second if n % 2 else first
        assert await store.swap("k", b"%d" % n, b"%d" % (n + 1), None)
    assert await commands.seen() == {"evalsha": (4, 0), "set": (4, 0), "get": (4, 0)}
    for store in (first, second):
        await store.finish()


async def test_what_one_store_finds_out_others_that_were_made_before_need_not(
    client: Any, commands: Commands
) -> None:
    first, second = RedisStore(client), RedisStore(client)
    assert await first.swap("k", b"0", b"1", None)
    await commands.reset()
    assert await second.swap("k", b"1", b"2", None)
    assert await commands.seen() == {"evalsha": (1, 0), "get": (1, 0), "set": (1, 0)}


async def test_many_swaps_at_first_find_out_together(client: Any, commands: Commands) -> None:
    store = RedisStore(client)
    won = await asyncio.gather(*(store.swap("k", b"0", b"1%d" % n, None) for n in range(20)))
    assert won.count(True) == 1
    seen = await commands.seen()
    assert max(calls for calls, _ in seen.values()) <= 21
    assert not await store.swap("k", b"0", b"2", None)
    assert (await commands.seen()).keys() == {"evalsha", "get"}
    await store.finish()


async def test_a_server_that_does_not_know_ifeq_does_nothing(direct: Any) -> None:
    await direct.set("k", b"0", ex=100)
    for key in ("k", "none"):
        for expiry in ((), ("EX", 50)):
            with pytest.raises(ResponseError, match="syntax error"):
                await direct.execute_command("SET", key, b"1", *expiry, "IFEQ", b"0")
    assert await direct.get("k") == b"0"
    assert await direct.ttl("k") > 50
    assert await direct.get("none") is None


async def test_a_script_that_the_server_forgot_is_sent_once(
    client: Any, commands: Commands, direct: Any
) -> None:
    store = RedisStore(client)
    assert await store.swap("k", b"0", b"1", None)
    await direct.script_flush()
    await commands.reset()
    assert await store.swap("k", b"1", b"2", 100)
    assert await commands.seen() == {
        "evalsha": (1, 1),
        "eval": (1, 0),
        "get": (1, 0),
        "set": (1, 0),
    }
    assert await store.swap("k", b"2", b"3", 100)
    assert await commands.seen() == {"evalsha": (1, 0), "get": (1, 0), "set": (1, 0)}
    assert await direct.script_exists(redis_store._DIGEST.decode()) == [True]
    await store.finish()


async def test_a_script_that_many_miss_at_once_is_run_for_each(
    client: Any, commands: Commands, direct: Any
) -> None:
    store = RedisStore(client)
    assert await store.swap("k", b"0", b"1", None)
    await direct.script_flush()
    keys = [f"k{n}" for n in range(20)]
    await direct.mset(dict.fromkeys(keys, b"0"))
    assert all(await asyncio.gather(*(store.swap(key, b"0", b"1", None) for key in keys)))
    assert await direct.mget(keys) == [b"1"] * 20
    await store.finish()


def test_the_digest_is_that_of_the_script() -> None:
    assert redis_store._DIGEST.decode() == hashlib.sha1(redis_store._SCRIPT).hexdigest()


async def test_a_restarted_server_has_no_script() -> None:
    port = servers.free_port()
    async with Redis(host=HOST, port=port, retry=NO_RETRY) as client:
        store = RedisStore(client)
        for _ in range(2):
            with servers.redis(port=port):
                await client.set("k", b"0")
                assert await store.swap("k", b"0", b"1", None)
                await store.finish()
                await client.connection_pool.disconnect()


RIGHTS = {
    "script": ("+@all", {"evalsha", "get", "set"}),
    "script, by EVALSHA and EVAL alone": (
        "+get +set +del +evalsha +eval",
        {"evalsha", "get", "set"},
    ),
    "transaction": ("+@all -@scripting", {"watch", "multi", "exec", "get", "set"}),
    "transaction, EVALSHA refused": ("+@all -evalsha", {"watch", "multi", "exec", "get", "set"}),
    "transaction, EVAL refused": ("+@all -eval", {"watch", "multi", "exec", "get", "set"}),
    "plain": ("+get +set", {"get", "set"}),
    "plain, with DEL": ("+get +set +del", {"get", "set"}),
}


@pytest.mark.parametrize("way", RIGHTS)
async def test_the_best_way_that_the_user_may_use_is_used(
    as_user: Any, commands: Commands, direct: Any, told: pytest.LogCaptureFixture, way: str
) -> None:
    rights, expected = RIGHTS[way]
    clients = [await as_user(rights) for _ in range(2)]
    await direct.set("k", b"0", ex=1000)
    for client in clients * 2:
        store = RedisStore(client)
        assert await store.swap("k", b"0", b"1", None) is True
        await commands.reset()
        assert await store.swap("k", b"1", b"0", 100) is True
        assert 0 < await direct.ttl("k") <= 100
        seen = await commands.seen()
        assert seen.keys() == expected
        assert not any(refused for _, refused in seen.values())
    await check_swaps(RedisStore(clients[0]), direct, is_atomic=not way.startswith("plain"))
    levels = [(record.levelname, record.getMessage()) for record in told.records]
    warnings = [text for level, text in levels if level == "WARNING"]
    assert len(warnings) == way.startswith("plain")
    if warnings:
        assert "Redis refuses SET IFEQ, EVALSHA and WATCH" in warnings[0]
        assert "one may undo the other" in warnings[0]
    assert len(levels) == (0 if way.startswith("script") else 1 + len(warnings))


async def test_a_script_that_is_loaded_may_be_run_by_a_user_who_may_not_load_it(
    as_user: Any, client: Any, commands: Commands
) -> None:
    assert await RedisStore(client).swap("k", b"0", b"1", None)
    store = RedisStore(await as_user("+get +set +evalsha"))
    assert await store.swap("k", b"1", b"2", None)
    await commands.reset()
    assert await store.swap("k", b"2", b"3", None)
    assert (await commands.seen()).keys() == {"evalsha", "get", "set"}


async def test_a_store_that_learns_late_that_there_is_no_script_uses_a_transaction(
    as_user: Any, commands: Commands
) -> None:
    client = await as_user("+@all -eval")
    first, second = RedisStore(client), RedisStore(client)
    assert await first.swap("k", b"0", b"1", None)
    assert await second.swap("k", b"1", b"2", None)


async def test_a_key_that_the_user_may_not_use_is_no_reason_to_do_without_atomic_swaps(
    as_user: Any, commands: Commands, direct: Any, told: pytest.LogCaptureFixture
) -> None:
    store = RedisStore(await as_user("+@all", "~k*"))
    assert await store.swap("k", b"0", b"1", None)
    with pytest.raises(NoPermissionError):
        await store.swap("other", b"0", b"1", None)
    await commands.reset()
    assert await store.swap("k", b"1", b"2", None)
    assert (await commands.seen()).keys() == {"evalsha", "get", "set"}
    assert told.messages == []


@pytest.mark.parametrize(
    "error",
    [
        b"-BUSY Redis is busy running a script. You can only call SCRIPT KILL.\r\n",
        b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
        b"-MISCONF Redis is configured to save RDB snapshots\r\n",
        b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n",
    ],
)
async def test_an_error_for_another_reason_is_raised_and_changes_nothing(
    redis_server: Server, commands: Commands, told: pytest.LogCaptureFixture, error: bytes
) -> None:
    async with (
        Proxy(redis_server.port) as proxy,
        Redis(host=HOST, port=proxy.port, retry=NO_RETRY) as client,
    ):
        store = RedisStore(client)
        assert await store.swap("k", b"0", b"0", None)
        await store.read("k")
        proxy.fake_reply, proxy.fake_replies = error, 1
        with pytest.raises(ResponseError):
            await store.swap("k", b"other", b"1", None)
        await commands.reset()
        assert await store.swap("k", b"0", b"1", None)
        assert (await commands.seen()).keys() == {"evalsha", "get", "set"}
        assert told.messages == []
        await store.finish()


@pytest.mark.parametrize("command", [b"HELLO", b"WATCH", b"MULTI", b"SCRIPT"])
async def test_a_proxy_that_knows_few_commands_will_do(
    redis_server: Server, commands: Commands, command: bytes
) -> None:
    """Such a proxy closes a connection by which it is sent another one."""
    async with (
        Proxy(redis_server.port) as proxy,
        Redis(host=HOST, port=proxy.port, retry=NO_RETRY, protocol=2) as client,
    ):
        proxy.intolerable = command
        store = RedisStore(client)
        await store.create("k", b"0", None)
        for n in range(3):
            assert await store.swap("k", b"%d" % n, b"%d" % (n + 1), 100)
            assert not await store.swap("k", b"%d" % n, b"x", None)
        assert await store.read("k") == b"3"
        await store.delete("k")
        await store.finish()


async def test_a_plain_write_whose_connection_is_lost_is_unsettled(
    as_user: Any, redis_server: Server, direct: Any
) -> None:
    await direct.set("k", b"0")
    await as_user("+get +set")
    async with (
        Proxy(redis_server.port) as proxy,
        Redis(host=HOST, port=proxy.port, username="web", retry=NO_RETRY) as client,
    ):
        store = RedisStore(client, timeout=PATIENCE)
        assert await store.swap("k", b"0", b"1", None)
        resubmit = store._servers.get().resubmit

        def lose(operation: Any, *arguments: Any) -> asyncio.Future[Any]:
            proxy.replies_to_lose = int(b"SET" in operation[1])
            future: asyncio.Future[Any] = resubmit(operation, *arguments)
            return future

        with (
            mock.patch.object(store._servers.get(), "resubmit", lose),
            pytest.raises(UnsettledError),
        ):
            await store.swap("k", b"1", b"2", None)
        await store.finish()


async def test_a_plain_write_does_not_bring_back_what_was_deleted_meanwhile(
    as_user: Any, direct: Any, commands: Commands
) -> None:
    store = RedisStore(await as_user("+get +set"))
    assert await store.swap("k", b"0", b"1", None)
    resubmit = store._servers.get().resubmit

    def delete_between(operation: Any, *arguments: Any) -> asyncio.Future[Any]:
        async def later() -> Any:
            if b"SET" in operation[1]:
                await direct.delete("k")
            return await resubmit(operation, *arguments)

        return asyncio.ensure_future(later())

    with mock.patch.object(store._servers.get(), "resubmit", delete_between):
        assert await store.swap("k", b"1", b"2", None) is False
    assert await direct.get("k") is None
    await store.finish()


async def test_the_time_of_a_swap_that_is_refused_counts_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, store = asyncio.get_running_loop(), RedisStore(Redis())
    clock = iter([100.0, 107.0])
    errors = [ResponseError("syntax error"), NoPermissionError("no permissions to run the command")]
    seen: list[float] = []

    class Refusing:
        def submit(self, *_: object) -> asyncio.Future[Any]:
            return refused(errors[0])

        def resubmit(self, operation: object, since: float, size: int) -> asyncio.Future[Any]:
            seen.append(since)
            return refused(errors[1])

        def submit_transaction(self, operation: object, since: float) -> asyncio.Future[Any]:
            seen.append(since)
            future: asyncio.Future[Any] = loop.create_future()
            future.set_result(True)
            return future

    def refused(error: Exception) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = loop.create_future()
        future.set_exception(error)
        return future

    monkeypatch.setattr(redis_store, "monotonic", lambda: next(clock))
    monkeypatch.setattr(store, "_servers", PerLoop(Refusing))
    before = loop.time()
    assert await store.swap("k", b"0", b"1", 100)
    assert len(seen) == 2
    assert before - 7 <= seen[0] == seen[1] <= loop.time() - 7


async def test_another_storage_has_found_out_meanwhile(client: Any, commands: Commands) -> None:
    store = RedisStore(client)
    await store.create("k", b"0", None)
    store._server.way = redis_store._Way.TRANSACTION
    refusal = ResponseError("syntax error")
    way = redis_store._Way.IFEQ
    assert await store._swap_otherwise(refusal, way, monotonic(), "k", b"0", b"1", None)
    assert await store.read("k") == b"1"
