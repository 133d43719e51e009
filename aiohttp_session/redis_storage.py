"""Sessions in Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .storage import ServerOptions, ServerStorage

try:
    import redis
    from redis import asyncio as aioredis

    REDIS_VERSION: tuple[int, ...] | None = redis.VERSION
except ImportError:  # pragma: no cover - an optional dependency
    aioredis = None  # type: ignore[assignment]
    REDIS_VERSION = None

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SWAP = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[3] == '' then redis.call('SET', KEYS[1], ARGV[2])
else redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3]) end
return 1
"""


class RedisStorage(ServerStorage):
    """Keep sessions in Redis, under ``cookie_name + "_" + id``.

    :param redis_pool: a client that speaks redis-py's asyncio interface.
    :raises RuntimeError: if redis is not installed, or older than 4.3.
    :raises TypeError: if redis_pool is not such a client.

    Takes the options of `AbstractStorage`, `LifecycleStorage` and `ServerStorage` as well.
    """

    def __init__(self, redis_pool: aioredis.Redis, **options: Unpack[ServerOptions]) -> None:
        super().__init__(**options)
        if aioredis is None:
            raise RuntimeError("Please install redis: pip install aiohttp-session[aioredis]")
        if REDIS_VERSION is not None and REDIS_VERSION < (4, 3):
            raise RuntimeError("redis<4.3 is not supported")
        if not isinstance(redis_pool, aioredis.Redis):
            raise TypeError(f"Expected redis.asyncio.Redis got {type(redis_pool)}")
        self._redis = redis_pool

    async def read(self, key: str) -> bytes | None:
        return _as_bytes(await self._redis.get(key))

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        await self._redis.set(key, payload, ex=ttl)

    async def update(self, key: str, payload: bytes, ttl: int | None) -> bool:
        return bool(await self._redis.set(key, payload, ex=ttl, xx=True))

    async def swap(self, key: str, expected: bytes, payload: bytes, ttl: int | None) -> bool:
        text = "" if ttl is None else str(ttl)
        return bool(await self._redis.eval(_SWAP, 1, key, expected, payload, text))

    async def delete(self, key: str) -> None:
        await self._redis.delete(key)


def _as_bytes(record: Any) -> bytes | None:
    return record.encode("utf-8") if isinstance(record, str) else record
