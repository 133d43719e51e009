"""Records in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from . import Store, _redis_wire
from ._redis_wire import Operation, pack
from .per_loop import PerLoop

_SWAP = """\
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[3] == '' then redis.call('SET', KEYS[1], ARGV[2])
else redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3]) end
return 1
"""


class RedisStore(Store):
    """Keep records in Redis.

    :param client: speaks redis-py's asyncio interface.
    :param timeout: seconds after which an operation fails with TimeoutError.
    :raises TypeError: if client is no such client.
    :raises ValueError: if timeout is not positive.
    """

    timeout: float

    def __init__(self, client: Any, *, timeout: float = 5) -> None:
        if not _redis_wire.is_client(client):
            raise TypeError(f"Expected redis.asyncio.Redis got {type(client)}")
        if timeout <= 0:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
        self.timeout = timeout
        self._client = client
        self._is_first = True
        self._servers: PerLoop[Any] = PerLoop(self._connect)
        if hasattr(client, "get_node_from_key"):
            self.server_of = self._node_of

    def read(self, key: str) -> asyncio.Future[bytes | None]:
        """Return the record under a key."""
        packed = f"*2\r\n$3\r\nGET\r\n${len(key)}\r\n{key}\r\n".encode("ascii")
        operation: Operation = (key, packed, _get)
        record: asyncio.Future[bytes | None] = self._servers.get().submit(operation, droppable=True)
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
            lambda client, key: client.set(
                key, payload, ex=ttl, xx=condition == (b"XX",), nx=condition == (b"NX",)
            ),
        )
        return bool(await self._servers.get().submit(operation, len(payload)))

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        """Replace a record if it still is the expected one; return whether it was, atomically."""
        if expected is None:
            return await self._set(key, payload, ttl, (b"NX",))
        arguments = (key.encode(), expected, payload, b"" if ttl is None else b"%d" % ttl)
        operation: Operation = (
            key,
            pack(b"EVAL", _SWAP.encode(), b"1", *arguments),
            lambda client, _: client.eval(_SWAP, 1, *arguments),
        )
        size = len(expected) + len(payload)
        return bool(await self._servers.get().submit(operation, size))

    async def delete(self, key: str) -> None:
        """Delete a record, if there is one."""
        operation: Operation = (key, pack(b"DEL", key.encode()), _delete)
        await self._servers.get().submit(operation)

    def describe(self) -> dict[str, str | int]:
        """Say what the store is, and where, unless there are several servers."""
        attributes: dict[str, str | int] = {"db.system.name": "redis"}
        pool = getattr(self._client, "connection_pool", None)
        options = getattr(pool, "connection_kwargs", {})
        address = options.get("path") or options.get("host")
        if address is not None:
            attributes["server.address"] = str(address)
            if options.get("path") is None:
                attributes["server.port"] = int(options.get("port") or 6379)
        return attributes

    async def finish(self) -> None:
        """Wait for what is under way in this event loop, and give its connections back."""
        await self._servers.get().finish()

    def _node_of(self, key: str) -> str | None:
        try:
            return str(self._client.get_node_from_key(key).name)
        except Exception:  # noqa: BLE001 - it doesn't know its nodes yet, or none has the slot
            return None

    def _connect(self) -> _redis_wire.Server | _redis_wire.Cluster:
        # Connections belong to one event loop: the first has the client's own.
        is_first, self._is_first = self._is_first, False
        return _redis_wire.connect(self._client, self.timeout, is_first=is_first)


def _get(client: Any, key: str) -> Awaitable[Any]:
    return client.get(key)  # type: ignore[no-any-return]


def _delete(client: Any, key: str) -> Awaitable[Any]:
    return client.delete(key)  # type: ignore[no-any-return]
