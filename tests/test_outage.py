"""A store that is down: the circuit breaker."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from weakref import WeakSet

import aiomcache
import pytest
import redis.exceptions
import uvloop
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import ResponseError

from aiohttp_session import StoreUnavailableError
from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.server_storage import ServerStorage
from aiohttp_session.stores.memory import MemoryStore
from aiohttp_session.stores.outage import CircuitBreaker, is_outage
from benchmarks import servers
from benchmarks.servers import HOST, Server
from tests.stores import innermost
from tests.waiting import PATIENCE

KINDS = ("redis", "memcached")


class Gate(MemoryStore):
    """A store whose operations wait until the gate is opened, or fail as they are told."""

    timeout = 5

    def __init__(self) -> None:
        super().__init__(max_records=100)
        self.opened = asyncio.Event()
        self.opened.set()
        self.error: Exception | None = None
        self.calls: list[str] = []
        self.waiting: set[asyncio.Task[Any]] = set()

    async def _pass(self, verb: str) -> None:
        self.calls.append(verb)
        task: Any = asyncio.current_task()
        self.waiting.add(task)
        try:
            await self.opened.wait()
        finally:
            self.waiting.discard(task)
        if self.error is not None:
            raise type(self.error)(*self.error.args)

    async def read(self, key: str) -> bytes | None:
        await self._pass("read")
        return await super().read(key)

    async def read_latest(self, key: str) -> bytes | None:
        await self._pass("read_latest")
        return await super().read(key)

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        await self._pass("create")
        await super().create(key, payload, ttl)

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        await self._pass("swap")
        return await super().swap(key, expected, payload, ttl)

    async def delete(self, key: str) -> None:
        await self._pass("delete")
        await super().delete(key)


class Time:
    """The time of an event loop; it stands still until it is moved on."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._now = loop.time()
        loop.time = lambda: self._now  # type: ignore[method-assign]

    async def pass_by(self, seconds: float) -> None:
        self._now += seconds
        await settle()


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def time() -> Time:
    return Time(asyncio.get_running_loop())


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
async def breaker(gate: Gate) -> AsyncIterator[CircuitBreaker]:
    breaker = CircuitBreaker(gate)
    yield breaker
    await breaker.finish()
    await settle()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def fail(breaker: CircuitBreaker, gate: Gate, error: Exception) -> None:
    gate.error = error
    with pytest.raises(type(error)):
        await breaker.read("key")


async def take_down(breaker: CircuitBreaker, gate: Gate) -> None:
    """Let an operation time out; afterwards nothing is answered."""
    await fail(breaker, gate, TimeoutError("late"))
    gate.opened.clear()
    assert await is_down(breaker)
    await settle()


async def is_down(breaker: CircuitBreaker, key: str = "key") -> bool:
    task = asyncio.ensure_future(breaker.read(key))
    await settle()
    if not task.done():
        task.cancel()
        return False
    return isinstance(task.exception(), StoreUnavailableError)


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.read("k"),
        lambda store: store.read_latest("k"),
        lambda store: store.create("k", b"1", None),
        lambda store: store.swap("k", b"1", b"2", None),
        lambda store: store.delete("k"),
    ],
    ids=["read", "read_latest", "create", "swap", "delete"],
)
async def test_every_operation_fails_at_once_while_the_store_is_down(
    call: Callable[[CircuitBreaker], Any], breaker: CircuitBreaker, gate: Gate
) -> None:
    gate.error = TimeoutError("late")
    with pytest.raises(TimeoutError, match="late"):
        await call(breaker)
    gate.opened.clear()
    await settle()
    calls = list(gate.calls)
    with pytest.raises(StoreUnavailableError) as info:
        await call(breaker)
    assert isinstance(info.value, ConnectionError)
    assert isinstance(info.value.__cause__, TimeoutError)
    assert gate.calls == calls


async def test_operations_go_through_while_all_is_well(breaker: CircuitBreaker, gate: Gate) -> None:
    await breaker.create("k", b"1", 60)
    assert await breaker.swap("k", b"1", b"2", 60) is True
    assert await breaker.swap("k", b"1", b"3", None) is False
    assert await breaker.swap("k", b"2", b"3", None) is True
    assert await breaker.read("k") == await breaker.read_latest("k") == b"3"
    await breaker.delete("k")
    assert await breaker.read("k") is None
    assert await breaker.read_latest("k") is None
    assert await breaker.swap("k", b"3", b"2", 60) is False
    assert await breaker.swap("k", None, b"2", 60) is True
    assert Counter(gate.calls) == Counter(
        {"create": 1, "swap": 5, "read": 2, "read_latest": 2, "delete": 1}
    )
    assert breaker.timeout == 5
    assert breaker.reads_locally is gate.reads_locally is True
    assert breaker.describe() == breaker.store.describe()


async def test_one_that_times_out_while_others_are_answered_does_not_count(
    breaker: CircuitBreaker, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = asyncio.Event()

    async def time_out(key: str) -> bytes | None:
        await late.wait()
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(gate, "read", time_out)
        slow = asyncio.ensure_future(breaker.read("slow"))
        await settle()
    await breaker.create("quick", b"1", None)
    late.set()
    await asyncio.wait([slow])
    assert isinstance(slow.exception(), TimeoutError)
    assert await breaker.read("quick") == b"1"


async def test_attempts_that_are_refused_for_a_second(
    breaker: CircuitBreaker, gate: Gate, time: Time
) -> None:
    refused = ConnectionRefusedError("no")
    await fail(breaker, gate, refused)
    await time.pass_by(0.5)
    await fail(breaker, gate, refused)
    gate.error = None
    await breaker.read("key")  # so it begins anew
    await time.pass_by(0.6)
    await fail(breaker, gate, refused)
    await time.pass_by(0.9)
    await fail(breaker, gate, refused)
    await time.pass_by(0.2)
    await fail(breaker, gate, refused)
    assert await is_down(breaker)


async def test_an_error_reply_is_an_answer(breaker: CircuitBreaker, gate: Gate, time: Time) -> None:
    await fail(breaker, gate, ConnectionResetError())
    await time.pass_by(2)
    await fail(breaker, gate, ResponseError("WRONGTYPE"))
    await fail(breaker, gate, ConnectionResetError())
    gate.error = None
    assert not await is_down(breaker)


@pytest.mark.parametrize("error", [None, ResponseError("WRONGTYPE")])
async def test_the_first_answer_to_a_probe_ends_it(
    error: Exception | None, breaker: CircuitBreaker, gate: Gate, time: Time
) -> None:
    await take_down(breaker, gate)
    assert len(gate.waiting) == 1  # the first probe, which is made at once
    gate.error = error
    gate.opened.set()
    await settle()
    gate.error = None
    assert await breaker.read("key") is None


async def test_there_is_a_probe_a_second_if_anybody_asks(
    breaker: CircuitBreaker, gate: Gate, time: Time
) -> None:
    await take_down(breaker, gate)
    for probes in (1, 2, 3):
        for _ in range(10):
            assert await is_down(breaker)
        assert len(gate.waiting) == probes
        await time.pass_by(1.1)
    await settle()
    assert len(gate.waiting) == 3  # nobody has asked


async def test_probes_that_fail_tell_the_cause(
    breaker: CircuitBreaker, gate: Gate, time: Time
) -> None:
    await take_down(breaker, gate)
    gate.error = ConnectionRefusedError("still no")
    gate.opened.set()
    await settle()
    with pytest.raises(StoreUnavailableError) as info:
        await breaker.read("key")
    assert repr(info.value.__cause__) == "ConnectionRefusedError('still no')"
    await time.pass_by(1.1)
    assert await is_down(breaker)


@pytest.mark.parametrize("kind", [ConnectionResetError, TimeoutError])
async def test_an_error_is_kept_only_while_the_store_is_down(
    kind: type[Exception], breaker: CircuitBreaker, gate: Gate
) -> None:
    # Its traceback holds the request that it befell, and whatever that one knew.
    errors: WeakSet[BaseException] = WeakSet()

    class Noted(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            errors.add(self)

    await fail(breaker, gate, Noted())
    gate.opened.clear()
    gate.error = None
    is_open = await is_down(breaker)
    assert is_open is (kind is TimeoutError)
    gc.collect()
    assert bool(errors) is is_open
    gate.opened.set()
    await settle()
    assert await breaker.read("key") is None
    gc.collect()
    assert not errors


@pytest.mark.parametrize("verb", ["read", "read_latest", "swap", "delete"])
async def test_an_answer_to_what_was_under_way_ends_it(
    verb: str, breaker: CircuitBreaker, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.opened.clear()
    arguments = (b"1", b"2", None) if verb == "swap" else ()
    before = asyncio.ensure_future(getattr(breaker, verb)("key", *arguments))
    await settle()
    (entered,) = gate.waiting
    assert entered is before

    async def time_out(key: str, *_: object) -> None:
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(gate, "create", time_out)
        with pytest.raises(TimeoutError):
            await breaker.create("key", b"1", None)
    assert await is_down(breaker)
    gate.opened.set()
    await before
    assert await breaker.read("key") is None


async def test_after_a_quiet_time_an_operation_is_the_probe(
    breaker: CircuitBreaker, gate: Gate, time: Time
) -> None:
    await take_down(breaker, gate)
    await time.pass_by(11)
    gate.error = None
    gate.opened.set()
    assert await breaker.read("key") is None


async def test_only_one_operation_is_the_probe_after_a_quiet_time(
    breaker: CircuitBreaker, gate: Gate, time: Time
) -> None:
    await take_down(breaker, gate)
    await time.pass_by(11)
    first = asyncio.ensure_future(breaker.read("key"))
    await settle()
    assert not first.done()
    assert await is_down(breaker)
    first.cancel()


async def test_waiters_without_patience_have_the_store_looked_at(
    breaker: CircuitBreaker, gate: Gate, time: Time
) -> None:
    gate.opened.clear()
    for _ in range(3):
        waiter = asyncio.ensure_future(breaker.delete("key"))
        await settle()
        waiter.cancel()
        await settle()
    assert not gate.waiting
    await time.pass_by(1.1)
    assert len(gate.waiting) == 1
    await time.pass_by(breaker.timeout or 0)
    assert await is_down(breaker)


async def test_a_waiter_that_left_does_not_matter_if_the_store_answers(
    breaker: CircuitBreaker, gate: Gate, time: Time
) -> None:
    gate.opened.clear()
    waiter = asyncio.ensure_future(breaker.read("key"))
    await settle()
    waiter.cancel()
    await settle()
    gate.opened.set()
    await breaker.read("key")
    calls = list(gate.calls)
    await time.pass_by(1.1)
    assert gate.calls == calls


async def test_a_store_without_a_timeout_is_probed_for_a_while(
    breaker: CircuitBreaker, gate: Gate, time: Time
) -> None:
    breaker.timeout = None
    await take_down(breaker, gate)
    await time.pass_by(5.1)
    assert not gate.waiting


async def test_finish_ends_probes(breaker: CircuitBreaker, gate: Gate) -> None:
    await take_down(breaker, gate)
    assert gate.waiting
    await breaker.finish()
    await settle()
    assert not gate.waiting


async def test_the_log_has_a_line_when_it_begins_and_one_when_it_ends(
    breaker: CircuitBreaker, gate: Gate, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    states = [breaker.is_down]
    await take_down(breaker, gate)
    states.append(breaker.is_down)
    for _ in range(3):
        assert await is_down(breaker, "secret")
    await time.pass_by(4.5)
    gate.error = None
    gate.opened.set()
    await settle()
    assert [*states, breaker.is_down] == [False, True, False]
    begin, end = caplog.messages
    assert "is down (TimeoutError)" in begin
    assert "answers again after 4.5 s" in end
    assert "4 operations were refused" in end  # take_down had one
    assert "secret" not in caplog.text
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_each_event_loop_finds_out_for_itself() -> None:
    class Failing(MemoryStore):
        async def read(self, key: str) -> bytes | None:
            raise TimeoutError

    breaker = CircuitBreaker(Failing(max_records=10))

    async def outcomes() -> list[str]:
        found = []
        for _ in range(2):
            try:
                await breaker.read("key")
            except OSError as error:
                found.append(type(error).__name__)
        return found

    expected = ["TimeoutError", "StoreUnavailableError"]
    assert asyncio.run(outcomes()) == expected
    assert not breaker.is_down  # by what is known in a loop that is no more
    assert asyncio.run(outcomes()) == expected
    found = []
    thread = threading.Thread(target=lambda: found.extend(asyncio.run(outcomes())))
    thread.start()
    thread.join()
    assert found == expected


async def test_each_server_is_down_by_itself(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    gate.server_of = lambda key: f"{key[0]}:1"
    breaker = CircuitBreaker(gate)
    await breaker.create("b", b"1", None)
    gate.error = TimeoutError()
    with pytest.raises(TimeoutError):
        await breaker.read("a1")
    assert await is_down(breaker, "a2")
    gate.error = None
    assert await breaker.read("b") == b"1"
    assert "The session store a:1 is down" in caplog.text
    await breaker.finish()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TimeoutError(), True),
        (asyncio.TimeoutError(), True),
        (ConnectionRefusedError(), True),
        (OSError("no route to host"), True),
        (StoreUnavailableError(), True),
        (ResponseError(), False),
        (ValueError(), False),
        (asyncio.CancelledError(), False),
    ],
)
def test_what_an_outage_is(error: BaseException, expected: bool) -> None:
    assert is_outage(error) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ConnectionError", True),
        ("TimeoutError", True),
        ("BusyLoadingError", True),
        ("ClusterDownError", True),
        ("RedisClusterException", True),
        ("ReadOnlyError", False),
        ("DataError", False),
    ],
)
def test_which_errors_of_redis_are_outages(name: str, expected: bool) -> None:
    assert is_outage(getattr(redis.exceptions, name)("x")) is expected


# On real servers


@contextlib.asynccontextmanager
async def make_storage(kind: str, port: int, **options: Any) -> AsyncIterator[ServerStorage]:
    options = {"timeout": 0.5, **options}
    if kind == "redis":
        async with Redis(host=HOST, port=port) as client:
            storage: ServerStorage = RedisStorage(client, **options)
            yield storage
            await storage.finish()
    else:
        cache = aiomcache.Client(HOST, port)
        storage = MemcachedStorage(cache, **options)
        yield storage
        await storage.finish()
        await cache.close()


def start(kind: str, port: int | None = None) -> contextlib.AbstractContextManager[Server]:
    run: Any = getattr(servers, kind)
    return run(port=port)  # type: ignore[no-any-return]


async def answer_of(ask: Callable[[], Awaitable[Any]]) -> Any:
    """Ask until there is an answer, which may take a busy machine longer than the time limit."""
    for _ in range(PATIENCE * 20):
        try:
            return await ask()
        except Exception as error:
            if not (isinstance(error, OSError) or is_outage(error)):
                raise
        await asyncio.sleep(0.05)
    raise AssertionError("there is no answer")


async def reach(storage: ServerStorage, *, down: bool) -> None:
    """Ask until the store is down, or up again; fail after far more time than that takes."""

    async def look() -> None:
        try:
            await storage.store.read("key")
        except StoreUnavailableError:
            return
        raise TimeoutError  # not yet

    await answer_of(look if down else lambda: storage.store.read("key"))


def run(loop_kind: str, main: Any) -> None:
    loop: asyncio.AbstractEventLoop = (
        uvloop.new_event_loop() if loop_kind == "uvloop" else asyncio.new_event_loop()
    )
    try:
        loop.run_until_complete(main)
        tasks = asyncio.all_tasks(loop)
        assert not tasks, tasks
    finally:
        loop.close()


on_both_loops = pytest.mark.parametrize("loop_kind", ["asyncio", "uvloop"])
on_both_stores = pytest.mark.parametrize("kind", KINDS)


@contextlib.contextmanager
def stopped(server: Server) -> Iterator[None]:
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


@pytest.mark.once
@on_both_loops
@on_both_stores
def test_a_server_that_is_stopped_and_goes_on(kind: str, loop_kind: str) -> None:
    async def main(server: Server) -> None:
        async with make_storage(kind, server.port) as storage:
            await answer_of(lambda: storage.store.create("key", b"1", None))
            with stopped(server):
                await reach(storage, down=True)
                with pytest.raises(StoreUnavailableError):
                    await storage.store.swap("key", b"1", b"2", None)
            assert await answer_of(lambda: storage.store.read("key")) == b"1"

    with start(kind) as server:
        run(loop_kind, main(server))


@pytest.mark.once
@on_both_loops
@on_both_stores
def test_a_server_that_is_killed_and_started_again(kind: str, loop_kind: str) -> None:
    port = servers.free_port()

    async def main() -> None:
        async with make_storage(kind, port) as storage:
            await reach(storage, down=True)  # it was never there
            with start(kind, port) as server:
                await answer_of(lambda: storage.store.create("key", b"1", None))
                server.process.kill()
                await asyncio.to_thread(server.process.wait)
                await reach(storage, down=True)
            with start(kind, port):
                assert await answer_of(lambda: storage.store.read("key")) is None
        await asyncio.get_running_loop().shutdown_default_executor()

    run(loop_kind, main())


@pytest.mark.once
@on_both_loops
@on_both_stores
def test_a_black_hole(kind: str, loop_kind: str) -> None:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(2**16):
            pass
        writer.close()

    async def main() -> None:
        hole = await asyncio.start_server(swallow, HOST, 0)
        port = hole.sockets[0].getsockname()[1]
        async with make_storage(kind, port) as storage:
            await reach(storage, down=True)
            hole.close()
            await reach(storage, down=True)
            with start(kind, port):
                await reach(storage, down=False)
        for _ in range(1000):
            if len(asyncio.all_tasks()) == 1:
                break
            await asyncio.sleep(0.01)

    run(loop_kind, main())


@on_both_stores
async def test_the_breaker_can_be_left_out(kind: str) -> None:
    async with make_storage(kind, servers.free_port(), circuit_breaker=False) as storage:
        assert storage.store is innermost(storage)
        assert not hasattr(storage.store, "store")


async def test_another_client_of_memcached_is_given_to_the_store_behind(
    memcached_server: Server,
) -> None:
    for circuit_breaker in (True, False):
        async with make_storage(
            "memcached", servers.free_port(), circuit_breaker=circuit_breaker
        ) as storage:
            assert isinstance(storage, MemcachedStorage)
            layer = storage.store
            storage.conn = aiomcache.Client(HOST, memcached_server.port)
            assert (storage.store is layer) is circuit_breaker
            assert storage.store.timeout == 0.5
            await answer_of(lambda: storage.store.create("other-client", b"1", None))
            assert await storage.conn.get(b"other-client") == b"1"
            await storage.conn.close()


@pytest.mark.once
async def test_a_node_of_a_cluster_is_down_by_itself() -> None:
    with servers.redis_cluster() as nodes:
        client: Any = RedisCluster(host=HOST, port=nodes[0].port)
        storage = RedisStorage(client, timeout=0.5)
        server_of: Any = storage.store.server_of
        assert server_of("key") is None  # it knows none yet
        await answer_of(lambda: storage.store.create("key", b"1", None))
        port = int(server_of("key").rpartition(":")[2])
        lost = next(node for node in nodes if node.port == port)
        other = next(f"k{i}" for i in range(100) if server_of(f"k{i}") != server_of("key"))
        with stopped(lost):
            await reach(storage, down=True)
            assert await answer_of(lambda: storage.store.read(other)) is None
        await reach(storage, down=False)
        await storage.finish()
        await client.aclose()
