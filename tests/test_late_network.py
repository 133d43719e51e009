"""Sessions on a network that holds, loses and delivers late: a stateful property test.

A user has a session; a process behind that network and one whose network is well take the user's
requests. Whatever hypothesis finds to do, what was acknowledged is there; it is never undone by
what is older, however late that comes; what has ended stays ended; and each request ends.

A write that has failed may be applied later, but only if no other write was applied since.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal, TypeAlias

import aiomcache
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelManagedConnection
from redis.backoff import NoBackoff

from aiohttp_session import Session
from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.redis_storage import RedisStorage
from benchmarks import servers
from benchmarks.servers import HOST, Server
from tests.held_proxy import HeldProxy
from tests.waiting import PATIENCE, until

pytestmark = pytest.mark.once  # the store has no twin
OPTIONS: dict[str, Any] = {"socket_timeout": None, "retry": Retry(NoBackoff(), 0)}

Content: TypeAlias = frozenset[tuple[str, int]]
Mode: TypeAlias = Literal["overwrite", "merge"]
_Test: TypeAlias = Callable[..., None]
_UNKNOWN: Content = frozenset({("unknown", 0)})

STEPS = st.lists(
    st.sampled_from(["hold", "lose", "release"])
    | st.just("abandon")
    | st.tuples(st.sampled_from(["read", "load", "save", "save stale", "log out"]), st.booleans()),
    min_size=4,
    max_size=14,
)


class Network:
    """The proxies of all servers."""

    def __init__(self, proxies: list[HeldProxy]) -> None:
        self._proxies = proxies
        self._held = 0
        self.failure = ""
        """What happens to the next write: "hold" the network keeps it, "lose" its reply is lost."""

    def fail(self) -> None:
        """Do to what is sent next what was asked for."""
        failure, self.failure = self.failure, ""
        self._held = sum(proxy.held for proxy in self._proxies)
        for proxy in self._proxies:
            if failure == "hold":
                proxy.hold_requests()
            elif failure == "lose":
                proxy.replies_to_lose = 1

    def heal(self) -> None:
        """Do no more of that."""
        self.failure = ""
        for proxy in self._proxies:
            proxy.replies_to_lose = 0

    async def holds(self) -> None:
        """Wait until something is held, since it was last asked to fail."""
        await until(lambda: sum(proxy.held for proxy in self._proxies) > self._held)

    def release(self) -> None:
        """Deliver what is held, though its connections are lost to the client."""
        for proxy in self._proxies:
            proxy.cut_held()
            proxy.release()

    async def end(self, task: asyncio.Future[Any]) -> None:
        """Wait for a task; what is held is not waited for for ever, but cut."""
        while not task.done():
            for proxy in self._proxies:
                proxy.cut_held()
            await asyncio.wait({task}, timeout=0.001)


class Process:
    """A process that takes the user's requests."""

    def __init__(self, client: Any, mode: Mode) -> None:
        kind = MemcachedStorage if isinstance(client, aiomcache.Client) else RedisStorage
        self.storage = kind(client, timeout=PATIENCE, on_conflict=mode, circuit_breaker=False)
        self.loaded: Session | None = None  # by a request that goes on

    async def load(self, identity: str) -> Session:
        return await self.storage.load_session(request_of(identity))

    async def save(self, identity: str, session: Session) -> str | None:
        """Save a session; return what the cookie is set to, None if it isn't."""
        response = web.Response()
        await self.storage.save_session(request_of(identity), response, session)
        cookie = response.cookies.get("AIOHTTP_SESSION")
        return None if cookie is None else cookie.value


def request_of(identity: str) -> web.Request:
    return make_mocked_request("GET", "/", headers={"Cookie": f"AIOHTTP_SESSION={identity}"})


def content_of(session: Session) -> Content | None:
    return None if session.new else frozenset(session.items())


def changed(content: Content, key: str, number: int) -> Content:
    return frozenset({**dict(content), key: number}.items())


class User:
    """A user's session: what it may hold, by what was acknowledged and seen."""

    def __init__(self, near: Process, far: Process, network: Network, mode: Mode) -> None:
        self._near = near
        self._far = far
        self._network = network
        self._mode = mode
        self._identity = ""
        self._ended: list[str] = []  # identities
        self._was: Content | None = None  # when it was looked at, or written, last; None: it ended
        self._may_be: set[Content | None] = set()

    async def log_in(self) -> None:
        session = await self._near.storage.new_session()
        session["n"] = 0
        self._identity = str(await self._near.save("", session))
        self._is({frozenset({("n", 0)})})

    def _is(self, contents: set[Content | None]) -> None:
        """Take down what the session is after an acknowledged write: one of these."""
        self._may_be = contents
        self._was = next(iter(contents)) if len(contents) == 1 else _UNKNOWN

    async def do(self, what: str, process: Process, number: int) -> None:
        """Have a request do something, and compare what is there then."""
        task = asyncio.ensure_future(getattr(self, f"_{what.replace(' ', '_')}")(process, number))
        await self._network.end(task)
        await task
        await self.look()

    async def abandon(self, number: int) -> None:
        """Have a request cancelled while the network keeps its write, and lost when it is old."""
        await self._network.end(asyncio.ensure_future(self._load(self._far, number)))
        older, self._far.loaded = self._far.loaded, None
        newer = await self._near.load(self._identity)
        if older is None:
            return
        older["n"], newer["n"] = -number, number
        self._network.failure = "hold"
        self._network.fail()
        task = asyncio.ensure_future(self._far.save(self._identity, older))
        await self._network.holds()
        task.cancel()
        await asyncio.wait({task})
        await self._near.save(self._identity, newer)
        read = asyncio.ensure_future(self._read(self._far, number))
        self._is({content_of(newer)})
        await self._network.end(read)
        await read
        await self._network.end(asyncio.ensure_future(self._far.storage.finish()))
        await self.look()

    async def look(self) -> None:
        """See what there is."""
        seen = content_of(await self._near.load(self._identity))
        assert seen in self._may_be
        if seen != self._was:  # what was not applied by now never will be
            self._is({seen})
        if seen is None:
            self._ended.append(self._identity)
            await self.log_in()

    async def look_back(self) -> None:
        """See that what has ended has."""
        for identity in self._ended:
            assert content_of(await self._near.load(identity)) is None

    async def _read(self, process: Process, number: int) -> None:
        with contextlib.suppress(ConnectionError):
            assert content_of(await process.load(self._identity)) in self._may_be

    async def _load(self, process: Process, number: int) -> None:
        with contextlib.suppress(ConnectionError):
            process.loaded = await process.load(self._identity)

    async def _save(self, process: Process, number: int) -> None:
        await self._load(process, number)
        await self._save_stale(process, number)

    async def _save_stale(self, process: Process, number: int) -> None:
        session, process.loaded = process.loaded, None
        if session is None:
            return
        base = content_of(session)
        if session.identity != self._identity:
            await self._save_over(process, session)
            return
        assert base is not None
        key = f"k{number % 3}"
        session[key] = number
        found = {base} if self._mode == "overwrite" else {now or base for now in self._may_be}
        after = {changed(content, key, number) for content in found}
        self._network.fail()
        try:
            cookie = await process.save(self._identity, session)
        except ConnectionError:
            self._may_be |= after
        else:
            assert cookie in (None, self._identity)
            self._is({*after})

    async def _save_over(self, process: Process, session: Session) -> None:
        """Save a session that has ended since it was loaded."""
        identity = str(session.identity)
        session["n"] = -1
        self._network.fail()
        with contextlib.suppress(ConnectionError):
            assert await process.save(identity, session) is None
        assert content_of(await self._near.load(identity)) is None

    async def _log_out(self, process: Process, number: int) -> None:
        try:
            session = await process.load(self._identity)
            session.invalidate()
            self._network.fail()
            await process.save(self._identity, session)
        except ConnectionError:
            self._may_be.add(None)
        else:
            self._is({None})


@contextlib.asynccontextmanager
async def single(server: Server) -> AsyncIterator[tuple[Any, Any, Network]]:
    async with (
        HeldProxy(server.port) as proxy,
        Redis(host=HOST, port=server.port) as near,
        Redis(host=HOST, port=proxy.port, **OPTIONS) as far,
    ):
        yield near, far, Network([proxy])


@contextlib.asynccontextmanager
async def memcached(server: Server) -> AsyncIterator[tuple[Any, Any, Network]]:
    async with HeldProxy(server.port) as proxy:
        proxy.keeps = lambda data: data.startswith((b"cas ", b"delete "))  # a write reads first
        near, far = aiomcache.Client(HOST, server.port), aiomcache.Client(HOST, proxy.port)
        yield near, far, Network([proxy])


@contextlib.asynccontextmanager
async def clustered(nodes: list[Server]) -> AsyncIterator[tuple[Any, Any, Network]]:
    async with contextlib.AsyncExitStack() as stack:
        proxies = {
            node.port: await stack.enter_async_context(HeldProxy(node.port)) for node in nodes
        }
        near: Any = RedisCluster(host=HOST, port=nodes[0].port)
        far: Any = RedisCluster(
            host=HOST,
            port=nodes[0].port,
            address_remap=lambda address: (HOST, proxies[address[1]].port),
            **OPTIONS,
        )
        stack.push_async_callback(near.aclose)
        stack.push_async_callback(far.aclose)
        yield near, far, Network(list(proxies.values()))


@contextlib.asynccontextmanager
async def guarded(group: tuple[Server, Server, Server]) -> AsyncIterator[tuple[Any, Any, Network]]:
    primary, _, sentinel = group

    async with HeldProxy(primary.port) as proxy:

        class ByProxy(SentinelManagedConnection):
            async def connect_to(self, address: tuple[str, int]) -> None:
                await super().connect_to((HOST, proxy.port))  # type: ignore[no-untyped-call]

        guard: Any = Sentinel([(HOST, sentinel.port)])  # type: ignore[no-untyped-call]
        near: Any = guard.master_for("sessions")
        far: Any = guard.master_for("sessions", connection_class=ByProxy, **OPTIONS)
        yield near, far, Network([proxy])
        for client in (near, far, *guard.sentinels):
            await client.aclose()


async def follow(open_all: Any, servers: Any, steps: list[Any], mode: Mode) -> None:
    async with open_all(servers) as (near_client, far_client, network):
        near, far = Process(near_client, mode), Process(far_client, mode)
        try:
            await take_steps(User(near, far, network, mode), near, far, network, steps)
        finally:
            network.heal()
            network.release()
            await far.storage.finish()
            await near.storage.finish()


async def take_steps(
    user: User, near: Process, far: Process, network: Network, steps: list[Any]
) -> None:
    await user.log_in()
    await far.load(user._identity)  # opens a connection
    for number, step in enumerate([*steps, "release"], 1):
        if step in ("hold", "lose"):
            network.failure = step
        elif step == "abandon":
            await user.abandon(number)
        elif step == "release":
            network.release()
            await near.storage.store.read("other")
            await user.look()
            await user.look_back()
        else:
            what, is_far = step
            await user.do(what, far if is_far else near, number)


def run(main: Any, *, on_uvloop: bool) -> None:
    loop = pytest.importorskip("uvloop").new_event_loop() if on_uvloop else asyncio.new_event_loop()
    try:
        loop.run_until_complete(main)
    finally:
        loop.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Server]]:
    with servers.redis_cluster() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def sentinel() -> Iterator[tuple[Server, Server, Server]]:
    with servers.redis_sentinel() as group:
        yield group


MODES = st.sampled_from(["overwrite", "merge"])
EXAMPLES: list[list[Any]] = [
    ["hold", ("save", True), ("save", False), "release"],
    ["hold", ("save", True), ("log out", False), "release"],
    [("load", True), ("log out", False), ("save stale", True)],
    [("load", True), ("save", False), "lose", ("save stale", True), ("read", True)],
    ["lose", ("log out", True), "hold", ("save", True), "release"],
    ["abandon", "release"],
]


def property_test(share: float) -> Callable[[_Test], _Test]:
    """Have hypothesis find steps, a mode and an event loop, after those that are known to be hard.

    :param share: of the examples that its profile has.
    """

    def decorate(test: _Test) -> _Test:
        for number, steps in enumerate(EXAMPLES):
            for mode in ("overwrite", "merge"):
                test = example(steps=steps, mode=mode, on_uvloop=bool(number % 2))(test)
        storages = settings.get_profile("storages")
        limited = settings(storages, max_examples=max(1, int(storages.max_examples * share)))
        return limited(given(steps=STEPS, mode=MODES, on_uvloop=st.booleans())(test))

    return decorate


@property_test(1)
def test_what_was_acknowledged_holds_in_redis(
    redis_server: Server, steps: list[Any], mode: Mode, on_uvloop: bool
) -> None:
    run(follow(single, redis_server, steps, mode), on_uvloop=on_uvloop)


@property_test(1)
def test_what_was_acknowledged_holds_in_memcached(
    memcached_server: Server, steps: list[Any], mode: Mode, on_uvloop: bool
) -> None:
    run(follow(memcached, memcached_server, steps, mode), on_uvloop=on_uvloop)


@property_test(1 / 3)
def test_what_was_acknowledged_holds_on_a_cluster(
    cluster: list[Server], steps: list[Any], mode: Mode, on_uvloop: bool
) -> None:
    run(follow(clustered, cluster, steps, mode), on_uvloop=on_uvloop)


@property_test(1 / 3)
def test_what_was_acknowledged_holds_behind_sentinel(
    sentinel: tuple[Server, Server, Server], steps: list[Any], mode: Mode, on_uvloop: bool
) -> None:
    run(follow(guarded, sentinel, steps, mode), on_uvloop=on_uvloop)
