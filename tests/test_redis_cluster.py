"""RedisStorage on a cluster, behind Sentinel, over TLS and a unix socket."""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
import ipaddress
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from redis import exceptions
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ConstantBackoff, NoBackoff
from valkey.asyncio import ValkeyCluster

from aiohttp_session import Session
from aiohttp_session._core import write_command
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.stores._redis_pipeline import READ
from benchmarks import servers
from benchmarks.servers import HOST, Server
from tests.contract import Browser
from tests.waiting import PATIENCE, running, until

KEYS = [f"key{i}" for i in range(60)]
LIMITS: dict[str, Any] = {
    "socket_timeout": None,
    "socket_connect_timeout": PATIENCE,
}  # the storage has its own


@pytest.fixture(autouse=True)
async def complaints(young_heap: None) -> AsyncIterator[None]:
    """No task may end with an exception that nobody sees."""
    seen: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context))
    yield
    gc.collect()
    assert seen == []


async def check_verbs(storage: RedisStorage) -> None:
    await asyncio.gather(*(storage.store.create(key, key.encode(), 60) for key in KEYS))
    assert await asyncio.gather(*map(storage.store.read, KEYS)) == [key.encode() for key in KEYS]
    swaps = (storage.store.swap(key, key.encode(), b"2", 60) for key in KEYS)
    assert all(await asyncio.gather(*swaps))
    assert await storage.store.swap(KEYS[0], b"2", b"3", 60)
    assert not await storage.store.swap(KEYS[0], b"2", b"4", 60)
    assert await storage.store.read(KEYS[0]) == b"3"
    await asyncio.gather(*map(storage.store.delete, KEYS[:10]))
    assert await asyncio.gather(*map(storage.store.read, KEYS[:10])) == [None] * 10
    assert not await storage.store.swap(KEYS[0], b"3", b"5", 60)
    assert await storage.store.swap(KEYS[0], None, b"6", 60)
    assert not await storage.store.swap(KEYS[0], None, b"7", 60)
    await storage.finish()


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Server]]:
    with servers.redis_cluster() as nodes:
        yield nodes


@pytest.mark.parametrize("decode_responses", [False, True])
async def test_the_verbs_work_on_a_cluster(
    cluster: list[Server], cleanup: AsyncExitStack, decode_responses: bool
) -> None:
    client: Any = RedisCluster(host=HOST, port=cluster[1].port, decode_responses=decode_responses)
    cleanup.push_async_callback(client.aclose)
    storage = RedisStorage(client)
    await check_verbs(storage)
    await check_verbs(storage)


async def test_the_verbs_work_on_a_cluster_with_the_client_of_valkey(
    cluster: list[Server], cleanup: AsyncExitStack
) -> None:
    client: Any = ValkeyCluster(host=HOST, port=cluster[1].port)
    cleanup.push_async_callback(client.aclose)
    storage = RedisStorage(client)
    await check_verbs(storage)
    await check_verbs(storage)


async def test_a_batch_is_split_by_the_owners_of_its_keys(
    cluster: list[Server], cleanup: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    client: Any = RedisCluster(host=HOST, port=cluster[0].port)
    cleanup.push_async_callback(client.aclose)
    storage = RedisStorage(client)
    await client.initialize()
    monkeypatch.setattr(client, "execute_command", None)  # what each operation alone would use
    await check_verbs(storage)
    monkeypatch.undo()
    for node in client.get_primaries():
        assert 1 <= len(node._connections) <= 4
        assert len(node._free) == len(node._connections)


async def test_a_slot_that_moved_is_found_again(
    cluster: list[Server], cleanup: AsyncExitStack
) -> None:
    client: Any = RedisCluster(host=HOST, port=cluster[0].port)
    cleanup.push_async_callback(client.aclose)
    storage = RedisStorage(client)
    await check_verbs(storage)
    for slots in client.nodes_manager.slots_cache.values():
        slots[:] = [client.get_primaries()[0]]  # as if all slots had once been of this node
    await check_verbs(storage)


async def test_a_cluster_record_of_another_type_harms_only_its_own_request(
    cluster: list[Server], cleanup: AsyncExitStack
) -> None:
    client: Any = RedisCluster(host=HOST, port=cluster[0].port)
    cleanup.push_async_callback(client.aclose)
    storage = RedisStorage(client)
    await client.lpush("{a}list", "x")
    await storage.store.create("{a}k", b"1", 60)
    loads = asyncio.gather(
        storage.store.read("{a}k"), storage.store.read("{a}list"), return_exceptions=True
    )
    record, error = await loads
    assert record == b"1"
    assert isinstance(error, exceptions.ResponseError)
    assert "WRONGTYPE" in str(error)
    await client.delete("{a}list")


async def run_through_a_failover(
    storage: RedisStorage,
    primary: Server,
    replica: Server,
    fail: Callable[[], None],
    take_over: Callable[[], bytes],
    is_safe: Callable[[str], bool] = lambda key: False,
) -> None:
    """Load and save all the time while a server fails and another takes over, until all work again.

    :param take_over: asks for it, and returns "+OK..." when that was understood.
    """
    rounds: Counter[str] = Counter()  # in the whole of which nothing happened to the servers
    period = 0
    problems: list[object] = []

    async def visitor(key: str) -> None:
        while True:
            begun = period, time.monotonic()
            try:
                record = await storage.store.read(key)
                if record != key.encode():
                    problems.append((key, record))
                if not await storage.store.swap(key, key.encode(), key.encode(), 60 * PATIENCE):
                    problems.append((key, "lost"))
                rounds[key] += begun[0] == period
            except (exceptions.RedisError, OSError, TimeoutError) as error:
                if is_safe(key):
                    problems.append((key, error))
                if time.monotonic() - begun[1] > 2 * PATIENCE:
                    problems.append((key, "took too long", time.monotonic() - begun[1]))
            await asyncio.sleep(0.02)

    async def all_have_rounds(keys: list[str]) -> None:
        nonlocal period
        period += 1
        rounds.clear()
        await until(lambda: problems or all(rounds[key] >= 3 for key in keys))
        assert problems == []

    await asyncio.gather(*(storage.store.create(key, key.encode(), 60 * PATIENCE) for key in KEYS))
    async with running(*map(visitor, KEYS)):
        await all_have_rounds(KEYS)
        # Replication is asynchronous.
        await until(lambda: servers.ask(replica, "DBSIZE") == servers.ask(primary, "DBSIZE"))
        fail()
        await all_have_rounds([key for key in KEYS if is_safe(key)])
        await until(lambda: take_over().startswith(b"+OK"))
        await until(lambda: is_primary(replica))
        await all_have_rounds(KEYS)
    reads = await asyncio.gather(*map(storage.store.read, KEYS))
    assert reads == [key.encode() for key in KEYS]
    await storage.finish()


def is_primary(server: Server) -> bool:
    try:
        return b"role:master" in servers.ask(server, "INFO replication")
    except OSError:  # it cuts its connections in the moment that it becomes one
        return False


def kill(server: Server) -> None:
    server.process.kill()
    server.process.wait()


@pytest.mark.once
async def test_a_node_fails_over_under_load(cleanup: AsyncExitStack) -> None:
    with servers.redis_cluster() as nodes:
        client: Any = RedisCluster(
            host=HOST,
            port=nodes[1].port,
            retry=Retry(ConstantBackoff(0.1), 10),
            **LIMITS,
        )
        cleanup.push_async_callback(client.aclose)
        await client.initialize()
        doomed = {key for key in KEYS if client.keyslot(key) <= 5460}
        assert 0 < len(doomed) < len(KEYS)
        await run_through_a_failover(
            RedisStorage(client, timeout=PATIENCE),
            nodes[0],
            nodes[3],
            lambda: kill(nodes[0]),
            lambda: servers.ask(nodes[3], "CLUSTER FAILOVER TAKEOVER"),
            lambda key: key not in doomed,
        )


@pytest.mark.once
@pytest.mark.parametrize("dies", [True, False], ids=["dies", "becomes a replica"])
async def test_sentinel_fails_over_under_load(cleanup: AsyncExitStack, dies: bool) -> None:
    with servers.redis_sentinel("sessions") as (primary, replica, sentinel):
        manager: Any = Sentinel([(HOST, sentinel.port)])  # type: ignore[no-untyped-call]
        cleanup.push_async_callback(manager.sentinels[0].aclose)
        client = manager.master_for("sessions", retry=Retry(ConstantBackoff(0.1), 3), **LIMITS)
        cleanup.push_async_callback(client.aclose)
        storage = RedisStorage(client, timeout=PATIENCE)
        await check_verbs(storage)
        await run_through_a_failover(
            storage,
            primary,
            replica,
            lambda: kill(primary) if dies else None,
            lambda: servers.ask(sentinel, "SENTINEL FAILOVER", "sessions"),
        )
        assert len(client.connection_pool._in_use_connections) == 0


def make_certificate(folder: Path) -> dict[str, Path]:
    """Write a certificate for `HOST`, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "redis")])
    now = dt.datetime.now(dt.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), False
        )
        .sign(key, hashes.SHA256())
    )
    paths = {"cert": folder / "cert.pem", "key": folder / "key.pem"}
    paths["cert"].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths["key"].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


@pytest.mark.parametrize("protocol", [2, 3])
async def test_tls_with_an_acl_user(tmp_path: Path, cleanup: AsyncExitStack, protocol: int) -> None:
    paths = make_certificate(tmp_path)
    port = servers.free_port()
    options = ["--tls-port", str(port), "--tls-auth-clients", "no"]
    options += ["--tls-cert-file", str(paths["cert"]), "--tls-key-file", str(paths["key"])]
    rights = ["+get", "+set", "+del", "+evalsha", "+eval"]
    options += ["--user", "web", "on", ">secret", "~key*", *rights]
    options += ["--user", "default", "off"]
    with servers.redis(*options):
        client: Any = Redis(
            host=HOST,
            port=port,
            ssl=True,
            ssl_ca_certs=str(paths["cert"]),
            username="web",
            password="secret",
            protocol=protocol,
        )
        cleanup.push_async_callback(client.aclose)
        storage = RedisStorage(client)
        await check_verbs(storage)
        with pytest.raises(exceptions.NoPermissionError):
            await storage.store.read("other")
        large = b"x" * 500_000
        await storage.store.create("key", large, None)
        assert await asyncio.gather(*(storage.store.read("key") for _ in range(5))) == [large] * 5
        stranger: Any = Redis(
            host=HOST,
            port=port,
            ssl=True,
            ssl_ca_certs=str(paths["cert"]),
            retry=Retry(NoBackoff(), 0),
        )
        cleanup.push_async_callback(stranger.aclose)
        with pytest.raises(exceptions.AuthenticationError):
            await RedisStorage(stranger).store.read("key")


async def test_a_unix_socket(tmp_path: Path, cleanup: AsyncExitStack) -> None:
    path = tmp_path / "redis.sock"
    with servers.redis("--unixsocket", str(path)):
        client: Any = Redis(unix_socket_path=str(path))
        cleanup.push_async_callback(client.aclose)
        await check_verbs(RedisStorage(client))


@pytest.mark.parametrize("connections", [1, 2, 3])
async def test_a_slot_on_its_way_to_another_node_is_written_there(
    cluster: list[Server], connections: int
) -> None:
    client: Any = RedisCluster(host=HOST, port=cluster[0].port)
    storage = RedisStorage(client, circuit_breaker=False)
    store = storage.store
    await client.initialize()
    slot = client.keyslot("{moving}")
    source = client.get_node_from_key("{moving}")
    target = next(node for node in client.get_primaries() if node.name != source.name)
    # The client's own methods say ASKING on one of these, and send what they ask on another.
    await asyncio.gather(*(target.execute_command("PING") for _ in range(connections)))
    by_port = {server.port: server for server in cluster}
    ids = {
        name: servers.ask(by_port[node.port], "CLUSTER MYID").decode().strip()
        for name, node in {"source": source, "target": target}.items()
    }
    servers.ask(by_port[target.port], "CLUSTER SETSLOT", slot, "IMPORTING", ids["source"])
    servers.ask(by_port[source.port], "CLUSTER SETSLOT", slot, "MIGRATING", ids["target"])
    try:
        for _ in range(2):  # by a batch, and by the pipelined connection
            await store.create("{moving}k", b"1", 60)
            assert await store.swap("{moving}k", b"1", b"2", 60)
            assert await store.swap("{moving}k", b"2", b"3", 60)
            assert not await store.swap("{moving}k", b"2", b"4", 60)
            assert not await store.swap("{moving}k", None, b"4", 60)
            assert await store.read("{moving}k") == b"3"
            await store.delete("{moving}k")
    finally:
        for node in (source, target):
            servers.ask(by_port[node.port], "CLUSTER SETSLOT", slot, "STABLE")
    await storage.finish()
    await client.aclose()


@pytest.mark.parametrize("failures", [1, 2, 3])
async def test_a_slot_that_has_no_node_is_looked_up(
    cluster: list[Server], monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    client: Any = RedisCluster(host=HOST, port=cluster[0].port)
    storage = RedisStorage(client, circuit_breaker=False)
    await client.initialize()
    find = client.get_node_from_key
    failed = 0

    def fail(key: str) -> Any:
        nonlocal failed
        failed += 1
        if failed <= failures:
            raise KeyError(key)
        return find(key)

    monkeypatch.setattr(client, "get_node_from_key", fail)
    await storage.store.create("k", b"1", 60)
    failed = 0
    assert await storage.store.read("k") == b"1"
    routes: Any = storage.store._servers.get()  # type: ignore[attr-defined]
    for known in (0, failures):
        failed = known
        since = asyncio.get_running_loop().time()
        again = ("k", write_command(b"GET", b"k"), (lambda client, key: client.get(key),), READ)
        assert await routes.resubmit(again, since) == b"1"
    await storage.finish()
    await client.aclose()


@pytest.mark.parametrize("refused", ["-@scripting", "-evalsha", "-@scripting -watch"])
async def test_a_swap_on_a_cluster_without_scripting(cluster: list[Server], refused: str) -> None:
    for server in cluster:
        servers.ask(server, f"ACL SETUSER web reset on >x ~* +@all {refused}")
    client: Any = RedisCluster(host=HOST, port=cluster[0].port, username="web", password="x")
    storage = RedisStorage(client, circuit_breaker=False)
    await check_verbs(storage)
    await client.aclose()


async def test_a_user_s_sessions_are_on_several_nodes(cluster: list[Server]) -> None:
    client: Any = RedisCluster(host=HOST, port=cluster[0].port)
    storage = RedisStorage(client, max_age=1000, max_per_owner=8)
    browsers = [Browser(storage) for _ in range(10)]

    def log_in(session: Session) -> None:
        session.owner = "ann"
        session.regenerate_id()

    for browser in browsers:
        await browser.do(log_in)
    assert len(await storage.sessions_of("ann")) == 8
    session, _ = await browsers[-1].do(lambda session: session)
    assert await storage.end_sessions("ann", keep=session) == 7
    owners = [(await browser.do(lambda session: session.owner))[0] for browser in browsers]
    assert owners == [None] * 9 + ["ann"]
    await storage.finish()
    await client.aclose()
