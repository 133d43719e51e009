"""Processes that reach one store by networks that hold bytes and deliver them late."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

import aiomcache
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelManagedConnection
from redis.backoff import NoBackoff

from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.server_storage import ServerStorage
from benchmarks.servers import HOST, Server
from tests.conftest import Clock
from tests.held_proxy import HeldProxy
from tests.waiting import PATIENCE, LoopClock, turns, until

PROCESSES = 3
OPTIONS: dict[str, Any] = {"socket_timeout": None, "retry": Retry(NoBackoff(), 0)}
RESTRICTED = "web"
"""A user of Redis that may run no script."""
_numbers = itertools.count()


class Hold(NamedTuple):
    """What a network holds from some time on."""

    after: int = 0
    """The reads from clients that are still passed on before."""
    size: int = 0
    """The bytes of the next read, or of the next reply, that are still passed on."""
    requests: bool = True
    replies: bool = False
    on_new: bool = False
    """Whether connections are concerned that are made later."""


class Network:
    """The way of a process to all servers."""

    def __init__(self, proxies: Sequence[HeldProxy] = ()) -> None:
        self._proxies = proxies
        self._plan: Hold | None = None
        for proxy in proxies:
            proxy.on_request = self._count

    @property
    def is_blocking(self) -> bool:
        """Whether the process may wait for something that is held."""
        return any(proxy.is_blocking for proxy in self._proxies)

    def plan(self, hold: Hold) -> None:
        """Hold what is sent, once some more requests have passed."""
        self._plan = hold

    def cut(self) -> None:
        """Tell the process that the connections are gone of which something is held."""
        for proxy in self._proxies:
            proxy.cut_held()

    def release_one(self, number: int) -> None:
        """Deliver what is held of one connection."""
        for proxy in self._proxies:
            proxy.release_one(number)

    def heal(self) -> None:
        """Deliver all that is held, and hold no more."""
        self._plan = None
        for proxy in self._proxies:
            proxy.release()

    async def delivers(self) -> None:
        """Wait until the servers have processed what was released of connections that are gone."""
        for proxy in self._proxies:
            await proxy.delivers()

    def _count(self) -> None:
        plan = self._plan
        if plan is None:
            return
        if plan.after:
            self._plan = plan._replace(after=plan.after - 1)
            return
        self._plan = None
        for proxy in self._proxies:
            proxy.hold_bytes(
                requests=plan.requests, replies=plan.replies, size=plan.size, on_new=plan.on_new
            )


class Process(NamedTuple):
    """A process, and how it reaches the store."""

    storage: ServerStorage
    network: Network


Links: TypeAlias = "list[tuple[Any, Network]]"
"""For each process, its client and its network."""
Open: TypeAlias = Callable[[Any], AbstractAsyncContextManager[Links]]


@contextlib.asynccontextmanager
async def single(server: Server, **options: Any) -> AsyncIterator[Links]:
    """Reach one server of Redis or Valkey: the first process directly."""
    async with contextlib.AsyncExitStack() as stack:
        links: Links = []
        for number in range(PROCESSES):
            proxies = [await stack.enter_async_context(HeldProxy(server.port))] if number else []
            port = proxies[0].port if proxies else server.port
            client = Redis(host=HOST, port=port, **OPTIONS, **options)
            links.append((await stack.enter_async_context(client), Network(proxies)))
        yield links


def restricted(server: Server) -> AbstractAsyncContextManager[Links]:
    """Reach one server of Redis as a user that may run no script."""
    return single(server, username=RESTRICTED)


@contextlib.asynccontextmanager
async def memcached(server: Server) -> AsyncIterator[Links]:
    async with contextlib.AsyncExitStack() as stack:
        links: Links = []
        for number in range(PROCESSES):
            proxies = [await stack.enter_async_context(HeldProxy(server.port))] if number else []
            client = aiomcache.Client(HOST, proxies[0].port if proxies else server.port)
            stack.push_async_callback(client.close)
            links.append((client, Network(proxies)))
        yield links


@contextlib.asynccontextmanager
async def clustered(nodes: list[Server]) -> AsyncIterator[Links]:
    async with contextlib.AsyncExitStack() as stack:
        links: Links = []
        for number in range(PROCESSES):
            proxies = {
                node.port: await stack.enter_async_context(HeldProxy(node.port))
                for node in nodes
                if number
            }

            def remap(
                address: tuple[str, int], proxies: dict[int, HeldProxy] = proxies
            ) -> tuple[str, int]:
                return (HOST, proxies[address[1]].port) if proxies else address

            client: Any = RedisCluster(
                host=HOST, port=nodes[0].port, address_remap=remap, **OPTIONS
            )
            stack.push_async_callback(_close_all, client)
            links.append((client, Network([*proxies.values()])))
        yield links


async def _close_all(client: Any) -> None:
    """Close the connections of a client; `aclose` does not if the last command has failed."""
    await client.aclose()
    await client.nodes_manager.aclose()
    await client.nodes_manager.aclose("startup_nodes")


@contextlib.asynccontextmanager
async def guarded(group: tuple[Server, Server, Server]) -> AsyncIterator[Links]:
    """Reach a primary that a Sentinel names."""
    primary, _, sentinel = group
    async with contextlib.AsyncExitStack() as stack:
        links: Links = []
        for number in range(PROCESSES):
            proxies = [await stack.enter_async_context(HeldProxy(primary.port))] if number else []
            port = proxies[0].port if proxies else primary.port
            guard: Any = Sentinel([(HOST, sentinel.port)])  # type: ignore[no-untyped-call]
            client = guard.master_for("sessions", connection_class=_connection_to(port), **OPTIONS)
            for one in (client, *guard.sentinels):
                stack.push_async_callback(one.aclose)
            links.append((client, Network(proxies)))
        yield links


def _connection_to(port: int) -> type[SentinelManagedConnection]:
    class Connection(SentinelManagedConnection):
        async def connect_to(self, address: tuple[str, int]) -> None:
            await super().connect_to((HOST, port))  # type: ignore[no-untyped-call]

    return Connection


@contextlib.asynccontextmanager
async def processes(links: Links, **options: Any) -> AsyncIterator[list[Process]]:
    """Yield a process for each link, on a part of the store that no other test uses."""
    name = f"S{next(_numbers)}"
    started = []
    for client, network in links:
        kind = MemcachedStorage if isinstance(client, aiomcache.Client) else RedisStorage
        storage = kind(client, timeout=PATIENCE, circuit_breaker=False, cookie_name=name, **options)
        started.append(Process(storage, network))
        await storage.store.swap(f"{name}_warm", b"0", b"1", None)  # opens a connection
        await storage.store.read(f"{name}_warm")
    try:
        yield started
    finally:
        for process in started:
            process.network.heal()
        for process in started:
            await process.storage.finish()
            await process.network.delivers()


class Time:
    """The clocks of a test: one by which requests are measured, and one that dates records."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._loop_clock = None if "uvloop" in type(loop).__module__ else LoopClock(loop)
        self.loop_time: Callable[[], float] = self._loop_clock or loop.time
        self.date = Clock()

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Have the package go by these clocks."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch("time.time", self.date))
            if self._loop_clock is not None:
                loop, clock = asyncio.get_running_loop(), self._loop_clock
                stack.enter_context(mock.patch.object(loop, "time", clock))
                for name, module in [*sys.modules.items()]:
                    if name.startswith("aiohttp_session") and hasattr(module, "monotonic"):
                        stack.enter_context(mock.patch.object(module, "monotonic", clock))
            yield

    async def pass_until(self, holds: Callable[[], object], networks: Sequence[Network]) -> None:
        """Let time limits be met, or cut what is held, until something holds.

        :raises AssertionError: if it never does.
        """
        if self._loop_clock is None:

            def holds_after_all() -> bool:
                for network in networks:
                    network.cut()
                return bool(holds())

            await until(holds_after_all)
            return
        for _ in range(1000):
            if holds():
                return
            self._loop_clock.advance(PATIENCE / 100)
            await turns(10)
        raise AssertionError("a request does not end")
