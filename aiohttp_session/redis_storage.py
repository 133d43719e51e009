"""Sessions in Redis."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ._batch import Batch
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
_METHODS = ("get", "set", "delete", "eval", "execute_command")
_COPIED_POOLS = {"ConnectionPool", "BlockingConnectionPool"}
_LARGE = 32 * 1024  # bytes: a record that does not travel with others
_LARGE_KEPT = 1000
_LIBRARIES = ("redis.", "valkey.")
_WORKERS = 4  # connections in use at the same time, at the most


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
        if _library(redis_pool) != "valkey":
            if aioredis is None:
                raise RuntimeError("Please install redis: pip install aiohttp-session[aioredis]")
            if REDIS_VERSION is not None and REDIS_VERSION < (4, 3):
                raise RuntimeError("redis<4.3 is not supported")
        if not all(callable(getattr(redis_pool, name, None)) for name in _METHODS) or (
            not inspect.iscoroutinefunction(redis_pool.execute_command)
        ):
            raise TypeError(f"Expected redis.asyncio.Redis got {type(redis_pool)}")
        self._redis = redis_pool
        self._is_pool_taken = False
        self._large: dict[str, int] = {}  # sizes of large records, by key

    async def read(self, key: str) -> bytes | None:
        """Return the record under a key."""
        packed = b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key.encode())
        operation = _Operation(key, packed, lambda client: client.get(key))
        size = self._large.get(key, 0) if self._large else 0
        reply = await self._batches.get().submit(operation, size, droppable=True)
        record = reply.encode("utf-8") if isinstance(reply, str) else reply
        if size or (record is not None and len(record) > _LARGE):
            self._note_size(key, record)
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
        operation = _Operation(
            key,
            _pack(b"SET", key.encode(), payload, *expiry, *condition),
            lambda client: client.set(key, payload, ex=ttl, xx=bool(condition)),
        )
        return bool(await self._batches.get().submit(operation, len(payload)))

    async def swap(self, key: str, expected: bytes, payload: bytes, ttl: int | None) -> bool:
        """Replace a record if it still is the expected one; return whether it was, atomically."""
        arguments = (key.encode(), expected, payload, b"" if ttl is None else b"%d" % ttl)
        operation = _Operation(
            key,
            _pack(b"EVAL", _SWAP.encode(), b"1", *arguments),
            lambda client: client.eval(_SWAP, 1, *arguments),
        )
        size = len(expected) + len(payload)
        return bool(await self._batches.get().submit(operation, size))

    async def delete(self, key: str) -> None:
        """Delete a record, if there is one."""
        operation = _Operation(key, _pack(b"DEL", key.encode()), lambda client: client.delete(key))
        await self._batches.get().submit(operation)

    def _note_size(self, key: str, record: bytes | None) -> None:
        self._large.pop(key, None)
        if record is not None and len(record) > _LARGE:
            self._large[key] = len(record)
            if len(self._large) > _LARGE_KEPT:
                del self._large[next(iter(self._large))]

    def _make_batch(self) -> _Server | _Cluster:
        client: Any = self._redis
        if hasattr(client, "get_node_from_key"):
            return _Cluster(client, self._timeout)
        if not _is_plain(client):
            return _Server(client, None, self._timeout)
        pool = client.connection_pool
        is_own = self._is_pool_taken and type(pool).__name__ in _COPIED_POOLS
        if is_own:
            # Connections belong to one event loop, and the client's are those of another.
            pool = _copy_pool(pool)
            client = type(client)(connection_pool=pool)
        self._is_pool_taken = True
        return _Server(client, _Pool(pool, is_own=is_own), self._timeout)


class _Operation(NamedTuple):
    key: str
    packed: bytes
    ask: Callable[[Any], Awaitable[Any]]
    """Does the same by the client's own methods."""


def _pack(*arguments: bytes) -> bytes:
    """Write a command as RESP, which takes redis-py 5 µs."""
    parts = [b"*%d\r\n" % len(arguments)]
    parts += [b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments]
    return b"".join(parts)


class _Server:
    """Runs operations on one server, in one event loop.

    What goes wrong in a batch, be it one reply or the connection, is asked for again with the
    client's own methods. So its rules for retries, redirections and failover hold, and whatever
    error remains is the client's own. All operations may be repeated.
    """

    def __init__(self, client: Any, connections: _Pool | _Node | None, timeout: float) -> None:
        self._client = client
        self._timeout = timeout
        self.connections = connections
        if connections is None:
            # One operation at a time for each worker, as requests would use the client.
            workers = 1 if getattr(client, "single_connection_client", False) else 64
            batch = Batch(self._ask, timeout=timeout, max_operations=1, max_workers=workers)
        else:
            workers = min(_WORKERS, connections.limit)
            batch = Batch(self._run, timeout=timeout, max_workers=workers)
        self._batch: Batch[_Operation, Any] = batch
        self.submit = batch.submit

    async def finish(self) -> None:
        await self._batch.finish()
        if self.connections is not None:
            await self.connections.close()

    async def _run(self, operations: list[_Operation]) -> list[Any]:
        connections: Any = self.connections
        connection = await connections.acquire()
        try:
            replies = await self._exchange(connection, operations)
        except BaseException as error:
            # Replies may be on their way: whoever used the connection next would read them.
            await connection.disconnect(nowait=True)
            if not isinstance(error, Exception):
                raise
            replies = [error] * len(operations)
        finally:
            await connections.release(connection)
        failed = [i for i, reply in enumerate(replies) if isinstance(reply, Exception)]
        if failed:
            answers = await self._ask([operations[i] for i in failed])
            for i, answer in zip(failed, answers, strict=True):
                replies[i] = answer
        return replies

    async def _exchange(self, connection: Any, operations: list[_Operation]) -> list[Any]:
        if not connection.is_connected:  # of a node; a pool connects it
            await connection.connect()
        packed = b"".join([operation.packed for operation in operations])
        limit = connection.socket_timeout
        if connection.health_check_interval or (limit is not None and limit < self._timeout):
            await connection.send_packed_command(packed)
            return [await self._read(connection) for _ in operations]
        # Below the client's interface: what stands above it takes 20 µs for a lone command and
        # 6 µs for each further reply, for a timeout that a batch has as a whole.
        writer, read = connection._writer, connection._parser.read_response
        writer.write(packed)
        await writer.drain()
        return [await read(disable_decoding=True) for _ in operations]

    async def _read(self, connection: Any) -> Any:
        try:
            return await connection.read_response(disable_decoding=True)
        except Exception as error:
            if not _is_reply(error):
                raise
            return error

    async def _ask(self, operations: list[_Operation]) -> list[Any]:
        answers: list[Any] = []
        for operation in operations:
            try:
                answers.append(await self._ask_one(operation))
            except Exception as error:  # noqa: BLE001 - it goes to the waiter
                if not _is_reply(error):
                    # The server can't be reached: the others need not try for themselves.
                    return answers + [error] * (len(operations) - len(answers))
                answers.append(error)
        return answers

    async def _ask_one(self, operation: _Operation) -> Any:
        for _ in range(3):
            try:
                return await operation.ask(self._client)
            except AttributeError:
                # redis-py's cluster client has closed connections that others use, since a slot
                # moved; what they hold is None now.
                pass
        return await operation.ask(self._client)


class _Pool:
    """The connections of a client."""

    def __init__(self, pool: Any, *, is_own: bool) -> None:
        self._pool = pool
        self._is_own = is_own
        self.limit: int = getattr(pool, "max_connections", _WORKERS)
        self.acquire = pool.get_connection
        name = inspect.signature(pool.get_connection).parameters.get("command_name")
        if name is not None and name.default is name.empty:
            self.acquire = partial(pool.get_connection, "GET")  # redis-py before 5.3
        self.release = pool.release

    async def close(self) -> None:
        if self._is_own:
            await self._pool.disconnect()


class _Node:
    """The connections of a cluster's node."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.limit: int = node.max_connections

    async def acquire(self) -> Any:
        return self.node.acquire_connection()

    async def release(self, connection: Any) -> None:
        self.node.release(connection)

    async def close(self) -> None:
        pass


class _Cluster:
    """Runs operations on the servers that own their keys, in one event loop."""

    def __init__(self, client: Any, timeout: float) -> None:
        self._client = client
        self._timeout = timeout
        self._servers: dict[Any, _Server] = {}
        self._unrouted: Batch[_Operation, Any] = Batch(self._route, timeout=timeout)

    def submit(
        self, operation: _Operation, size: int = 0, *, droppable: bool = False
    ) -> asyncio.Future[Any]:
        node = self._find_node(operation)
        if node is None:
            return self._unrouted.submit(operation, size, droppable=droppable)
        server = self._servers.get(node)
        if server is None:
            connections = _Node(node) if hasattr(node, "release") else None
            server = self._servers[node] = _Server(self._client, connections, self._timeout)
        elif isinstance(server.connections, _Node):
            server.connections.node = node
        return server.submit(operation, size, droppable=droppable)

    def _find_node(self, operation: _Operation) -> Any:
        try:
            return self._client.get_node_from_key(operation.key)
        except Exception:  # noqa: BLE001 - it doesn't know its nodes yet, or none has the slot
            return None

    async def _route(self, operations: list[_Operation]) -> list[Any]:
        await self._client.initialize()
        return await asyncio.gather(
            *(
                self.submit(operation)
                if self._find_node(operation)
                else operation.ask(self._client)
                for operation in operations
            ),
            return_exceptions=True,
        )

    async def finish(self) -> None:
        await self._unrouted.finish()
        for server in list(self._servers.values()):
            await server.finish()


def _library(client: Any) -> str:
    return type(client).__module__.partition(".")[0]


def _is_plain(client: Any) -> bool:
    """Tell whether a client has its library's own methods and a pool of connections."""
    return (
        not getattr(client, "single_connection_client", False)
        and all(getattr(client, name).__module__.startswith(_LIBRARIES) for name in _METHODS)
        and inspect.iscoroutinefunction(getattr(client.connection_pool, "release", None))
    )


def _copy_pool(pool: Any) -> Any:
    options = dict(pool.connection_kwargs)
    if hasattr(pool, "timeout"):
        options["timeout"] = pool.timeout
    return type(pool)(
        connection_class=pool.connection_class, max_connections=pool.max_connections, **options
    )


def _is_reply(error: Exception) -> bool:
    """Tell whether an error is the server's answer to one command."""
    return any(kind.__name__ == "ResponseError" for kind in type(error).__mro__)
