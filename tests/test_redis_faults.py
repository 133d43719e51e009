"""RedisStorage when requests are cancelled, and when the server or the network fails."""

from __future__ import annotations

import asyncio
import functools
import gc
import random
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from pytest_aiohttp.plugin import AiohttpClient
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from aiohttp_session import Session, get_session, setup
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.stores import _redis_pipeline
from aiohttp_session.stores._redis_pipeline import READ
from aiohttp_session.stores._redis_resp import pack
from benchmarks import servers
from benchmarks.servers import HOST, Server
from tests.proxy import Proxy

NO_RETRY = Retry(NoBackoff(), 0)


@pytest.fixture
async def proxy(redis_server: Server) -> AsyncIterator[Proxy]:
    async with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[Any]:
    """A client by way of the proxy, which must leave nothing behind."""
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda loop, context: complaints.append(context)
    )
    client: Any = Redis(host=HOST, port=proxy.port, retry=NO_RETRY)
    await client.flushall()
    yield client
    for _ in range(500):
        if not client.connection_pool._in_use_connections:
            break
        await asyncio.sleep(0.01)  # until a storage that is idle gives its connection back
    assert len(client.connection_pool._in_use_connections) == 0
    await client.aclose()
    gc.collect()
    assert complaints == []


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
    proxy: Proxy, decode_responses: bool
) -> None:
    client: Any = Redis(
        host=HOST, port=proxy.port, max_connections=8, decode_responses=decode_responses
    )
    storage = RedisStorage(client)
    users = [f"user{i}" for i in range(50)]
    for user in users:
        await login(storage, user)
    choose = random.Random(7)
    lost, strangers = [], []

    async def visit(user: str, writes: bool) -> None:
        session = await storage.load_session(request_of(user))
        if session.new:
            lost.append(user)
        elif session["user"] != user:
            strangers.append(user)
        if writes:
            session["n"] = session.get("n", 0) + 1
            await save(storage, session, user)

    async def request() -> str:
        await asyncio.sleep(choose.random() * 0.5)
        task = asyncio.ensure_future(visit(choose.choice(users), choose.random() < 0.5))
        if choose.random() < 0.3:
            await asyncio.sleep(choose.random() * 0.003)
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled"
        return "served"

    outcomes = await asyncio.gather(*(request() for _ in range(6000)))
    await storage.finish()
    assert (lost, strangers) == ([], [])
    assert outcomes.count("cancelled") > 300
    assert len(client.connection_pool._in_use_connections) == 0
    assert len(client.connection_pool._available_connections) <= 8
    await client.aclose()


async def test_a_request_cancelled_in_mid_reply_leaves_no_reply_behind(
    proxy: Proxy, client: Any
) -> None:
    storage = RedisStorage(client, timeout=2)
    for user in ("a", "b"):
        await login(storage, user)
    proxy.hold()
    passed = proxy.passed
    doomed = asyncio.ensure_future(storage.load_session(request_of("a")))
    while proxy.passed == passed:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    doomed.cancel()
    await asyncio.wait([doomed])
    proxy.resume()
    assert (await storage.load_session(request_of("b")))["user"] == "b"


async def test_a_save_that_was_begun_is_finished_when_its_request_is_cancelled(
    proxy: Proxy, client: Any
) -> None:
    storage = RedisStorage(client, timeout=2)
    await login(storage, "a")
    session = await storage.load_session(request_of("a"))
    session["n"] = 1
    proxy.request_delay = 0.02
    task = asyncio.ensure_future(save(storage, session, "a"))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await storage.finish()
    assert (await storage.load_session(request_of("a")))["n"] == 1


async def test_a_slow_request_does_not_bring_back_a_session_that_logged_out(client: Any) -> None:
    storage = RedisStorage(client, timeout=2)
    await login(storage, "a")
    slow = await storage.load_session(request_of("a"))
    logout = await storage.load_session(request_of("a"))
    logout.invalidate()
    response = await save(storage, logout, "a")
    assert response.cookies["AIOHTTP_SESSION"]["max-age"] == "0"
    slow["n"] = 1
    response = await save(storage, slow, "a")
    assert not response.cookies
    assert (await storage.load_session(request_of("a"))).new
    assert await client.dbsize() == 0


async def test_logouts_and_slow_requests_in_any_order_leave_no_session(client: Any) -> None:
    storage = RedisStorage(client, timeout=2)
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

    await asyncio.gather(*(race(f"user{i}") for i in range(100)))
    assert await client.dbsize() == 0


async def test_an_id_that_the_store_does_not_know_is_not_adopted(client: Any) -> None:
    storage = RedisStorage(client, timeout=2)
    session = await storage.load_session(request_of("planted"))
    session["n"] = 1
    response = await save(storage, session, "planted")
    assert response.cookies["AIOHTTP_SESSION"].value != "planted"
    assert not await client.exists("AIOHTTP_SESSION_planted")


async def test_a_refused_connection_is_the_clients_error(proxy: Proxy, client: Any) -> None:
    storage = RedisStorage(client, timeout=2)
    await login(storage, "a")
    await proxy.refuse()
    for verb in (
        storage.store.read("k"),
        storage.store.create("k", b"1", 1),
        storage.store.update("k", b"1", 1),
        storage.store.swap("k", b"1", b"2", 1),
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
    storage = RedisStorage(client, timeout=2)
    await login(storage, "a")
    for _ in range(5):
        await proxy.cut()
        loads = [storage.load_session(request_of("a")) for _ in range(10)]
        assert all(session["user"] == "a" for session in await asyncio.gather(*loads))


@pytest.mark.parametrize("budget", [1, 7, 30, 200])
async def test_a_connection_killed_in_mid_reply_harms_no_request(
    proxy: Proxy, client: Any, budget: int
) -> None:
    storage = RedisStorage(client, timeout=2)
    users = [f"user{i}" for i in range(20)]
    for user in users:
        await login(storage, user)
    proxy.reply_budget = budget
    tasks = [asyncio.ensure_future(storage.load_session(request_of(user))) for user in users]
    await asyncio.sleep(0.05)
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


async def test_a_connection_with_health_checks_that_is_cut_harms_no_request(proxy: Proxy) -> None:
    client: Any = Redis(host=HOST, port=proxy.port, retry=NO_RETRY, health_check_interval=60)
    storage = RedisStorage(client, timeout=2)
    await login(storage, "a")
    passed = proxy.passed
    proxy.hold()
    load = asyncio.ensure_future(storage.load_session(request_of("a")))
    while proxy.passed == passed:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await proxy.cut()
    proxy.resume()
    assert (await load)["user"] == "a"
    await client.aclose()


async def test_an_error_as_a_reply_costs_no_connection(proxy: Proxy) -> None:
    client: Any = Redis(host=HOST, port=proxy.port, health_check_interval=60)
    await client.flushall()
    await client.lpush("list", "x")
    storage = RedisStorage(client, timeout=2)
    with pytest.raises(exceptions.ResponseError, match="WRONGTYPE"):
        await storage.store.read("list")
    assert await storage.store.read("k") is None
    assert proxy.accepted == 1
    await storage.finish()
    await client.aclose()


async def test_replies_in_small_pieces_are_whole(proxy: Proxy, client: Any) -> None:
    storage = RedisStorage(client, timeout=2)
    proxy.fragment = 3
    for user in ("a", "b", "c"):
        await login(storage, user)
    loads = [storage.load_session(request_of(user)) for user in "abcabc"]
    assert [session["user"] for session in await asyncio.gather(*loads)] == list("abcabc")


@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$-7\r\n\0", b"%x\r\n"])
async def test_a_reply_that_is_not_redis_is_the_clients_error(
    proxy: Proxy, client: Any, reply: bytes
) -> None:
    storage = RedisStorage(client, timeout=2)
    await login(storage, "a")
    proxy.fake_reply = reply
    with pytest.raises(exceptions.RedisError):
        await storage.store.read("k")
    proxy.fake_reply = None
    assert (await storage.load_session(request_of("a")))["user"] == "a"


@pytest.mark.parametrize("odd", [b">2\r\n+invalidate\r\n*0\r\n", b"#t\r\n", b"$1\r\nab\r\n"])
async def test_what_a_pipelined_connection_does_not_understand_is_asked_for_again(
    proxy: Proxy, client: Any, odd: bytes
) -> None:
    storage = RedisStorage(client, timeout=2)
    await login(storage, "a")
    proxy.fake_reply = odd
    load = asyncio.ensure_future(storage.load_session(request_of("a")))
    while proxy.accepted == 1:  # noqa: ASYNC110
        await asyncio.sleep(0)
    proxy.fake_reply = None
    assert (await load)["user"] == "a"


async def test_a_reply_too_many_costs_the_connection(proxy: Proxy, client: Any) -> None:
    storage = RedisStorage(client, timeout=2)
    await login(storage, "a")
    proxy.fake_reply = b"$1\r\n1\r\n$1\r\n2\r\n"
    assert await storage.store.read("k") == b"1"
    proxy.fake_reply = None
    assert await storage.store.read("k") is None
    assert proxy.accepted == 2


async def test_a_loading_server_is_the_clients_error(proxy: Proxy, client: Any) -> None:
    storage = RedisStorage(client, timeout=2)
    await login(storage, "a")
    proxy.fake_reply = b"-LOADING Redis is loading the dataset in memory\r\n"
    with pytest.raises(exceptions.BusyLoadingError):
        await storage.store.read("k")
    proxy.fake_reply = None
    assert (await storage.load_session(request_of("a")))["user"] == "a"


@pytest.mark.parametrize("socket_timeout", [None, 5, 0.2])
async def test_a_server_that_never_answers_is_a_timeout(
    proxy: Proxy, socket_timeout: float | None
) -> None:
    client: Any = Redis(host=HOST, port=proxy.port, retry=NO_RETRY, socket_timeout=socket_timeout)
    storage = RedisStorage(client, timeout=0.5)
    await login(storage, "a")
    proxy.hold()
    expected = TimeoutError, exceptions.TimeoutError
    outcomes = await asyncio.wait_for(
        asyncio.gather(*(storage.store.read("k") for _ in range(200)), return_exceptions=True), 5
    )
    assert all(isinstance(outcome, expected) for outcome in outcomes)
    late = asyncio.ensure_future(storage.load_session(request_of("a")))
    await asyncio.sleep(0.02)
    proxy.resume()  # the late replies must reach nobody
    assert (await late)["user"] == "a"
    await storage.finish()
    assert len(client.connection_pool._in_use_connections) == 0
    await client.aclose()


async def test_a_first_request_that_is_not_answered_leaves_no_reply_behind(
    proxy: Proxy, client: Any
) -> None:
    storage = RedisStorage(client, timeout=0.5)
    await client.mset({"a": b"1", "b": b"2"})  # so that there is a connection
    proxy.hold()
    with pytest.raises(TimeoutError):
        await storage.store.read("a")
    proxy.resume()
    assert await storage.store.read("b") == b"2"


async def test_a_connection_that_went_dead_is_replaced_within_the_timeout(
    proxy: Proxy, client: Any
) -> None:
    storage = RedisStorage(client, timeout=1)
    await login(storage, "a")
    assert (await storage.load_session(request_of("a")))["user"] == "a"
    dead = proxy.accepted
    proxy.hold()
    load = asyncio.ensure_future(storage.load_session(request_of("a")))
    while proxy.accepted == dead:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert not load.done()
    proxy.resume()
    assert (await load)["user"] == "a"


async def test_pipelined_connections_that_are_left_lose_nothing(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_redis_pipeline, "_MAX_AGE", 0)
    storage = RedisStorage(client, timeout=0.5)
    users = [f"user{i}" for i in range(20)]
    for user in users:
        await login(storage, user)
    connections = set()
    server = storage.store._servers.get()

    async def visitor(user: str) -> None:
        for _ in range(100):
            assert (await storage.load_session(request_of(user)))["user"] == user
            connections.add(server._pipeline)
            await asyncio.sleep(0.002)

    await asyncio.gather(*map(visitor, users))
    await storage.finish()
    assert len(connections) > 3
    assert len(client.connection_pool._available_connections) <= 5


async def test_finish_waits_for_replies_that_are_due(proxy: Proxy, client: Any) -> None:
    storage = RedisStorage(client, timeout=2)
    await login(storage, "a")
    proxy.request_delay = 0.05
    deleted = asyncio.ensure_future(storage.store.delete("AIOHTTP_SESSION_a"))
    await asyncio.sleep(0)
    await storage.finish()
    assert await client.dbsize() == 0
    await deleted


async def test_when_all_tasks_are_cancelled_the_storage_can_go_on(
    proxy: Proxy, client: Any
) -> None:
    storage = RedisStorage(client, timeout=2)
    await login(storage, "a")
    proxy.request_delay = 0.05
    load = storage.store._servers.get().submit(
        ("k", pack(b"GET", b"k"), lambda client, key: client.get(key), READ)
    )
    await asyncio.sleep(0.01)
    server = storage.store._servers.get()
    server._pipeline._task.cancel()
    await asyncio.wait([load])
    assert load.cancelled()
    assert (await storage.load_session(request_of("a")))["user"] == "a"


async def test_a_server_that_restarts_under_load_harms_no_request_after_it() -> None:
    port = servers.free_port()
    client: Any = Redis(host=HOST, port=port, retry=NO_RETRY)
    storage = RedisStorage(client, timeout=5)
    users = [f"user{i}" for i in range(20)]
    strangers: list[str] = []
    served: Counter[str] = Counter()  # by the phase in which the request began
    errors: dict[str, list[Exception]] = defaultdict(list)
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
            except (exceptions.RedisError, TimeoutError) as error:
                errors[begun].append(error)
                await asyncio.sleep(0.01)
            else:
                served[begun] += 1

    with servers.redis(port=port):
        for user in users:
            await login(storage, user)
        visitors = asyncio.gather(*map(visitor, users))
        while served["before"] < 100 and not errors["before"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not errors["before"]
        phase = "during"
    while not errors["during"]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    with servers.redis(port=port):
        await asyncio.sleep(0.05)  # what was refused before is over
        phase = "after"
        await visitors
        for user in users:
            await login(storage, user)
            assert (await storage.load_session(request_of(user)))["user"] == user
        assert (errors["after"], strangers) == ([], [])
        await storage.finish()
        assert len(client.connection_pool._in_use_connections) == 0
        await client.aclose()


async def test_a_disk_that_fails_refuses_saves_but_no_loads() -> None:
    with servers.redis() as server:
        client: Any = Redis(host=HOST, port=server.port, retry=NO_RETRY)
        storage = RedisStorage(client, timeout=2)
        await login(storage, "a")
        session = await storage.load_session(request_of("a"))
        session["n"] = 1
        folder = Path((await client.config_get("dir"))["dir"])
        (folder / "dump.rdb").mkdir()  # where the server wants to write a file
        await client.config_set("save", "1 1")
        await client.bgsave()
        while (await client.info("persistence"))["rdb_last_bgsave_status"] == "ok":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        with pytest.raises(exceptions.ResponseError, match="MISCONF"):
            await save(storage, session, "a")
        assert (await storage.load_session(request_of("a")))["user"] == "a"
        await client.config_set("save", "")
        await save(storage, session, "a")
        await client.aclose()


async def test_cleanup_of_the_application_finishes_saves(
    proxy: Proxy, client: Any, aiohttp_client: AiohttpClient
) -> None:
    storage = RedisStorage(client, timeout=2)
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
    proxy.request_delay = 0.1
    request = asyncio.ensure_future(web_client.get("/"))
    await handled.wait()
    request.cancel()
    await asyncio.wait([request])
    await web_client.close()
    proxy.request_delay = 0
    assert len(await client.keys("*")) == 1


async def test_errors_hold_nothing_of_the_session(client: Any) -> None:
    storage = RedisStorage(client, timeout=2)
    await client.lpush("AIOHTTP_SESSION_secret", "x")
    with pytest.raises(exceptions.ResponseError) as caught:
        await storage.load_session(request_of("secret"))
    assert not re.search("secret", str(caught.value))
