"""The server storages, for tests that every one of them must pass."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import aiomcache
import pytest
from redis.asyncio import Redis

from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.server_storage import ServerOptions, ServerStorage
from aiohttp_session.stores.memory import MemoryStore
from benchmarks.servers import HOST

if TYPE_CHECKING:
    from typing_extensions import Unpack

MakeStorage: TypeAlias = Callable[..., ServerStorage]


class YieldingStore(MemoryStore):
    """A store in memory that takes a turn of the event loop for each operation, as others do."""

    async def read(self, key: str) -> bytes | None:
        await asyncio.sleep(0)
        return await super().read(key)

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        await asyncio.sleep(0)
        await super().create(key, payload, ttl)

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        await asyncio.sleep(0)
        return await super().swap(key, expected, payload, ttl)

    async def delete(self, key: str) -> None:
        await asyncio.sleep(0)
        await super().delete(key)


class YieldingStorage(ServerStorage):
    """A storage on a store of its own."""

    store: YieldingStore

    def __init__(self, **options: Unpack[ServerOptions]) -> None:
        super().__init__(YieldingStore(max_records=100_000), **options)


@contextlib.asynccontextmanager
async def server_storages(
    kind: str, get_fixture: Callable[[str], Any]
) -> AsyncIterator[MakeStorage]:
    """Yield a function that makes server storages of one kind, all on one store."""
    if kind == "memory":
        yield YieldingStorage
    elif kind == "redis":
        async with Redis(host=HOST, port=get_fixture("redis_server").port) as client:
            await client.flushall()
            yield lambda **options: RedisStorage(client, **options)
    else:
        cache = aiomcache.Client(HOST, get_fixture("memcached_server").port)
        try:
            await cache.flush_all()
            yield lambda **options: MemcachedStorage(cache, **options)
        finally:
            await cache.close()


async def stored(storage: ServerStorage, identity: str) -> bytes | None:
    """Return the record of an id."""
    return await storage.store.read(storage._keys.get(identity))


async def has_mark(storage: ServerStorage, identity: str) -> bool:
    """Tell whether a session has moved away from an id."""
    record = await stored(storage, identity)
    return record is not None and record.startswith(b'{"moved":')


def innermost(storage: ServerStorage) -> Any:
    """Return the store behind all layers."""
    store: Any = storage.store
    while hasattr(store, "store"):
        store = store.store
    return store


@pytest.fixture(params=["memory", "redis", "memcached"])
async def make_storage(request: pytest.FixtureRequest) -> AsyncIterator[MakeStorage]:
    async with server_storages(request.param, request.getfixturevalue) as make:
        yield make
