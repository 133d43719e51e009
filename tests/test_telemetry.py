"""What OpenTelemetry is told of sessions, and what it is not."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import aiomcache
import pytest
from aiohttp import web
from opentelemetry import trace
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from aiohttp_session import AbstractStorage, Session, SimpleCookieStorage, get_session
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.server_storage import ServerStorage
from aiohttp_session.stores import Store
from aiohttp_session.stores.memory import MemoryStore
from aiohttp_session.stores.telemetry import TelemetryStore
from aiohttp_session.telemetry import instrument, uninstrument
from benchmarks.servers import HOST, Server
from tests.conftest import Clock
from tests.contract import KEY, NAME, Browser
from tests.stores import MakeStorage, YieldingStorage, make_storage

__all__ = ("make_storage",)


class Watch:
    """Instruments storages, and keeps what they report."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        meters = MeterProvider([self._reader])
        self.providers: Any = {"tracer_provider": tracers, "meter_provider": meters}

    def __call__(self, storage: Any) -> Any:
        instrument(storage, **self.providers)
        return storage

    def spans(self) -> list[ReadableSpan]:
        """Return the spans since the last call, in the order of their beginning."""
        spans = sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
        self._exporter.clear()
        return spans

    def outcomes(self) -> list[Any]:
        return [
            (span.name, span.attributes["session.outcome"])
            for span in self.spans()
            if span.attributes and "session.outcome" in span.attributes
        ]

    def metrics(self) -> dict[str, Any]:
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        return {
            metric.name: metric
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture
def watch() -> Watch:
    return Watch()


LOAD, SAVE = "session.load", "session.save"


async def test_the_outcomes_of_a_server_storage(
    make_storage: MakeStorage, watch: Watch, clock: Clock
) -> None:
    clock.now = 2_000_000_000
    storage = watch(make_storage(max_age=1000))
    browser = Browser(storage)
    await browser.set(a=1)
    assert watch.outcomes() == [(LOAD, "new"), (SAVE, "saved")]
    await browser.load()
    assert watch.outcomes() == [(LOAD, "loaded")]
    await browser.do(lambda session: session.regenerate_id())
    assert watch.outcomes() == [(LOAD, "loaded"), (SAVE, "moved")]
    other = Browser(storage, browser.cookie)

    async def slow(request: web.Request) -> web.Response:
        session = await get_session(request)
        await other.do(lambda session: session.invalidate())
        session["late"] = True
        return web.Response()

    await browser.visit(slow)
    assert watch.outcomes() == [
        (LOAD, "loaded"),
        (LOAD, "loaded"),
        (SAVE, "deleted"),
        (SAVE, "dropped"),
    ]
    await browser.load()
    assert watch.outcomes() == [(LOAD, "missing")]
    await storage.store.create(f"{NAME}_x", b"[garbage", None)
    await storage.store.create(f"{NAME}_y", b'{"created":1,"session":{"a":1}}', None)
    await Browser(storage, "x").load()
    await Browser(storage, "y").load()
    assert watch.outcomes() == [(LOAD, "damaged"), (LOAD, "expired")]


@pytest.mark.parametrize("make", [SimpleCookieStorage, lambda: EncryptedCookieStorage(KEY)])
async def test_the_outcomes_of_a_cookie_storage(
    make: Callable[[], AbstractStorage], watch: Watch
) -> None:
    storage = watch(make())
    browser = Browser(storage)
    await browser.set(a=1)
    await browser.load()
    await browser.do(lambda session: session.invalidate())
    await Browser(browser.storage, "garbage").load()
    assert watch.outcomes() == [
        *((LOAD, "new"), (SAVE, "saved")),
        (LOAD, "loaded"),
        *((LOAD, "loaded"), (SAVE, "deleted")),
        (LOAD, "damaged"),
    ]
    uninstrument(storage)
    await Browser(storage).load()
    assert watch.outcomes() == []


@pytest.mark.parametrize(
    ("error", "outcome", "kind"),
    [
        (ConnectionResetError("secret"), "unavailable", "ConnectionResetError"),
        (TimeoutError("secret"), "unavailable", "TimeoutError"),
        (RedisConnectionError("secret"), "unavailable", "redis.exceptions.ConnectionError"),
        (ValueError("secret"), "failed", "ValueError"),
        (aiomcache.ClientException("secret"), "failed", "aiomcache.exceptions.ClientException"),
    ],
)
async def test_errors_are_told_by_their_kind(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: str, kind: str
) -> None:
    storage = YieldingStorage()

    async def fail(key: str) -> None:
        raise error

    monkeypatch.setattr(storage.store, "read", fail)
    with pytest.raises(type(error)):
        await Browser(watch(storage), "x").load()
    load, read = watch.spans()
    for span in (load, read):
        assert span.attributes is not None
        assert span.attributes["error.type"] == kind
        assert not span.status.is_ok
        assert not span.events
        assert "secret" not in span.to_json()
    assert load.attributes is not None
    assert load.attributes["session.outcome"] == outcome


async def test_a_conflict_is_told(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = YieldingStorage(on_conflict="merge")
    browser = Browser(storage)
    await browser.set(a=1)

    async def swap(*args: object) -> bool:
        return False

    monkeypatch.setattr(storage.store, "swap", swap)
    monkeypatch.setattr("random.uniform", lambda low, high: 0)
    watch(storage)
    with pytest.raises(RuntimeError):
        await browser.set(b=2)
    assert watch.outcomes() == [(LOAD, "loaded"), (SAVE, "conflict")]


COMMANDS = {
    "redis": ["SET", "GET", "EVALSHA", "GET", "EVALSHA", "DEL"],
    "memcached": ["set", "get", "cas", "get", "cas", "delete"],
    "memory": ["create", "read", "swap", "read", "swap", "delete"],
}


async def test_the_store_s_operations_are_told_below(
    make_storage: MakeStorage, watch: Watch, clock: Clock
) -> None:
    clock.now = 2_000_000_000
    storage = watch(make_storage(touch_after=10))
    browser = Browser(storage)
    await browser.set(a=1)
    await browser.set(a=2)
    clock.now += 100
    await browser.do(lambda session: session["a"])
    await storage.store.delete(f"{NAME}_{browser.cookie}")
    spans = watch.spans()
    names = {span.context.span_id: span.name for span in spans if span.context}
    below = [span for span in spans if not span.name.startswith("session.")]
    system = storage.store.describe()["db.system.name"]
    assert [span.name for span in below] == COMMANDS[system]
    assert [names[span.parent.span_id] if span.parent else None for span in below] == [
        *(SAVE, LOAD, SAVE, LOAD, SAVE, None)
    ]
    for span in below:
        assert span.kind is trace.SpanKind.CLIENT
        assert span.attributes == {**storage.store.describe(), "db.operation.name": span.name}


async def test_each_verb_goes_to_the_same_of_the_store_behind(watch: Watch) -> None:
    class Behind(MemoryStore):
        async def read_latest(self, key: str) -> bytes | None:
            return b"latest"

    storage = watch(ServerStorage(Behind()))
    store = storage.store
    assert isinstance(store, TelemetryStore)
    assert store.reads_locally
    await store.create("k", b"1", None)
    assert await store.read("k") == b"1"
    assert await store.read_latest("k") == b"latest"
    assert await store.swap("k", b"0", b"2", None) is False
    assert await store.swap("k", b"1", b"2", None) is True
    assert await store.swap("k", None, b"2", None) is False
    await store.delete("k")
    assert await store.read("k") is None
    assert [span.name for span in watch.spans()] == [
        *("create", "read", "read", "swap", "swap", "swap", "delete", "read")
    ]


async def test_operations_that_share_a_round_trip_are_counted(
    make_storage: MakeStorage, watch: Watch
) -> None:
    storage = watch(make_storage())
    await asyncio.gather(*(Browser(storage, f"x{n}").load() for n in range(3)))
    sizes = [(span.attributes or {}).get("db.operation.batch.size") for span in watch.spans()]
    assert sorted(sizes, key=str) == [3, 3, 3, None, None, None]
    await Browser(storage, "x").load()
    sizes = [(span.attributes or {}).get("db.operation.batch.size") for span in watch.spans()]
    assert sizes == [None, None]


async def test_the_metrics(make_storage: MakeStorage, watch: Watch) -> None:
    storage = watch(make_storage())
    browser = Browser(storage)
    await browser.set(a=1)
    await browser.load()
    metrics = watch.metrics()
    metrics.pop("aiohttp_session.store.down", None)
    assert {name: metric.unit for name, metric in metrics.items()} == {
        "aiohttp_session.load.duration": "s",
        "aiohttp_session.save.duration": "s",
        "aiohttp_session.outcomes": "{session}",
        "db.client.operation.duration": "s",
    }
    outcomes = {
        point.attributes["session.outcome"]: point.value
        for point in metrics["aiohttp_session.outcomes"].data.data_points
    }
    assert outcomes == {"new": 1, "saved": 1, "loaded": 1}
    loads = metrics["aiohttp_session.load.duration"].data.data_points
    assert sum(point.count for point in loads) == 2
    assert loads[0].explicit_bounds == (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
    operations = metrics["db.client.operation.duration"].data.data_points
    assert sum(point.count for point in operations) == 2


async def test_what_layers_say(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    monkeypatch.setattr(storage.store, "is_down", True, raising=False)
    watch(storage)
    (point,) = watch.metrics()["aiohttp_session.store.down"].data.data_points
    assert point.value == 1
    assert "aiohttp_session.near_cache.hits" not in watch.metrics()
    uninstrument(storage)
    assert watch.metrics().get("aiohttp_session.store.down") is None


async def test_a_near_cache_is_counted_and_stays_in_front(watch: Watch) -> None:
    class Info:
        hits, misses = 3, 1

    class Near(Store):
        def __init__(self, store: Store) -> None:
            self.store = store

        def near_cache_info(self) -> Info:
            return Info()

        def read(self, key: str) -> Any:
            return self.store.read(key)

        create = swap = delete = read  # type: ignore[assignment]

    storage = ServerStorage(Near(YieldingStorage().store))
    watch(storage)
    assert isinstance(storage.store, Near)
    await Browser(storage, "x").load()
    assert [span.name for span in watch.spans()] == [LOAD, "read"]
    metrics = watch.metrics()
    assert metrics["aiohttp_session.near_cache.hits"].data.data_points[0].value == 3
    assert metrics["aiohttp_session.near_cache.misses"].data.data_points[0].value == 1
    uninstrument(storage)
    await Browser(storage, "x").load()
    assert watch.spans() == []


async def test_the_near_cache_of_redis_is_counted(redis_server: Server, watch: Watch) -> None:
    async with Redis(host=HOST, port=redis_server.port) as client:
        storage = watch(RedisStorage(client, cookie_name="NEAR_TOLD", near_cache=10))
        browser = Browser(storage)
        await browser.set(a=1)

        async def is_hit() -> bool:
            watch.spans()
            assert await browser.load() == {"a": 1}
            return [span.name for span in watch.spans()] == [LOAD]  # and nothing on the store

        while not await is_hit():  # noqa: ASYNC110
            await asyncio.sleep(0)
        metrics = watch.metrics()
        info = storage.near_cache_info()
        assert metrics["aiohttp_session.near_cache.hits"].data.data_points[0].value == info.hits > 0
        assert metrics["aiohttp_session.near_cache.misses"].data.data_points[0].value == info.misses
        assert metrics["aiohttp_session.store.down"].data.data_points[0].value == 0
        await storage.finish()


async def test_nothing_of_a_session_is_told(make_storage: MakeStorage, watch: Watch) -> None:
    storage = watch(make_storage(max_age=1000))
    browser = Browser(storage)
    cookies = []

    def log_in(session: Session) -> None:
        session["token"] = "sesame"
        session.owner = "alibaba"
        session.regenerate_id()

    for action in (log_in, log_in, lambda session: session.invalidate()):
        cookies.append(str(browser.cookie))
        await browser.do(action)
    await storage.sessions_of("alibaba")
    texts = [span.to_json() for span in watch.spans()]
    texts.append(str(watch.metrics()))
    assert len(texts) > 10
    for secret in ("sesame", "alibaba", "token", NAME, *cookies[1:]):
        assert not any(secret in text for text in texts)


async def test_it_can_be_taken_off(make_storage: MakeStorage, watch: Watch) -> None:
    storage = make_storage()
    before = storage.store, dict(vars(storage))
    watch(storage)
    with pytest.raises(ValueError, match="instrumented already"):
        watch(storage)
    uninstrument(storage)
    assert (storage.store, dict(vars(storage))) == before
    with pytest.raises(ValueError, match="is not instrumented"):
        uninstrument(storage)
    await Browser(storage).set(a=1)
    assert watch.spans() == []


async def test_without_providers_it_uses_the_global_ones(make_storage: MakeStorage) -> None:
    storage = make_storage(on_conflict="merge")
    instrument(storage)
    browser = Browser(storage)
    await browser.set(a=1)
    await browser.set(b=2)
    assert await browser.load() == {"a": 1, "b": 2}
    store: Any = storage.store
    assert store.timeout == store.store.timeout
    await storage.finish()


@pytest.mark.parametrize("what", ["tracer_provider", "meter_provider", "both"])
async def test_what_reports_to_nobody_is_left_out(
    make_storage: MakeStorage, watch: Watch, what: str
) -> None:
    providers: dict[str, Any] = {
        "tracer_provider": trace.NoOpTracerProvider(),
        "meter_provider": NoOpMeterProvider(),
    }
    if what != "both":
        providers = {**watch.providers, what: providers[what]}
    storage = make_storage()
    instrument(storage, **providers)
    browser = Browser(storage)
    await browser.set(a=1)
    assert await browser.load() == {"a": 1}
    assert len(watch.spans()) == (5 if what == "meter_provider" else 0)
    assert ("aiohttp_session.outcomes" in watch.metrics()) == (what == "tracer_provider")
    assert isinstance(storage.store, TelemetryStore) == (what != "both")


async def test_what_stores_say_of_themselves() -> None:
    def describe(storage: ServerStorage) -> Any:
        return storage.store.describe()

    async with Redis(host=HOST, port=1234) as client:
        assert describe(RedisStorage(client)) == {
            "db.system.name": "redis",
            "server.address": HOST,
            "server.port": 1234,
        }
    async with Redis(unix_socket_path="/run/redis") as client:
        assert describe(RedisStorage(client)) == {
            "db.system.name": "redis",
            "server.address": "/run/redis",
        }
    cache = aiomcache.Client(HOST, 1234)
    assert describe(MemcachedStorage(cache)) == {
        "db.system.name": "memcached",
        "server.address": HOST,
        "server.port": 1234,
    }
    del cache._pool
    assert describe(MemcachedStorage(cache)) == {"db.system.name": "memcached"}


def test_a_store_of_ones_own_is_told_by_its_name() -> None:
    assert Store.describe(YieldingStorage().store) == {"db.system.name": "YieldingStore"}
    client: Any = Redis()
    client.connection_pool.connection_kwargs.clear()
    assert RedisStorage(client).store.describe() == {"db.system.name": "redis"}


def test_it_is_not_imported_unasked() -> None:
    code = "import sys, aiohttp_session.memory_storage; print('opentelemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_opentelemetry_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['opentelemetry'] = None; import aiohttp_session.telemetry"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Please install opentelemetry-api: pip install aiohttp-session[otel]" in done.stderr
