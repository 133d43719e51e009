"""Both implementations of the hot path, and real servers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import sys
import time
import warnings
from collections.abc import AsyncIterator, Generator, Iterator
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from redis.asyncio import Redis

from aiohttp_session._core import TWINS
from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.stores.memcached import MemcachedStore
from aiohttp_session.stores.redis import RedisStore
from benchmarks import servers
from tests.proxy import Proxy
from tests.waiting import PATIENCE, LoopClock

_PURE_ONLY = bool(os.environ.get("AIOHTTP_SESSION_NO_EXTENSIONS"))

# Property tests take examples by the hundred, and fewer where one is an order of requests or goes
# through a storage. AIOHTTP_SESSION_EXAMPLES=20 asks for 20 times as many.
_FACTOR = float(os.environ.get("AIOHTTP_SESSION_EXAMPLES") or 1)


def _examples(number: int) -> int:
    return max(1, int(number * _FACTOR))


settings.register_profile(
    "trees",
    deadline=None,
    derandomize=_FACTOR <= 1,
    max_examples=_examples(200),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
settings.load_profile("trees")
settings.register_profile("texts", max_examples=_examples(500))
settings.register_profile("orders", max_examples=_examples(100))
settings.register_profile("storages", max_examples=_examples(30))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the tests marked with `once` over one implementation."""
    again = {
        item
        for item in items
        if item.get_closest_marker("once")
        and not _PURE_ONLY
        and item.callspec.params["implementation"] == "python"  # type: ignore[attr-defined]
    }
    if again:
        config.hook.pytest_deselected(items=list(again))
        items[:] = [item for item in items if item not in again]


_has_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Take down that a test has failed."""
    report = yield
    item.stash[_has_failed] = report.failed or item.stash.get(_has_failed, False)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Throw away what a failing test leaves: complaints about it would meet another test."""
    try:
        yield
    finally:
        if item.stash.get(_has_failed, False):
            for name in ("last_exc", "last_value", "last_traceback"):  # they hold its variables
                vars(sys).pop(name, None)
            with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
                warnings.simplefilter("ignore")
                patch.setattr(sys, "unraisablehook", lambda unraisable: None)
                gc.collect()


@pytest.fixture(
    scope="session", autouse=True, params=["python"] if _PURE_ONLY else ["cython", "python"]
)
def implementation(request: pytest.FixtureRequest) -> str:
    """Run the whole suite over each implementation of the hot path.

    The twins are exchanged wherever the package or a test holds one.
    """
    name: str = request.param
    for compiled_name, pure in TWINS.items():
        if _PURE_ONLY:
            break
        compiled = _compiled(compiled_name)
        old, new = (pure, compiled) if name == "cython" else (compiled, pure)
        pairs = [(getattr(old, n), getattr(new, n)) for n in pure.__all__]
        for module_name, module in list(sys.modules.items()):
            root = module_name.partition(".")[0]
            if root in {"aiohttp_session", "tests"} and module not in {old, new}:
                _exchange(module, pairs)
    return name


def _compiled(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"aiohttp_session.{name}")
    except ImportError:
        pytest.fail(
            f"The extension aiohttp_session.{name} is missing: make develop builds it, and "
            "AIOHTTP_SESSION_NO_EXTENSIONS=1 tests without",
            pytrace=False,
        )


def _exchange(module: ModuleType, pairs: list[tuple[object, object]]) -> None:
    for attribute, value in list(vars(module).items()):
        for old, new in pairs:
            if value is old:
                setattr(module, attribute, new)


@pytest.fixture(scope="session", autouse=True)
def patient_stores() -> Iterator[None]:
    """Have stores that are given no time limit wait as long as only what is broken takes."""
    with pytest.MonkeyPatch.context() as patch:
        for made in (RedisStorage, RedisStore, MemcachedStorage, MemcachedStore):
            defaults: Any = made.__init__.__kwdefaults__
            assert defaults["timeout"] == 5
            patch.setitem(defaults, "timeout", PATIENCE)
        yield


@pytest.fixture(scope="session")
def redis_server() -> Iterator[servers.Server]:
    with servers.redis() as server:
        yield server


@pytest.fixture(scope="session")
def memcached_server() -> Iterator[servers.Server]:
    with servers.memcached() as server:
        yield server


@pytest.fixture
async def direct(redis_server: servers.Server) -> AsyncIterator[Any]:
    """A client that sees what is stored in Redis, whatever disturbs the others."""
    async with Redis(host=servers.HOST, port=redis_server.port) as client:
        await client.flushall()
        yield client


@pytest.fixture
async def proxy(memcached_server: servers.Server) -> AsyncIterator[Proxy]:
    """A way to memcached that can be disturbed; the tests of Redis have one of their own."""
    async with Proxy(memcached_server.port) as proxy:
        yield proxy


@pytest.fixture
def young_heap() -> Iterator[None]:
    """Let `gc.collect` look at nothing older than the test: all takes a third of a second."""
    if hasattr(gc, "freeze"):
        gc.freeze()
    yield
    if hasattr(gc, "freeze"):
        gc.unfreeze()


@pytest.fixture
async def cleanup() -> AsyncIterator[contextlib.AsyncExitStack]:
    """Takes what is to be done at the end of the test, whether or not it fails."""
    async with contextlib.AsyncExitStack() as stack:
        yield stack


class Clock:
    """A `time.time` that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


@pytest.fixture
async def loop_clock(monkeypatch: pytest.MonkeyPatch) -> LoopClock:
    """The clock of this test's event loop, which the time limits go by."""
    loop = asyncio.get_running_loop()
    clock = LoopClock(loop)
    monkeypatch.setattr(loop, "time", clock)
    return clock
