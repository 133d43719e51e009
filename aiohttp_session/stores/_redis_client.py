"""What a client of Redis is, and its connections."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Coroutine
from functools import partial
from typing import Any

from aiohttp_session.log import log

from ._redis_pipeline import READ, Operation, do

WORKERS = 4  # connections of a server in use at the same time, beside the one that is shared
_METHODS = ("get", "set", "delete", "eval", "evalsha", "execute_command")
_LIBRARIES = ("redis.", "valkey.")
_ASYNCIO = ("redis.asyncio.", "valkey.asyncio.")
_CLIENTS = {"Redis", "RedisCluster", "Valkey", "ValkeyCluster"}
_COPIED_POOLS = {"ConnectionPool", "BlockingConnectionPool"}
told: set[str] = set()
_CLOSING = 1  # seconds that the client may take to close a connection


def library(client: Any) -> str:
    """Return the name of the package that a client is of."""
    return type(client).__module__.partition(".")[0]


def is_client(thing: Any) -> bool:
    """Tell whether something is one of redis-py's or valkey-py's asyncio clients."""
    return any(
        kind.__module__.startswith(_ASYNCIO) and kind.__name__ in _CLIENTS
        for kind in thing.__class__.__mro__
    )


def why_not_plain(client: Any) -> str | None:
    """Tell why only a client's own methods will do; None if its connections can be used."""
    if getattr(client, "single_connection_client", False):
        return "it is a single_connection_client"
    for name in _METHODS:
        if not _is_of_library(getattr(client, name)):
            return f"its {name}() is not the library's own"
    pool = getattr(client, "connection_pool", None)
    if pool is not None and not inspect.iscoroutinefunction(getattr(pool, "release", None)):
        return "its connection pool is not the library's own"
    return None


def why_not_shared(client: Any) -> str | None:
    """Tell why no connection of a client's can be pipelined; None if one can, for all one knows."""
    if hasattr(client, "get_node_from_key"):
        places = list(client.nodes_manager.startup_nodes.values())
        for place in places:
            if not hasattr(place, "release"):
                return f"its {type(place).__name__} has no release()"
    else:
        reason = why_not_plain(client)
        if reason is not None:
            return reason
        places = [client.connection_pool]
    for place in places:
        if not _is_below(place.connection_class):
            return f"its {place.connection_class.__name__} has methods of its own"
        if getattr(place, "max_connections", WORKERS) <= WORKERS:
            return f"max_connections must be more than {WORKERS}"
    return None


def has_successor(client: Any) -> bool:
    """Tell whether another server may take over, as in a cluster or with Sentinel."""
    pool = getattr(client, "connection_pool", None)
    return hasattr(client, "get_node_from_key") or hasattr(pool, "sentinel_manager")


def tell(way: str, reason: str) -> None:
    """Log in which way operations are done, if it isn't the fastest one."""
    log_once(f"Redis is asked {way}: {reason}")


def log_once(text: str) -> None:
    """Log what every store and every event loop would have to say."""
    if text not in told:
        told.add(text)
        log.info("%s", text)


def warn_once(text: str) -> None:
    """Log a warning that every store and every event loop would have to give."""
    if text not in told:
        told.add(text)
        log.warning("%s", text)


def is_pipelined(connection: Any) -> bool:
    """Tell whether a connection can be written to and read without its own methods."""
    writer = getattr(connection, "_writer", None)
    return (
        _is_below(type(connection))
        and isinstance(writer, asyncio.StreamWriter)
        and isinstance(writer.transport.get_protocol(), asyncio.StreamReaderProtocol)
        and isinstance(getattr(connection, "_reader", None), asyncio.StreamReader)
        and callable(getattr(getattr(connection, "_parser", None), "parse_error", None))
    )


async def call(client: Any, operation: Operation) -> Any:
    """Do an operation by a client's own methods, whose rules for retries hold."""
    for _ in range(3 if operation[3] is READ else 0):
        try:
            return _encoded(await do(operation, client))
        except (AttributeError, TypeError):
            # redis-py's cluster client has closed connections that others use, since a slot
            # moved; what they hold, or call, is None now.
            pass
    return _encoded(await do(operation, client))


def _encoded(reply: Any) -> Any:
    # The client may have been told to decode replies.
    return reply.encode("utf-8") if isinstance(reply, str) else reply


class Pool:
    """The connections of a client."""

    def __init__(self, pool: Any, *, is_copied: bool) -> None:
        self._pool = pool
        self._is_copied = is_copied
        self.limit: int = getattr(pool, "max_connections", WORKERS)
        self._acquire = pool.get_connection
        name = inspect.signature(pool.get_connection).parameters.get("command_name")
        if name is not None and name.default is name.empty:
            self._acquire = partial(pool.get_connection, "GET")  # redis-py before 5.3

    async def acquire(self) -> Any:
        """Return an open connection."""
        return await self._acquire()

    async def release(self, connection: Any) -> None:
        """Take a connection back."""
        await self._pool.release(connection)

    async def close(self) -> None:
        """Close the connections that are nobody else's."""
        if self._is_copied:
            await self._pool.disconnect()


class Node:
    """The connections of a cluster's node."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.limit: int = node.max_connections

    async def acquire(self) -> Any:
        """Return an open connection."""
        connection = self.node.acquire_connection()
        if not connection.is_connected:
            try:
                await connection.connect()
            except BaseException:
                await give_back(self, connection, is_clean=False)
                raise
        return connection

    async def release(self, connection: Any) -> None:
        """Take a connection back."""
        self.node.release(connection)

    async def close(self) -> None:
        """Leave them: they are the client's."""


def connections_of(client: Any, *, is_first: bool) -> tuple[Any, Pool]:
    """Return a plain client for the running event loop, and its connections.

    :param is_first: the client's own connections are free for this loop; otherwise it gets others.
    """
    pool = client.connection_pool
    is_copied = not is_first and type(pool).__name__ in _COPIED_POOLS
    if is_copied:
        pool = _copy_pool(pool)
        client = type(client)(connection_pool=pool)
    return client, Pool(pool, is_copied=is_copied)


async def give_back(connections: Pool | Node, connection: Any, *, is_clean: bool) -> None:
    """Let a connection go, whatever its client makes of that.

    :param is_clean: no reply is under way; otherwise whoever used it next would read that.
    """
    if is_clean:
        with contextlib.suppress(Exception):
            await connections.release(connection)
        return
    await _do_within_limit(_discard(connections, connection))


async def close(connection: Any) -> None:
    """Close a connection, which can be opened anew, whatever its client makes of that."""
    await _do_within_limit(_close(connection))


async def _do_within_limit(closing: Coroutine[Any, Any, None]) -> None:
    # In a task of its own, since it must not be cut short, nor hold up others for ever.
    task = asyncio.ensure_future(closing)
    _, hanging = await asyncio.wait({task}, timeout=_CLOSING)
    for task in hanging:
        task.cancel()


async def _discard(connections: Pool | Node, connection: Any) -> None:
    try:
        await _close(connection)
    finally:
        with contextlib.suppress(Exception):
            await connections.release(connection)


async def _close(connection: Any) -> None:
    writer = getattr(connection, "_writer", None)
    with contextlib.suppress(Exception):
        writer.transport.abort()  # type: ignore[union-attr] # what it holds must not be sent
    try:
        await connection.disconnect(nowait=True)
    except Exception:  # noqa: BLE001 - it may not have that option
        with contextlib.suppress(Exception):
            await connection.disconnect()


def _is_below(kind: Any) -> bool:
    """Tell whether one may go below the methods of a class of connections."""
    return _is_of_library(kind.send_packed_command) and _is_of_library(kind.read_response)


def _is_of_library(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith(_LIBRARIES)


def _copy_pool(pool: Any) -> Any:
    options = dict(pool.connection_kwargs)
    if hasattr(pool, "timeout"):
        options["timeout"] = pool.timeout
    return type(pool)(
        connection_class=pool.connection_class, max_connections=pool.max_connections, **options
    )
