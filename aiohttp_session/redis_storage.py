"""Sessions in Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .server_storage import ServerOptions, ServerStorage
from .stores._redis_client import library
from .stores.redis import RedisStore

try:
    import redis
    from redis import asyncio as aioredis

    REDIS_VERSION: tuple[int, ...] | None = redis.VERSION
except ImportError:  # pragma: no cover - an optional dependency
    aioredis = None  # type: ignore[assignment]
    REDIS_VERSION = None

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RedisStorage(ServerStorage):
    """Keep sessions in Redis, under ``cookie_name + "_" + id``.

    :param redis_pool: a client that speaks redis-py's asyncio interface: ``redis.asyncio.Redis``,
        also of a Sentinel, ``redis.asyncio.RedisCluster``, or one of valkey's.
    :param timeout: seconds after which a load or save fails with TimeoutError.
    :raises RuntimeError: if redis is not installed, or older than 5.0.2.
    :raises TypeError: if redis_pool is not such a client.
    :raises ValueError: if timeout is not positive.

    Takes the options of `AbstractStorage`, `LifecycleStorage` and `ServerStorage` as well.
    """

    store: RedisStore

    def __init__(
        self, redis_pool: aioredis.Redis, *, timeout: float = 5, **options: Unpack[ServerOptions]
    ) -> None:
        if library(redis_pool) != "valkey":
            if aioredis is None:
                raise RuntimeError("Please install redis: pip install aiohttp-session[aioredis]")
            if REDIS_VERSION is not None and REDIS_VERSION < (5, 0, 2):
                raise RuntimeError("redis<5.0.2 is not supported")
        super().__init__(RedisStore(redis_pool, timeout=timeout), **options)
        self._redis = redis_pool
