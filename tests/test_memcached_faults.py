"""MemcachedStorage when requests are cancelled, and when the server or the network fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, cast

import aiomcache
import pytest
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_session import get_session, session_middleware, setup
from aiohttp_session._core import FutureGroup
from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.record_keys import random_id
from aiohttp_session.stores import UnsettledError
from aiohttp_session.stores._memcached_connection import Connection
from aiohttp_session.stores._memcached_protocol import Command, ConnectionLostError
from benchmarks import servers
from benchmarks.servers import HOST
from tests.proxy import Proxy
from tests.storm import CANCELLED, REQUESTS, storm
from tests.waiting import PATIENCE, LoopClock, running, turns, until

MakeStorage: TypeAlias = Callable[..., MemcachedStorage]

OWN_ERRORS = (OSError, aiomcache.ClientException)  # TimeoutError is an OSError
VERBS: dict[str, Callable[[MemcachedStorage], Awaitable[object]]] = {
    "read": lambda storage: storage.store.read("k"),
    "create": lambda storage: storage.store.create("k", b"1", None),
    "swap": lambda storage: storage.store.swap("k", b"1", b"1", None),
    "add": lambda storage: storage.store.swap("none", None, b"1", None),
    "delete": lambda storage: storage.store.delete("other"),
}

every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
SENT_ONCE = {VERBS["create"], VERBS["add"]}


@pytest.fixture
async def make_storage(proxy: Proxy) -> AsyncIterator[MakeStorage]:
    """Makes storages by way of the proxy, or on another port, which must leave nothing behind."""
    storages: list[MemcachedStorage] = []

    def make_storage(port: int = proxy.port) -> MemcachedStorage:
        client = aiomcache.Client(HOST, port, pool_size=8)
        # Tests of the store itself: what is in front of it has tests of its own.
        storages.append(MemcachedStorage(client, timeout=PATIENCE, circuit_breaker=False))
        return storages[-1]

    yield make_storage
    proxy.resume()
    proxy.resume_requests()
    proxy.fake_reply = None
    for storage in storages:
        await storage.finish()
    await proxy.cut()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture
async def storage(make_storage: MakeStorage) -> MemcachedStorage:
    storage = make_storage()
    await storage.store.create("k", b"1", None)
    return storage


async def works(storage: MemcachedStorage) -> bool:
    await storage.store.create("after", b"1", None)
    return await storage.store.read("after") == b"1" and await storage.store.swap(
        "after", b"1", b"2", None
    )


class Request(dict[str, Any]):
    """As much of a request as the middleware needs; aiohttp's mock of one takes milliseconds."""

    def __init__(self, headers: CIMultiDictProxy[str]) -> None:
        self.headers = headers


class Visitor:
    """A user whose requests go through the middleware."""

    def __init__(self, storage: MemcachedStorage, identity: str) -> None:
        self.key = f"{storage.cookie_name}_{identity}"
        self._middleware = session_middleware(storage)
        cookie = f"{storage.cookie_name}={identity}"
        self._headers = CIMultiDictProxy(CIMultiDict({"Cookie": cookie}))

    async def visit(
        self, handler: Callable[[web.Request], Awaitable[web.Response]]
    ) -> web.StreamResponse:
        return await self._middleware(cast("web.Request", Request(self._headers)), handler)


async def test_a_storm_of_cancelled_requests_harms_no_other(
    proxy: Proxy, storage: MemcachedStorage
) -> None:
    dice = random.Random(1)
    users = {name: Visitor(storage, name) for name in (f"user{n}" for n in range(50))}
    for name, user in users.items():
        payload = f'{{"created": 1700000000, "session": {{"name": "{name}", "count": 0}}}}'
        await storage.store.create(user.key, payload.encode(), None)

    async def visit() -> str:
        name, writes = dice.choice(list(users)), dice.random() < 0.5

        async def handler(request: web.Request) -> web.Response:
            session = await get_session(request)
            if writes and session:
                session["count"] += 1
            return web.Response(reason=session.get("name", "lost"))

        response = await users[name].visit(handler)
        return "right" if response.reason == name else f"wrong: {response.reason}"

    assert await storm(proxy, visit) == ["right"] * (REQUESTS - CANCELLED)


async def test_logout_during_a_slow_request_stays_a_logout(
    storage: MemcachedStorage, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = Visitor(storage, random_id())
    await storage.store.create(
        visitor.key, b'{"created": 1700000000, "session": {"name": "a"}}', None
    )
    logged_out = asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        session = await get_session(request)
        session["seen"] = True
        await logged_out.wait()
        return web.Response()

    async def logout(request: web.Request) -> web.Response:
        (await get_session(request)).invalidate()
        return web.Response()

    task = asyncio.ensure_future(visitor.visit(slow))
    await visitor.visit(logout)
    logged_out.set()
    with caplog.at_level(logging.WARNING):
        response = await task
    assert await storage.store.read(visitor.key) is None
    assert storage.cookie_name not in response.cookies
    assert "dropped" in caplog.text


@every_verb
async def test_refused_connection_is_an_error_at_once(
    proxy: Proxy, storage: MemcachedStorage, verb: Callable[[MemcachedStorage], Awaitable[object]]
) -> None:
    await proxy.refuse()
    results = await asyncio.gather(*(verb(storage) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [ConnectionRefusedError] * 3
    await proxy.listen()
    assert await works(storage)


@every_verb
@pytest.mark.parametrize("replied", [0, 1, 7, 20])
async def test_connection_cut_in_mid_reply_is_an_error_at_once(
    proxy: Proxy,
    storage: MemcachedStorage,
    verb: Callable[[MemcachedStorage], Awaitable[object]],
    replied: int,
) -> None:
    proxy.reply_budget = replied
    results = await asyncio.gather(*(verb(storage) for _ in range(10)), return_exceptions=True)
    failed = {type(result) for result in results if isinstance(result, Exception)}
    is_repeated = verb in (VERBS["read"], VERBS["delete"])
    assert failed == {ConnectionLostError if is_repeated else UnsettledError}
    proxy.reply_budget = None
    assert await works(storage)


@every_verb
async def test_server_that_does_not_answer_is_a_timeout(
    proxy: Proxy,
    make_storage: MakeStorage,
    loop_clock: LoopClock,
    verb: Callable[[MemcachedStorage], Awaitable[object]],
) -> None:
    storage = make_storage()
    proxy.hold()
    calls = asyncio.gather(*(verb(storage) for _ in range(3)), return_exceptions=True)
    await until(lambda: proxy.held_replies)
    assert await loop_clock.pass_until(calls.done) < 1.1 * PATIENCE
    results = await calls
    if verb in SENT_ONCE:  # the connection is given up while there is time to find out
        assert [type(result) for result in results] == [UnsettledError] * 3
    else:
        assert [type(result) for result in results] == [TimeoutError] * 3
        assert f"{PATIENCE} seconds" in str(results[0])
    proxy.resume()
    assert await works(storage)


async def test_read_that_is_repeated_just_before_its_time_is_up_waits_no_longer(
    proxy: Proxy, storage: MemcachedStorage, loop_clock: LoopClock
) -> None:
    waited: list[float] = []

    async def visit(key: str) -> None:
        since = loop_clock()
        with pytest.raises(TimeoutError):
            await storage.store.read(key)
        waited.append(loop_clock() - since)

    proxy.hold()
    visits = []
    # The second is repeated with the first, last when that one's time is up. Then the timer was
    # set for the third, which goes by another connection.
    for connections, pause in ((1, 0.9), (1, PATIENCE / 3), (2, PATIENCE / 6 - 1)):
        visits.append(asyncio.ensure_future(visit(f"{pause}")))
        await turns()
        await until(lambda: proxy.held_replies == connections)  # noqa: B023
        loop_clock.advance(pause)
    await loop_clock.pass_until(lambda: all(visit.done() for visit in visits))
    assert max(waited) < 1.05 * PATIENCE


async def test_idle_connection_is_no_timeout_but_is_watched_when_used_again(
    proxy: Proxy, storage: MemcachedStorage, loop_clock: LoopClock
) -> None:
    loop_clock.advance(PATIENCE)  # the deadline of the save is past
    await turns()
    assert await storage.store.read("k") == b"1"
    assert proxy.accepted == 1
    proxy.hold()
    loop_clock.advance(PATIENCE)
    await turns()
    read = asyncio.ensure_future(storage.store.read("k"))
    assert await loop_clock.pass_until(read.done) < 1.1 * PATIENCE
    with pytest.raises(TimeoutError, match="memcached"):
        await read


async def test_connection_that_is_not_made_in_time_is_a_timeout(
    make_storage: MakeStorage, loop_clock: LoopClock
) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    storage = make_storage(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "create_connection", never)
        read = asyncio.ensure_future(storage.store.read("k"))
        await loop_clock.pass_until(read.done)
    with pytest.raises(TimeoutError):
        await read
    await turns()
    assert len(asyncio.all_tasks()) == 1


async def test_connection_that_is_made_after_it_was_given_up_sends_nothing(proxy: Proxy) -> None:
    loop = asyncio.get_running_loop()
    connection = Connection(
        [], 5, FutureGroup(loop), lambda command, error: command.settle(error), lambda: None
    )
    connection.opening = loop.create_task(asyncio.sleep(0))
    command = Command(b"delete", b"delete k\r\n", 0, loop.time() + 5, FutureGroup(loop))
    connection.send([command], loop.time())
    connection.fail(TimeoutError("too late"))
    with pytest.raises(TimeoutError, match="too late"):
        await command.future
    await loop.create_connection(lambda: connection, HOST, proxy.port)
    await until(lambda: proxy.accepted)
    await proxy.settles(0)
    assert proxy.passed == 0


async def test_late_reply_reaches_nobody(
    proxy: Proxy, storage: MemcachedStorage, loop_clock: LoopClock
) -> None:
    for name in "ab":
        await storage.store.create(name, name.encode(), None)
    proxy.hold()
    late = asyncio.ensure_future(storage.store.read("a"))
    await until(lambda: proxy.held_replies)
    await loop_clock.pass_until(late.done)
    with pytest.raises(TimeoutError):
        await late
    proxy.resume()
    assert await asyncio.gather(*(storage.store.read(name) for name in "bba")) == [b"b", b"b", b"a"]


@pytest.mark.parametrize(
    "reply",
    [
        b"\r\n",
        b"STORED\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"+OK\r\n",
        b"ERROR\r\n",
        b"ERROR Too many open connections\r\n",
        b"CLIENT_ERROR bad command line format\r\n",
        b"SERVER_ERROR out of memory writing get response\r\n",
        b"VALUE\r\n",
        b"VALUE k 0 -7 7\r\n1\r\nEND\r\n",
        b"VALUE k 0 x 7\r\n1\r\nEND\r\n",
        b"VALUE k 0 1 7\r\n123\r\nEND\r\n",
        b"VALUE k 1 1 7\r\n123\r\nEND\r\n",
        b"VALUE k 0 1\r\n1\r\nEND\r\n",
        b"VALUE stranger 0 1 7\r\n1\r\nEND\r\n",
        b"\x00\xff" * 3000,
    ],
)
async def test_garbage_in_place_of_a_record_is_an_error(
    proxy: Proxy, storage: MemcachedStorage, reply: bytes
) -> None:
    proxy.fake_reply = reply
    results = await asyncio.gather(
        storage.store.read("k"), storage.store.read("other"), return_exceptions=True
    )
    assert [type(result) for result in results] == [aiomcache.ClientException] * 2
    proxy.fake_reply = None
    assert await works(storage)


@pytest.mark.parametrize(
    ("verb", "reply"),
    [
        ("create", b"NOT_STORED\r\n"),
        ("create", b"SERVER_ERROR out of memory storing object\r\n"),
        ("create", b"CLIENT_ERROR bad data chunk\r\n"),
        ("create", b"END\r\n"),
        ("add", b"EXISTS\r\n"),
        ("add", b"DELETED\r\n"),
        ("cas", b"DELETED\r\n"),
        ("cas", b"NOT_STORED\r\n"),
        ("cas", b"VALUE k 0 1 7\r\n1\r\nEND\r\n"),
        ("cas", b"1\r\n"),
        ("swap", b"END\r\nSTORED\r\n"),
        ("delete", b"STORED\r\n"),
        ("delete", b"VERSION 1.6\r\n"),
    ],
)
async def test_reply_of_another_kind_is_an_error(
    proxy: Proxy, storage: MemcachedStorage, verb: str, reply: bytes
) -> None:
    if verb == "cas":
        verb = "swap"
        assert await storage.store.read("k") == b"1"  # and its token
    proxy.fake_reply = reply
    before = proxy.accepted
    with contextlib.suppress(*OWN_ERRORS):
        assert await VERBS[verb](storage) is False
        assert verb == "swap"  # it saw no record, and the rest of the reply is nobody's
    assert proxy.accepted <= before + 3  # however often each connection is lost
    proxy.fake_reply = None
    assert await works(storage)


async def test_reply_that_nobody_asked_for_ends_the_connection(
    proxy: Proxy, storage: MemcachedStorage
) -> None:
    proxy.fake_reply = b"END\r\nVALUE k 0 5 7\r\nwrong\r\nEND\r\n"
    assert await storage.store.read("k") is None
    proxy.fake_reply = None
    before = proxy.accepted
    assert await storage.store.read("k") == b"1"
    assert proxy.accepted == before + 1


async def test_finish_waits_no_longer_than_a_command_may_take(
    proxy: Proxy, storage: MemcachedStorage, loop_clock: LoopClock
) -> None:
    proxy.hold()
    read = asyncio.ensure_future(storage.store.read("k"))
    finish = asyncio.ensure_future(storage.finish())
    assert await loop_clock.pass_until(finish.done) < 1.1 * PATIENCE
    with pytest.raises(OSError):  # its time is up, or the connection was closed
        await read


async def test_record_that_is_never_complete_is_a_timeout(
    proxy: Proxy, storage: MemcachedStorage, loop_clock: LoopClock
) -> None:
    proxy.fake_reply = b"VALUE k 0 1000 7\r\n123"
    read = asyncio.ensure_future(storage.store.read("k"))
    await loop_clock.pass_until(read.done)
    proxy.fake_reply = None
    with pytest.raises(TimeoutError):
        await read
    assert await works(storage)
    # The connection may have a little time left, by this clock.
    finish = asyncio.ensure_future(storage.finish())
    await loop_clock.pass_until(finish.done)


async def test_errors_do_not_name_keys_or_contents(proxy: Proxy, storage: MemcachedStorage) -> None:
    for reply in (
        b"VALUE key-secret 0 x 7\r\n",
        b"VALUE key-secret 0 6 7\r\nsecret\r\n",
        b"secret\r\n",
    ):
        proxy.fake_reply = reply
        proxy.reply_budget = len(reply)
        for attempt in (
            storage.store.read("key-hidden"),
            storage.store.create("k", b"secret", None),
        ):
            with pytest.raises(OWN_ERRORS) as caught:
                await attempt
            assert "secret" not in str(caught.value)
            proxy.reply_budget = 0


async def test_server_restarted_under_load_harms_no_request_after(
    make_storage: MakeStorage,
) -> None:
    port = servers.free_port()
    storage = make_storage(port)
    names = [f"user{number}" for number in range(20)]
    served: Counter[str] = Counter()  # by the phase in which the request began
    failed: Counter[str] = Counter()
    ended: dict[str, set[str]] = defaultdict(set)  # those who had a request, served or not
    phase = "before"

    async def user(name: str) -> None:
        while served["after"] < 500 and not failed["after"]:
            begun = phase
            try:
                await storage.store.create(name, name.encode(), None)
                # The restart empties the server in between.
                assert await storage.store.read(name) in {name.encode(), None}
            except OWN_ERRORS:
                failed[begun] += 1
            else:
                served[begun] += 1
            ended[begun].add(name)
            await asyncio.sleep(0.001)

    with contextlib.ExitStack() as server:
        await asyncio.to_thread(server.enter_context, servers.memcached(port=port))
        async with running(*map(user, names)) as users:
            await until(lambda: served["before"] >= 100 or failed["before"])
            assert not failed["before"]
            phase = "during"
            await asyncio.to_thread(server.close)
            await until(lambda: failed["during"])
            await asyncio.to_thread(server.enter_context, servers.memcached(port=port))
            phase = "again"
            await until(lambda: len(ended["again"]) == len(names))  # what was refused is over
            phase = "after"
            await users
        assert not failed["after"]
        await storage.finish()


async def test_idle_connection_is_not_used_after_the_server_closed_it(
    proxy: Proxy, storage: MemcachedStorage
) -> None:
    for _ in range(3):
        await proxy.cut()
        assert await storage.store.read("k") == b"1"


async def test_application_ends_with_its_saves_done_and_connections_closed(
    proxy: Proxy,
    storage: MemcachedStorage,
    make_storage: MakeStorage,
    aiohttp_client: AiohttpClient,
) -> None:
    own = make_storage()

    async def handler(request: web.Request) -> web.Response:
        (await get_session(request))["name"] = "a"
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handler)
    setup(app, own)
    client = await aiohttp_client(app)
    connections = proxy.open
    response = await client.get("/")
    identity = response.cookies[own.cookie_name].value
    assert proxy.open == connections + 1
    await client.close()
    await proxy.settles(connections)
    assert b'"a"' in (await storage.store.read(f"{own.cookie_name}_{identity}") or b"")
