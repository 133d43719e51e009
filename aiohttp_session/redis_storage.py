"""Sessions in Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._options import Unpack, show_options
from .server_storage import ServerOptions, ServerStorage
from .stores import Store
from .stores._redis_client import library
from .stores.near_cache import NearCache, NearCacheInfo
from .stores.outage import CircuitBreaker
from .stores.redis import RedisStore

try:
    import redis
    from redis import asyncio as aioredis

    REDIS_VERSION: tuple[int, ...] | None = redis.VERSION
except ImportError:  # pragma: no cover - an optional dependency
    if not TYPE_CHECKING:
        aioredis = None
    REDIS_VERSION = None


@show_options
class RedisStorage(ServerStorage):
    """Keep sessions in Redis, under ``cookie_name + "_" + id``.

    :param redis_pool: one of redis-py's asyncio clients: ``redis.asyncio.Redis``, also of a
        Sentinel, ``redis.asyncio.RedisCluster``, a subclass of these, or one of valkey's.
    :param timeout: seconds after which a load or save fails with TimeoutError.
    :param circuit_breaker: while the store is down, let operations fail at once with
        `StoreUnavailableError`; see `CircuitBreaker`.
    :param near_cache: how many records to keep in this process, to answer reads from for as long as
        Redis (6.0 or later) reports changes to them; by default none. See `NearCache`.
    :raises RuntimeError: if redis is not installed, or older than 5.0.2.
    :raises TypeError: if redis_pool is not such a client.
    :raises ValueError: if timeout is not positive, near_cache is negative, or the client's
        connections can't be used for it.

    Takes the options of `AbstractStorage`, `LifecycleStorage` and `ServerStorage` as well.
    """

    def __init__(
        self,
        redis_pool: aioredis.Redis,
        *,
        timeout: float = 5,
        circuit_breaker: bool = True,
        near_cache: int = 0,
        **options: Unpack[ServerOptions],
    ) -> None:
        if library(redis_pool) != "valkey":
            if aioredis is None:
                raise RuntimeError("Please install redis: pip install aiohttp-session[aioredis]")
            if REDIS_VERSION is not None and REDIS_VERSION < (5, 0, 2):
                raise RuntimeError("redis<5.0.2 is not supported")
        redis_store = RedisStore(redis_pool, timeout=timeout)
        store: Store = redis_store
        if circuit_breaker:
            store = CircuitBreaker(store)
        if near_cache:
            store = NearCache(store, redis_store, max_records=near_cache)
        super().__init__(store, **options)
        self._redis = redis_pool
        self._near_cache = store if isinstance(store, NearCache) else None

    def near_cache_info(self) -> NearCacheInfo | None:
        """Return the near cache's size and its hits and misses; None if there is none."""
        return None if self._near_cache is None else self._near_cache.near_cache_info()
