"""The tokens of memcached's versions: each is used only for the record with which it came."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import aiomcache
import pytest

from aiohttp_session.stores import UnsettledError, _memcached_client
from aiohttp_session.stores._memcached_client import Client
from aiohttp_session.stores.memcached import MemcachedStore
from benchmarks import servers
from benchmarks.servers import HOST, Server
from tests.held_memcached import HeldProxy
from tests.waiting import LoopClock, until

pytestmark = pytest.mark.once  # the store has no twin
HOUR = 3600  # the time limit: no test waits for it


def make_store(port: int) -> MemcachedStore:
    return MemcachedStore(aiomcache.Client(HOST, port), timeout=HOUR)


def client_of(store: MemcachedStore) -> Client:
    return store._operations.get()._client


async def token_of(store: MemcachedStore, key: bytes = b"k") -> bytes:
    client = client_of(store)
    _, token = await client.gets(key, client.deadline())
    return token


@pytest.fixture
async def proxy(memcached_server: Server) -> AsyncIterator[HeldProxy]:
    async with HeldProxy(memcached_server.port) as proxy:
        yield proxy


@pytest.fixture
async def other(memcached_server: Server) -> AsyncIterator[MemcachedStore]:
    """Another process's store."""
    store = make_store(memcached_server.port)
    await store._client.flush_all()
    await store._client.close()
    yield store
    await store.finish()


@pytest.fixture
async def store(proxy: HeldProxy, other: MemcachedStore) -> AsyncIterator[MemcachedStore]:
    """Has an open connection, and the record of "k" read."""
    await other.create("k", b"v0", None)
    store = make_store(proxy.port)
    assert await store.read("k") == b"v0"
    proxy.passed.clear()
    yield store
    await store.finish()


def commands(proxy: HeldProxy) -> list[bytes]:
    """Return the commands that were sent since the last call."""
    lines = bytes(proxy.passed).split(b"\r\n")
    proxy.passed.clear()
    return [line.split()[0] for line in lines if line.startswith((b"gets ", b"cas ", b"add "))]


async def test_swap_of_what_was_read_takes_one_round_trip(
    store: MemcachedStore, proxy: HeldProxy
) -> None:
    assert await store.swap("k", b"v0", b"v1", None)
    assert commands(proxy) == [b"cas"]


async def test_token_is_used_once(store: MemcachedStore, proxy: HeldProxy) -> None:
    assert await store.swap("k", b"v0", b"v1", None)
    assert not await store.swap("k", b"v0", b"v2", None)
    assert commands(proxy) == [b"cas", b"gets"]


async def test_swap_from_an_older_record_than_was_read_last_does_not_replace_that(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    assert await other.swap("k", b"v0", b"v1", None)
    assert await store.read("k") == b"v1"  # and its token
    commands(proxy)
    assert await store.swap("k", b"v0", b"v2", None) is False
    assert b"cas" not in commands(proxy)
    assert await other.read("k") == b"v1"
    assert await store.swap("k", b"v1", b"v2", None) is True
    assert await other.read("k") == b"v2"


async def test_two_requests_that_loaded_different_versions_do_not_share_a_token(
    store: MemcachedStore, other: MemcachedStore
) -> None:
    assert await other.swap("k", b"v0", b"v1", None)
    assert await store.read("k") == b"v1"
    from_v0, from_v1 = await asyncio.gather(
        store.swap("k", b"v0", b"from v0", None), store.swap("k", b"v1", b"from v1", None)
    )
    assert (from_v0, from_v1) == (False, True)
    assert await other.read("k") == b"from v1"


async def test_swap_finds_the_same_record_in_a_newer_version(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    await other.create("k", b"v0", None)
    assert await store.swap("k", b"v0", b"v1", None) is True
    assert commands(proxy) == [b"cas", b"gets", b"cas"]
    assert await other.read("k") == b"v1"


async def test_swap_finds_a_newer_record(store: MemcachedStore, other: MemcachedStore) -> None:
    assert await other.swap("k", b"v0", b"v1", None)
    assert await store.swap("k", b"v0", b"v2", None) is False
    await other.delete("k")
    assert await store.read("k") is None
    assert await store.swap("k", b"v1", b"v2", None) is False
    assert await other.read("k") is None


async def test_swap_of_a_record_that_was_deleted_since_it_was_read_makes_none(
    store: MemcachedStore, other: MemcachedStore
) -> None:
    await other.delete("k")
    assert await store.swap("k", b"v0", b"v1", None) is False
    assert await other.read("k") is None


async def test_one_of_many_swaps_at_once_wins(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    won = await asyncio.gather(*(store.swap("k", b"v0", b"w%d" % n, None) for n in range(30)))
    assert won.count(True) == 1
    assert await other.read("k") == b"w%d" % won.index(True)
    assert commands(proxy).count(b"cas") <= 30


async def test_tokens_are_kept_within_bounds(
    store: MemcachedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_memcached_client, "_VERSIONS_LIMIT", 2)
    client = client_of(store)
    keys = [f"k{number}" for number in range(10)]
    for key in keys:
        await store.create(key, b"v0", None)
        await store.read(key)
    assert len(client._versions) + len(client._older_versions) < 7
    for key in keys:
        assert await store.swap(key, b"v0", b"v1", None)
        assert await store.read(key) == b"v1"


async def test_tokens_are_forgotten_when_a_connection_is_lost(
    store: MemcachedStore, proxy: HeldProxy
) -> None:
    client = client_of(store)
    await store.read("none")
    proxy.cut_others()
    await until(lambda: not client._connections)
    assert client._versions == client._older_versions == {}
    assert await store.swap("k", b"v0", b"v1", None)
    assert commands(proxy) == [b"gets", b"gets", b"cas"]


class Restarting:
    """A memcached server that can be restarted, which loses its records and counts anew."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.port = servers.free_port()
        self.start()

    def start(self) -> None:
        self._server = self._stack.enter_context(servers.memcached(port=self.port))

    def stop(self) -> None:
        self._stack.close()

    async def restart_with(self, payload: bytes, token: bytes) -> MemcachedStore:
        """Restart it, and have another process store a record whose version has a given token."""
        self.stop()
        self.start()
        other = make_store(self.port)
        for _ in range(100):
            await other.create("k", payload, None)
            if await token_of(other) == token:
                return other
        raise AssertionError("the server does not count its versions from the beginning")


@pytest.fixture
def restarting() -> Any:
    with contextlib.ExitStack() as stack:
        yield Restarting(stack)


@pytest.mark.parametrize("is_noticed", [True, False])
async def test_token_is_not_valid_after_a_restart(restarting: Restarting, is_noticed: bool) -> None:
    store = make_store(restarting.port)
    await store.create("k", b"v0", None)
    assert await store.read("k") == b"v0"
    client = client_of(store)
    token = client._versions[b"k"][1]
    if is_noticed:
        other = await restarting.restart_with(b"other", token)
        await until(lambda: not client._connections)
        assert await store.swap("k", b"v0", b"v1", None) is False
    else:
        restarting.stop()  # this event loop stands still
        with pytest.raises(UnsettledError):
            await store.swap("k", b"v0", b"v1", None)
        other = await restarting.restart_with(b"other", token)
        assert await store.swap("k", b"v0", b"v1", None) is False
    assert await other.read("k") == b"other"
    assert await store.swap("k", b"other", b"v1", None) is True
    for each in (store, other):
        await each.finish()


@pytest.mark.parametrize("read_by", ["a load", "the swap"])
async def test_token_that_comes_by_a_connection_from_before_a_restart_is_not_valid(
    restarting: Restarting, loop_clock: LoopClock, read_by: str
) -> None:
    """One connection is slow, and another one is lost: what the former brings is from before."""
    async with HeldProxy(restarting.port) as proxy:
        store = make_store(proxy.port)
        await store.create("k", b"v0", None)
        client = client_of(store)
        token = await token_of(store)
        proxy.hold_replies()
        swap: Awaitable[bool]
        if read_by == "a load":
            reading = asyncio.ensure_future(store.read("k"))
        else:
            swap = asyncio.ensure_future(store.swap("k", b"v0", b"v1", None))
        await proxy.holds_reply(b"v0")
        slow = asyncio.ensure_future(store.read("slow"))
        await proxy.holds_reply(b"END\r\nEND\r\n")
        loop_clock.advance(2)
        assert await store.read("none") is None  # by another connection
        other = await restarting.restart_with(b"other", token)
        proxy.cut_others()
        await until(lambda: len(client._connections) == 1)
        assert await store.read("k") == b"other"  # by a third one
        proxy.pass_reply(b"END\r\n")
        if read_by == "a load":
            assert await reading == b"v0"
            swap = store.swap("k", b"v0", b"v1", None)
        with contextlib.suppress(ConnectionError):
            assert await swap is False
        assert await other.read("k") == b"other"
        proxy.cut()
        assert await slow is None
        for each in (store, other):
            await each.finish()
