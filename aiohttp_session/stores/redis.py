"""Records in Redis."""

from __future__ import annotations

import asyncio
import enum
import hashlib
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp_session._core import write_command, write_get, write_set, write_swap

from . import Store, UnsettledError
from ._redis_client import (
    WORKERS,
    connections_of,
    is_client,
    log_once,
    tell,
    warn_once,
    why_not_plain,
    why_not_shared,
)
from ._redis_cluster import Cluster
from ._redis_pipeline import READ, WRITE, Operation
from ._redis_resp import is_reply
from ._redis_server import Server
from ._redis_tracking import Tracking
from ._redis_transaction import swap_by_transaction
from .kept_records import KeptRecords
from .per_loop import PerLoop

_NX = b"NX"  # only if there is none
_XX = b"XX"  # only if there is one
_SCRIPT = b"""\
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[3] then redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
else redis.call('SET', KEYS[1], ARGV[2]) end
return 1
"""
_DIGEST = hashlib.sha1(_SCRIPT, usedforsecurity=False).hexdigest().encode()


_REPEATS = 3  # of a deletion whose connection is lost each time


class _Way(enum.IntEnum):
    """The ways to swap a record, the best first; a server that refuses one is asked the next."""

    IFEQ = 0  # SET … IFEQ: Valkey 8.1, Redis 8.4
    SCRIPT = 1  # EVALSHA
    TRANSACTION = 2  # WATCH, MULTI
    PLAIN = 3  # GET, SET


@dataclass
class _Server:
    """What is known of the server of a client, for all storages of the client."""

    way: _Way = _Way.IFEQ


_servers: WeakKeyDictionary[Any, _Server] = WeakKeyDictionary()


class RedisStore(Store):
    """Keep records in Redis.

    A swap is ``SET … IFEQ`` where the server supports it (Valkey 8.1, Redis 8.4), else a script
    (``EVALSHA``), else a transaction (``WATCH``, ``MULTI``). If the server's user may run none of
    these, the store reads the record and then uses ``SET``. A write of another client between the
    two commands is lost then, and so is a write that is undone by a late ``SET``: the store logs
    one warning.

    A write whose connection was lost raises `UnsettledError`.

    :param client: one of redis-py's or valkey-py's asyncio clients.
    :param timeout: seconds after which an operation fails with TimeoutError.
    :raises TypeError: if client is no such client.
    :raises ValueError: if timeout is not positive.
    """

    timeout: float
    server_of: Callable[[str], Hashable] | None

    def __init__(self, client: Any, *, timeout: float = 5) -> None:
        if not is_client(client):
            raise TypeError(f"Expected redis.asyncio.Redis got {type(client)}")
        if timeout <= 0:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
        self.timeout = timeout
        self._client = client
        self._is_first = True
        self._server = _servers.setdefault(client, _Server())
        self._tracking: Tracking | None = None
        self._servers: PerLoop[Any] = PerLoop(self._connect)
        if hasattr(client, "get_node_from_key"):
            self.server_of = self._node_of

    def read(self, key: str) -> asyncio.Future[bytes | None]:
        """Return the record under a key."""
        operation: Operation = (key, write_get(key), (_get,), READ)
        record: asyncio.Future[bytes | None] = self._servers.get().submit(operation, droppable=True)
        return record

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        """Store a record under a new key."""
        await self._set(key, payload, ttl, b"")

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        """Replace a record if it is exactly the expected one; return whether it was."""
        if expected is None:
            return bool(await self._set(key, payload, ttl, _NX))
        way = self._server.way
        if way > _Way.SCRIPT:
            return await self._swap_slowly(way, key, expected, payload, ttl, None)
        digest = _DIGEST if way is _Way.SCRIPT else b""
        operation: Operation = (
            key,
            write_swap(key, expected, payload, ttl, digest),
            (_swap, expected, payload, ttl, digest),
            WRITE,
        )
        since = monotonic()
        try:
            future = self._servers.get().submit(operation, len(expected) + len(payload))
            return bool(await future)
        except Exception as error:
            if not is_reply(error):
                raise
            return await self._swap_otherwise(error, way, since, key, expected, payload, ttl)

    def _set(
        self, key: str, payload: bytes, ttl: int | None, condition: bytes
    ) -> asyncio.Future[Any]:
        operation: Operation = (
            key,
            write_set(key, payload, ttl, condition),
            (_set, payload, ttl, condition),
            WRITE,
        )
        future: asyncio.Future[Any] = self._servers.get().submit(operation, len(payload))
        return future

    async def _swap_otherwise(
        self,
        error: Exception,
        way: _Way,
        began: float,
        key: str,
        expected: bytes,
        payload: bytes,
        ttl: int | None,
    ) -> bool:
        """Swap a record in another way, after the server has refused one.

        :param began: when the swap began, by `time.monotonic`.
        """
        since = asyncio.get_running_loop().time() - (monotonic() - began)
        if way is _Way.IFEQ and "syntax error" in str(error):
            if self._choose(_Way.SCRIPT) is _Way.SCRIPT:
                try:
                    return await self._run_script(_DIGEST, since, key, expected, payload, ttl)
                except Exception as refusal:  # noqa: BLE001 - it is judged below
                    error = refusal
            else:  # as another storage has found out meanwhile
                return await self._swap_slowly(self._server.way, key, expected, payload, ttl, since)
        if type(error).__name__ == "NoScriptError":
            try:  # EVAL loads the script as well
                return await self._run_script(_SCRIPT, since, key, expected, payload, ttl)
            except Exception as refusal:  # noqa: BLE001 - it is judged below
                error = refusal
        if not is_refused(error):
            raise error
        log_once(
            "Redis refuses EVALSHA: a record is compared and replaced by a transaction (WATCH, "
            "MULTI), which takes three round trips"
        )
        way = self._choose(_Way.TRANSACTION)
        return await self._swap_slowly(way, key, expected, payload, ttl, since)

    async def _swap_slowly(
        self,
        way: _Way,
        key: str,
        expected: bytes,
        payload: bytes,
        ttl: int | None,
        since: float | None,
    ) -> bool:
        """Swap a record by a transaction, or by reading and setting it.

        :param since: when the swap began (loop time); None for now.
        """
        servers = self._servers.get()
        if since is None:
            since = asyncio.get_running_loop().time()
        if way is _Way.TRANSACTION:
            operation: Operation = (key, b"", (swap_by_transaction, expected, payload, ttl), WRITE)
            try:
                return bool(await servers.submit_transaction(operation, since))
            except Exception as error:
                if not (isinstance(error, NotImplementedError) or is_refused(error)):
                    raise
            self._choose(_Way.PLAIN)
            warn_once(
                "Redis refuses SET IFEQ, EVALSHA and WATCH: a record is read and then replaced by "
                "SET. Of two requests that change a session at the same time, one may undo the "
                "other, and so may a write that the network delivers late"
            )
        reading: Operation = (key, write_get(key), (_get,), READ)
        if await servers.resubmit(reading, since) != expected:
            return False
        operation = (key, write_set(key, payload, ttl, _XX), (_set, payload, ttl, _XX), WRITE)
        return bool(await servers.resubmit(operation, since, len(payload)))

    async def _run_script(
        self,
        script: bytes,
        since: float,
        key: str,
        expected: bytes,
        payload: bytes,
        ttl: int | None,
    ) -> bool:
        operation: Operation = (
            key,
            write_swap(key, expected, payload, ttl, script),
            (_swap, expected, payload, ttl, script),
            WRITE,
        )
        size = len(expected) + len(payload)
        return bool(await self._servers.get().resubmit(operation, since, size))

    def _choose(self, way: _Way) -> _Way:
        self._server.way = way = max(way, self._server.way)
        return way

    async def delete(self, key: str) -> None:
        """Delete a record, if there is one."""
        operation: Operation = (key, write_command(b"DEL", key.encode()), (_delete,), WRITE)
        server = self._servers.get()
        future = server.submit(operation)
        since = future.get_loop().time()
        for _ in range(_REPEATS):  # a deletion may be repeated: the key is never used again
            try:
                await future
            except UnsettledError:
                future = server.resubmit(operation, since)
            else:
                return
        await future

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

    def track(self, records: Callable[[], KeptRecords]) -> None:
        """Keep what is read, for as long as the server tells of changes: see `NearCache`.

        :param records: gives what keeps the records of the running event loop.
        :raises ValueError: if the client's connections can't be used for that.
        """
        reason = why_not_shared(self._client)
        if reason is not None:
            raise ValueError(f"near_cache can't be used with this client: {reason}")
        self._tracking = Tracking(records)

    async def finish(self) -> None:
        """Wait for what is under way in this event loop, and give its connections back."""
        await self._servers.get().finish()

    def _node_of(self, key: str) -> str | None:
        try:
            return str(self._client.get_node_from_key(key).name)
        except Exception:  # noqa: BLE001 - it doesn't know its nodes yet, or none has the slot
            return None

    def _connect(self) -> Server | Cluster:
        # Connections belong to one event loop: the first has the client's own.
        is_first, self._is_first = self._is_first, False
        if hasattr(self._client, "get_node_from_key"):
            return Cluster(self._client, self.timeout, tracking=self._tracking)
        return _connect_one(self._client, self.timeout, is_first=is_first, tracking=self._tracking)


def _connect_one(
    client: Any, timeout: float, *, is_first: bool, tracking: Tracking | None = None
) -> Server:
    """Make what does the operations in this event loop.

    :param is_first: the client's own connections are free for this loop; otherwise it gets others.
    :param tracking: what the near cache is told by; None if there is none.
    """
    reason = why_not_plain(client)
    if reason is not None:
        tell("by the client's own methods, one operation at a time for each connection", reason)
        return Server(client, None, timeout)
    client, connections = connections_of(client, is_first=is_first)
    if connections.limit <= WORKERS:
        tell("a batch at a time", f"its pool has only {connections.limit} connections")
    return Server(client, connections, timeout, tracking=tracking)


def is_refused(error: Exception) -> bool:
    """Tell whether a server does not let its user run a command, or does not know the command.

    That the user may not use a key is another error.
    """
    text = str(error)
    if type(error).__name__ == "NoPermissionError":
        return "to run" in text
    return "unknown command" in text or "can't run this command" in text


def _get(client: Any, key: str) -> Awaitable[Any]:
    return client.get(key)  # type: ignore[no-any-return]


def _set(
    client: Any, key: str, payload: bytes, ttl: int | None, condition: bytes
) -> Awaitable[Any]:
    return client.set(  # type: ignore[no-any-return]
        key, payload, ex=ttl, xx=condition is _XX, nx=condition is _NX
    )


def _swap(
    client: Any, key: str, expected: bytes, payload: bytes, ttl: int | None, script: bytes
) -> Awaitable[Any]:
    expiry = () if ttl is None else (ttl,)
    if script == _DIGEST:
        return client.evalsha(script.decode(), 1, key, expected, payload, *expiry)  # type: ignore[no-any-return]
    if script:
        return client.eval(script, 1, key, expected, payload, *expiry)  # type: ignore[no-any-return]
    options = ("EX", *expiry) if expiry else ()
    command = ("SET", key, payload, *options, "IFEQ", expected)
    return client.execute_command(*command)  # type: ignore[no-any-return]


def _delete(client: Any, key: str) -> Awaitable[Any]:
    return client.delete(key)  # type: ignore[no-any-return]
