"""Sessions in memcached."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .storage import ServerOptions, ServerStorage

try:
    import aiomcache
except ImportError as error:
    raise ImportError("Please install aiomcache: pip install aiohttp-session[aiomcache]") from error

if TYPE_CHECKING:
    from typing_extensions import Unpack

_RELATIVE_LIMIT = 30 * 24 * 60 * 60  # seconds: memcached takes a longer expiry for a Unix time


class MemcachedStorage(ServerStorage):
    """Keep sessions in memcached, under ``cookie_name + "_" + id``.

    :param memcached_conn: the client.

    Takes the options of `AbstractStorage`, `LifecycleStorage` and `ServerStorage` as well.
    """

    def __init__(self, memcached_conn: aiomcache.Client, **options: Unpack[ServerOptions]) -> None:
        super().__init__(**options)
        self.conn = memcached_conn

    async def read(self, key: str) -> bytes | None:
        return await self.conn.get(key.encode("ascii"))

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        await self.conn.set(key.encode("ascii"), payload, exptime=_expiry(ttl))

    async def update(self, key: str, payload: bytes, ttl: int | None) -> bool:
        return await self.conn.replace(key.encode("ascii"), payload, exptime=_expiry(ttl))

    async def swap(self, key: str, expected: bytes, payload: bytes, ttl: int | None) -> bool:
        name = key.encode("ascii")
        current, token = await self.conn.gets(name)
        if current != expected or token is None:
            return False
        return await self.conn.cas(name, payload, token, exptime=_expiry(ttl))

    async def delete(self, key: str) -> None:
        await self.conn.delete(key.encode("ascii"))


def _expiry(ttl: int | None) -> int:
    """Write a TTL as memcached takes it."""
    if ttl is None:
        return 0
    return ttl if ttl <= _RELATIVE_LIMIT else int(time.time()) + ttl
