"""RedisStorage when requests are cancelled, and when the server or the network fails."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import random
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from pytest_aiohttp.plugin import AiohttpClient
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from aiohttp_session import Session, get_session, setup
from aiohttp_session._core import write_command
from aiohttp_session.record_keys import random_id
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.stores import _redis_pipeline
from aiohttp_session.stores._redis_pipeline import READ
from benchmarks import servers
from benchmarks.servers import HOST, Server
from tests.proxy import Proxy
from tests.stores import innermost
from tests.storm import CANCELLED, REQUESTS, storm
from tests.waiting import PATIENCE, LoopClock, running, turns, until

Connect: TypeAlias = Callable[..., Any]
NO_RETRY = Retry(NoBackoff(), 0)


@pytest.fixture
async def proxy(redis_server: Server) -> AsyncIterator[Proxy]:
    async with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
async def connect(young_heap: None, proxy: Proxy, loop_clock: LoopClock) -> AsyncIterator[Connect]:
    """Makes clients by way of the proxy, which must leave nothing behind."""
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda loop, context: complaints.append(context)
    )
    clients: list[Any] = []

    def connect(port: int = proxy.port, **options: Any) -> Any:
        # The time limits are the storage's.
        limits = {"socket_timeout": None, "socket_connect_timeout": PATIENCE}
        clients.append(Redis(host=HOST, port=port, retry=NO_RETRY, **{**limits, **options}))
        return clients[-1]

    def is_in_use() -> bool:
        return any(client.connection_pool._in_use_connections for client in clients)

    yield connect
    proxy.resume()
    proxy.resume_requests()
    try:
        # A storage that is idle gives its connection back.
        await loop_clock.pass_until(lambda: not is_in_use())
    finally:
        for client in clients:
            await client.aclose()
        gc.collect()
    assert complaints == []


@pytest.fixture
async def client(connect: Connect) -> Any:
    client = connect()
    await client.flushall()
    return client


@functools.cache  # a mocked request takes more time than the test
def request_of(identity: str) -> web.Request:
    return make_mocked_request("GET", "/", headers={"Cookie": f"AIOHTTP_SESSION={identity}"})


async def login(storage: RedisStorage, user: str) -> None:
    """Store the session of a user under an id that is the user's name."""
    await storage.store.create(
        f"AIOHTTP_SESSION_{user}", b'{"session":{"user":"%s"}}' % user.encode(), None
    )


async def save(storage: RedisStorage, session: Session, identity: str) -> web.Response:
    response = web.Response()
    await storage.save_session(request_of(identity), response, session)
    return response


@pytest.mark.parametrize("decode_responses", [False, True])
async def test_a_storm_of_cancelled_requests_harms_no_other(
    proxy: Proxy, connect: Connect, decode_responses: bool
) -> None:
    client = connect(max_connections=8, decode_responses=decode_responses)
    storage = RedisStorage(client, timeout=PATIENCE)
    users = [f"user{i}" for i in range(50)]
    for user in users:
        await login(storage, user)
    choose = random.Random(7)

    async def request() -> str:
        user = choose.choice(users)
        session = await storage.load_session(request_of(user))
        if choose.random() < 0.5:
            session["n"] = session.get("n", 0) + 1
            await save(storage, session, user)
        if session.new:
            return "lost"
        return "served" if session["user"] == user else "a stranger's"

    outcomes = await storm(proxy, request)
    await storage.finish()
    assert outcomes == ["served"] * (REQUESTS - CANCELLED)
    assert len(client.connection_pool._in_use_connections) == 0
    assert len(client.connection_pool._available_connections) <= 8


async def test_a_request_cancelled_in_mid_reply_leaves_no_reply_behind(
    proxy: Proxy, client: Any
) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    for user in ("a", "b"):
        await login(storage, user)
    proxy.hold()
    passed = proxy.passed
    doomed = asyncio.ensure_future(storage.load_session(request_of("a")))
    await until(lambda: proxy.passed > passed)
    doomed.cancel()
    await asyncio.wait([doomed])
    proxy.resume()
    assert (await storage.load_session(request_of("b")))["user"] == "b"


async def test_a_save_that_was_begun_is_finished_when_its_request_is_cancelled(
    proxy: Proxy, client: Any
) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    await login(storage, "a")
    session = await storage.load_session(request_of("a"))
    session["n"] = 0
    await save(storage, session, "a")  # finds out how the server swaps
    session["n"] = 1
    proxy.hold_requests()
    task = asyncio.ensure_future(save(storage, session, "a"))
    await until(lambda: proxy.held_requests)
    task.cancel()
    await asyncio.wait([task])
    proxy.resume_requests()
    await storage.finish()
    assert (await storage.load_session(request_of("a")))["n"] == 1


async def test_a_slow_request_does_not_bring_back_a_session_that_logged_out(client: Any) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    user = random_id()
    await login(storage, user)
    slow = await storage.load_session(request_of(user))
    logout = await storage.load_session(request_of(user))
    logout.invalidate()
    response = await save(storage, logout, user)
    assert response.cookies["AIOHTTP_SESSION"]["max-age"] == "0"
    slow["n"] = 1
    response = await save(storage, slow, user)
    assert not response.cookies
    assert (await storage.load_session(request_of(user))).new
    assert await client.dbsize() == 0


async def test_logouts_and_slow_requests_in_any_order_leave_no_session(client: Any) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    choose = random.Random(3)

    async def race(user: str) -> None:
        await login(storage, user)
        sessions = [await storage.load_session(request_of(user)) for _ in range(4)]
        for session in sessions[1:]:
            session["n"] = 1
        sessions[0].invalidate()

        async def late(session: Session) -> None:
            for _ in range(choose.randrange(4)):
                await asyncio.sleep(0)
            await save(storage, session, user)

        await asyncio.gather(*map(late, sessions))

    await asyncio.gather(*(race(random_id()) for _ in range(100)))
    assert await client.dbsize() == 0


async def test_an_id_that_the_store_does_not_know_is_not_adopted(client: Any) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    session = await storage.load_session(request_of("planted"))
    session["n"] = 1
    response = await save(storage, session, "planted")
    assert response.cookies["AIOHTTP_SESSION"].value != "planted"
    assert not await client.exists("AIOHTTP_SESSION_planted")


async def test_a_refused_connection_is_the_clients_error(proxy: Proxy, client: Any) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    await login(storage, "a")
    await proxy.refuse()
    for verb in (
        storage.store.read("k"),
        storage.store.create("k", b"1", 1),
        storage.store.swap("k", b"1", b"2", 1),
        storage.store.swap("k", None, b"2", 1),
        storage.store.delete("k"),
    ):
        with pytest.raises(exceptions.ConnectionError):
            await verb
    many = await asyncio.gather(
        *(storage.store.read("k") for _ in range(100)), return_exceptions=True
    )
    assert {type(error) for error in many} <= {exceptions.ConnectionError}
    await proxy.listen()
    assert (await storage.load_session(request_of("a")))["user"] == "a"


async def test_a_stale_connection_harms_no_request(proxy: Proxy, client: Any) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    await login(storage, "a")
    for _ in range(5):
        await proxy.cut()
        loads = [storage.load_session(request_of("a")) for _ in range(10)]
        assert all(session["user"] == "a" for session in await asyncio.gather(*loads))


@pytest.mark.parametrize("budget", [1, 7, 30, 200])
async def test_a_connection_killed_in_mid_reply_harms_no_request(
    proxy: Proxy, client: Any, budget: int
) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    users = [f"user{i}" for i in range(20)]
    for user in users:
        await login(storage, user)
    proxy.reply_budget = budget
    tasks = [asyncio.ensure_future(storage.load_session(request_of(user))) for user in users]
    await until(lambda: proxy.reply_budget == 0)
    proxy.reply_budget = None
    for user, outcome in zip(
        users, await asyncio.gather(*tasks, return_exceptions=True), strict=True
    ):
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, exceptions.ConnectionError)
        else:
            assert outcome["user"] == user
    for user in users:
        assert (await storage.load_session(request_of(user)))["user"] == user


async def test_a_connection_with_health_checks_that_is_cut_harms_no_request(
    proxy: Proxy, connect: Connect
) -> None:
    client = connect(health_check_interval=60)
    storage = RedisStorage(client, timeout=PATIENCE)
    await login(storage, "a")
    passed = proxy.passed
    proxy.hold()
    load = asyncio.ensure_future(storage.load_session(request_of("a")))
    await until(lambda: proxy.passed > passed)
    await proxy.cut()
    proxy.resume()
    assert (await load)["user"] == "a"


async def test_an_error_as_a_reply_costs_no_connection(proxy: Proxy, connect: Connect) -> None:
    client = connect(health_check_interval=60)
    await client.flushall()
    await client.lpush("list", "x")
    storage = RedisStorage(client, timeout=PATIENCE)
    with pytest.raises(exceptions.ResponseError, match="WRONGTYPE"):
        await storage.store.read("list")
    assert await storage.store.read("k") is None
    assert proxy.accepted == 1


async def test_replies_in_small_pieces_are_whole(proxy: Proxy, client: Any) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    proxy.fragment = 3
    for user in ("a", "b", "c"):
        await login(storage, user)
    loads = [storage.load_session(request_of(user)) for user in "abcabc"]
    assert [session["user"] for session in await asyncio.gather(*loads)] == list("abcabc")


@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$-7\r\n\0", b"%x\r\n"])
async def test_a_reply_that_is_not_redis_is_the_clients_error(
    proxy: Proxy, client: Any, reply: bytes
) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    await login(storage, "a")
    proxy.fake_reply = reply
    with pytest.raises((exceptions.RedisError, ValueError)):  # the latter without hiredis
        await storage.store.read("k")
    proxy.fake_reply = None
    assert (await storage.load_session(request_of("a")))["user"] == "a"


@pytest.mark.parametrize("odd", [b">2\r\n+invalidate\r\n*0\r\n", b"#t\r\n", b"$1\r\nab\r\n"])
async def test_what_a_pipelined_connection_does_not_understand_is_asked_for_again(
    proxy: Proxy, client: Any, odd: bytes
) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    await login(storage, "a")
    proxy.fake_reply, proxy.fake_replies = odd, 1
    assert (await storage.load_session(request_of("a")))["user"] == "a"
    assert proxy.accepted > 1


async def test_a_reply_too_many_costs_the_connection(proxy: Proxy, client: Any) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    await login(storage, "a")
    proxy.fake_reply = b"$1\r\n1\r\n$1\r\n2\r\n"
    assert await storage.store.read("k") == b"1"
    proxy.fake_reply = None
    assert await storage.store.read("k") is None
    assert proxy.accepted == 2


async def test_a_loading_server_is_the_clients_error(proxy: Proxy, client: Any) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    await login(storage, "a")
    proxy.fake_reply = b"-LOADING Redis is loading the dataset in memory\r\n"
    with pytest.raises(exceptions.BusyLoadingError):
        await storage.store.read("k")
    proxy.fake_reply = None
    assert (await storage.load_session(request_of("a")))["user"] == "a"


@pytest.mark.parametrize("socket_timeout", [None, 2 * PATIENCE, PATIENCE / 3])
async def test_a_server_that_never_answers_is_a_timeout(
    proxy: Proxy, connect: Connect, loop_clock: LoopClock, socket_timeout: float | None
) -> None:
    client = connect(socket_timeout=socket_timeout)
    storage = RedisStorage(client, timeout=PATIENCE, circuit_breaker=False)
    await login(storage, "a")
    proxy.hold()
    expected = TimeoutError, exceptions.TimeoutError
    reads = asyncio.gather(*(storage.store.read("k") for _ in range(200)), return_exceptions=True)
    assert await loop_clock.pass_until(reads.done) < 1.1 * PATIENCE
    assert all(isinstance(outcome, expected) for outcome in await reads)
    passed = proxy.passed
    late = asyncio.ensure_future(storage.load_session(request_of("a")))
    await until(lambda: proxy.passed > passed)
    proxy.resume()  # the late replies must reach nobody
    assert (await late)["user"] == "a"
    await storage.finish()
    assert len(client.connection_pool._in_use_connections) == 0


async def test_a_first_request_that_is_not_answered_leaves_no_reply_behind(
    proxy: Proxy, client: Any, loop_clock: LoopClock
) -> None:
    storage = RedisStorage(client, timeout=PATIENCE, circuit_breaker=False)
    await client.mset({"a": b"1", "b": b"2"})  # so that there is a connection
    proxy.hold()
    first = asyncio.ensure_future(storage.store.read("a"))
    await until(lambda: proxy.held_replies)
    await loop_clock.pass_until(first.done)
    with pytest.raises(TimeoutError):
        await first
    proxy.resume()
    assert await storage.store.read("b") == b"2"


async def test_a_connection_that_went_dead_is_replaced_within_the_timeout(
    proxy: Proxy, client: Any, loop_clock: LoopClock
) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    await login(storage, "a")
    assert (await storage.load_session(request_of("a")))["user"] == "a"
    dead = proxy.accepted
    proxy.hold()
    load = asyncio.ensure_future(storage.load_session(request_of("a")))
    await loop_clock.pass_until(lambda: proxy.accepted > dead)
    assert not load.done()
    proxy.resume()
    assert (await load)["user"] == "a"


async def test_pipelined_connections_that_are_left_lose_nothing(
    client: Any, loop_clock: LoopClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_redis_pipeline, "_MAX_AGE", 0)
    storage = RedisStorage(client, timeout=PATIENCE)
    users = [f"user{i}" for i in range(20)]
    for user in users:
        await login(storage, user)
    connections = set()
    server = innermost(storage)._servers.get()

    async def visitor(user: str) -> None:
        for _ in range(100):
            assert (await storage.load_session(request_of(user)))["user"] == user
            connections.add(server._pipeline)
            loop_clock.advance(0.05)

    await asyncio.gather(*map(visitor, users))
    await storage.finish()
    assert len(connections) > 3
    assert len(client.connection_pool._available_connections) <= 5


async def test_finish_waits_for_replies_that_are_due(proxy: Proxy, client: Any) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    await login(storage, "a")
    proxy.hold_requests()
    deleted = asyncio.ensure_future(storage.store.delete("AIOHTTP_SESSION_a"))
    await until(lambda: proxy.held_requests)
    finish = asyncio.ensure_future(storage.finish())
    await turns()
    assert not finish.done()
    proxy.resume_requests()
    await finish
    assert await client.dbsize() == 0
    await deleted


async def test_when_all_tasks_are_cancelled_the_storage_can_go_on(
    proxy: Proxy, client: Any
) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    await login(storage, "a")
    proxy.hold_requests()
    load = (
        innermost(storage)
        ._servers.get()
        .submit(("k", write_command(b"GET", b"k"), (lambda client, key: client.get(key),), READ))
    )
    await until(lambda: proxy.held_requests)
    server = innermost(storage)._servers.get()
    server._pipeline._task.cancel()
    await asyncio.wait([load])
    assert load.cancelled()
    proxy.resume_requests()
    assert (await storage.load_session(request_of("a")))["user"] == "a"


async def test_a_server_that_restarts_under_load_harms_no_request_after_it(
    connect: Connect,
) -> None:
    port = servers.free_port()
    client = connect(port)
    storage = RedisStorage(client, timeout=PATIENCE)
    users = [f"user{i}" for i in range(20)]
    strangers: list[str] = []
    served: Counter[str] = Counter()  # by the phase in which the request began
    errors: dict[str, list[Exception]] = defaultdict(list)
    ended: dict[str, set[str]] = defaultdict(set)  # those who had a request, served or not
    phase = "before"

    async def visitor(user: str) -> None:
        while served["after"] < 500 and not errors["after"]:
            begun = phase
            try:
                session = await storage.load_session(request_of(user))
                if not session.new and session["user"] != user:
                    strangers.append(user)
                session["user"] = user
                await save(storage, session, user)
            except (exceptions.RedisError, OSError, TimeoutError) as error:
                errors[begun].append(error)
                await asyncio.sleep(0.01)
            else:
                served[begun] += 1
            ended[begun].add(user)

    with contextlib.ExitStack() as server:
        server.enter_context(servers.redis(port=port))
        for user in users:
            await login(storage, user)
        async with running(*map(visitor, users)) as visitors:
            await until(lambda: served["before"] >= 100 or errors["before"])
            assert not errors["before"]
            phase = "during"
            server.close()
            await until(lambda: errors["during"])
            server.enter_context(servers.redis(port=port))
            phase = "again"
            await until(lambda: len(ended["again"]) == len(users))  # what was refused is over
            phase = "after"
            await visitors
        for user in users:
            await login(storage, user)
            assert (await storage.load_session(request_of(user)))["user"] == user
        assert (errors["after"], strangers) == ([], [])
        await storage.finish()
        assert len(client.connection_pool._in_use_connections) == 0


async def test_a_disk_that_fails_refuses_saves_but_no_loads(connect: Connect) -> None:
    with servers.redis() as server:
        client = connect(server.port)
        storage = RedisStorage(client, timeout=PATIENCE)
        await login(storage, "a")
        session = await storage.load_session(request_of("a"))
        session["n"] = 1
        folder = Path((await client.config_get("dir"))["dir"])
        (folder / "dump.rdb").mkdir()  # where the server wants to write a file
        await client.config_set("save", "1 1")
        await client.bgsave()
        for _ in range(PATIENCE * 100):
            if (await client.info("persistence"))["rdb_last_bgsave_status"] != "ok":
                break
            await asyncio.sleep(0.01)
        with pytest.raises(exceptions.ResponseError, match="MISCONF"):
            await save(storage, session, "a")
        assert (await storage.load_session(request_of("a")))["user"] == "a"
        await client.config_set("save", "")
        await save(storage, session, "a")


async def test_cleanup_of_the_application_finishes_saves(
    proxy: Proxy, client: Any, aiohttp_client: AiohttpClient
) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    app = web.Application()
    setup(app, storage)

    handled = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        (await get_session(request))["n"] = 1
        handled.set()
        return web.Response()

    app.router.add_get("/", handler)
    app.on_cleanup.append(lambda app: client.aclose())
    web_client = await aiohttp_client(app)
    proxy.hold_requests()
    request = asyncio.ensure_future(web_client.get("/"))
    await handled.wait()
    await until(lambda: proxy.held_requests)
    request.cancel()
    await asyncio.wait([request])
    closing = asyncio.ensure_future(web_client.close())
    await turns(50)
    proxy.resume_requests()
    await closing
    assert len(await client.keys("*")) == 1


async def test_errors_hold_nothing_of_the_session(client: Any) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    await client.lpush("AIOHTTP_SESSION_secret", "x")
    with pytest.raises(exceptions.ResponseError) as caught:
        await storage.load_session(request_of("secret"))
    assert not re.search("secret", str(caught.value))


async def test_after_a_pause_of_the_process_replies_that_have_come_are_read(
    proxy: Proxy, client: Any, loop_clock: LoopClock
) -> None:
    storage = RedisStorage(client, timeout=PATIENCE)
    await login(storage, "a")
    assert (await storage.load_session(request_of("a")))["user"] == "a"
    proxy.hold()
    load = asyncio.ensure_future(storage.load_session(request_of("a")))
    await until(lambda: proxy.held_replies)
    connections = proxy.accepted
    loop_clock.advance(0.9 * PATIENCE)
    await turns()
    proxy.resume()
    assert (await load)["user"] == "a"
    assert proxy.accepted == connections
