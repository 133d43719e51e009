"""Sessions in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from . import _redis
from ._redis import Operation, pack
from .storage import RemoteOptions, RemoteStorage

try:
    import redis
    from redis import asyncio as aioredis

    REDIS_VERSION: tuple[int, ...] | None = redis.VERSION
except ImportError:  # pragma: no cover - an optional dependency
    aioredis = None  # type: ignore[assignment]
    REDIS_VERSION = None

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SWAP = """\
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[3] == '' then redis.call('SET', KEYS[1], ARGV[2])
else redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3]) end
return 1
"""


class RedisStorage(RemoteStorage):
    """Keep sessions in Redis, under ``cookie_name + "_" + id``.

    :param redis_pool: a client that speaks redis-py's asyncio interface: ``redis.asyncio.Redis``,
        also of a Sentinel, ``redis.asyncio.RedisCluster``, or one of valkey's.
    :raises RuntimeError: if redis is not installed, or older than 4.3.
    :raises TypeError: if redis_pool is not such a client.

    Takes the options of `AbstractStorage`, `LifecycleStorage`, `ServerStorage` and
    `RemoteStorage` as well.
    """

    def __init__(self, redis_pool: aioredis.Redis, **options: Unpack[RemoteOptions]) -> None:
        super().__init__(**options)
        if _redis.library(redis_pool) != "valkey":
            if aioredis is None:
                raise RuntimeError("Please install redis: pip install aiohttp-session[aioredis]")
            if REDIS_VERSION is not None and REDIS_VERSION < (4, 3):
                raise RuntimeError("redis<4.3 is not supported")
        if not _redis.is_client(redis_pool):
            raise TypeError(f"Expected redis.asyncio.Redis got {type(redis_pool)}")
        self._redis = redis_pool
        self._is_first = True

    def read(self, key: str) -> asyncio.Future[bytes | None]:
        """Return the record under a key."""
        packed = f"*2\r\n$3\r\nGET\r\n${len(key)}\r\n{key}\r\n".encode("ascii")
        operation: Operation = (key, packed, _get)
        record: asyncio.Future[bytes | None] = self._batches.get().submit(operation, droppable=True)
        return record

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        """Store a record under a key, whether or not there is one."""
        await self._set(key, payload, ttl, ())

    async def update(self, key: str, payload: bytes, ttl: int | None) -> bool:
        """Replace a record; return False, and do nothing, if there is none."""
        return await self._set(key, payload, ttl, (b"XX",))

    async def _set(
        self, key: str, payload: bytes, ttl: int | None, condition: tuple[bytes, ...]
    ) -> bool:
        expiry = () if ttl is None else (b"EX", b"%d" % ttl)
        operation: Operation = (
            key,
            pack(b"SET", key.encode(), payload, *expiry, *condition),
            lambda client, key: client.set(key, payload, ex=ttl, xx=bool(condition)),
        )
        return bool(await self._batches.get().submit(operation, len(payload)))

    async def swap(self, key: str, expected: bytes, payload: bytes, ttl: int | None) -> bool:
        """Replace a record if it still is the expected one; return whether it was, atomically."""
        arguments = (key.encode(), expected, payload, b"" if ttl is None else b"%d" % ttl)
        operation: Operation = (
            key,
            pack(b"EVAL", _SWAP.encode(), b"1", *arguments),
            lambda client, _: client.eval(_SWAP, 1, *arguments),
        )
        size = len(expected) + len(payload)
        return bool(await self._batches.get().submit(operation, size))

    async def delete(self, key: str) -> None:
        """Delete a record, if there is one."""
        operation: Operation = (key, pack(b"DEL", key.encode()), _delete)
        await self._batches.get().submit(operation)

    def _make_batch(self) -> _redis.Server | _redis.Cluster:
        # Connections belong to one event loop: the first has the client's own.
        is_first, self._is_first = self._is_first, False
        return _redis.connect(self._redis, self._timeout, is_first=is_first)


def _get(client: Any, key: str) -> Awaitable[Any]:
    return client.get(key)  # type: ignore[no-any-return]


def _delete(client: Any, key: str) -> Awaitable[Any]:
    return client.delete(key)  # type: ignore[no-any-return]
