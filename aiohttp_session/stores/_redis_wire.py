"""Operations on Redis servers by way of a client's connections."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

from aiohttp_session._core import read_replies

from .batch import Batch, Entry

_LARGE = 32 * 1024  # bytes: what does not travel with others
_LARGE_KEPT = 1000  # keys
_WORKERS = 4  # connections of a server in use at the same time, beside its line
_LINE_AGE = 60  # seconds
_METHODS = ("get", "set", "delete", "eval", "execute_command")
_LIBRARIES = ("redis.", "valkey.")
_COPIED_POOLS = {"ConnectionPool", "BlockingConnectionPool"}
_CHUNK = 64 * 1024  # bytes
# What a server replies that is not, or no longer, the right one.
_MISPLACED = (b"-READONLY ", b"-MOVED ", b"-MASTERDOWN ", b"-CLUSTERDOWN ")


# An operation: its key, what it sends, and what does the same by the client's own methods. A plain
# tuple, as a NamedTuple takes 0.3 µs to make.
Operation: TypeAlias = tuple[str, bytes, Callable[[Any, str], Awaitable[Any]]]


def pack(*arguments: bytes) -> bytes:
    """Write a command as RESP, which takes redis-py 5 µs."""
    parts = [b"*%d\r\n" % len(arguments)]
    parts += [b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments]
    return b"".join(parts)


def library(client: Any) -> str:
    """Return the name of the package that a client is of."""
    return type(client).__module__.partition(".")[0]


def is_client(thing: Any) -> bool:
    """Tell whether something speaks redis-py's asyncio interface."""
    return all(
        callable(getattr(thing, name, None)) for name in _METHODS
    ) and inspect.iscoroutinefunction(thing.execute_command)


def connect(client: Any, timeout: float, *, is_first: bool) -> Server | Cluster:
    """Make what does the operations in this event loop.

    :param is_first: the client's own connections are free for this loop; otherwise it gets others.
    """
    if hasattr(client, "get_node_from_key"):
        return Cluster(client, timeout)
    if not _is_plain(client):
        return Server(client, None, timeout)
    pool = client.connection_pool
    is_copied = not is_first and type(pool).__name__ in _COPIED_POOLS
    if is_copied:
        pool = _copy_pool(pool)
        client = type(client)(connection_pool=pool)
    return Server(client, _Pool(pool, is_copied=is_copied), timeout)


class Server:
    """Does operations on one server, in one event loop.

    The first ones go as a batch by a connection of the client. It is kept as a line, on which the
    next ones are written as they come; large ones go apart from it.

    Whatever goes wrong, be it one reply or the connection, is asked for again, in the end by the
    client's own methods. So its rules for retries, redirections and failover hold, and the error
    that remains is the client's own. All operations may be repeated.
    """

    def __init__(self, client: Any, connections: _Pool | _Node | None, timeout: float) -> None:
        self._client = client
        self._timeout = timeout
        self._line: _Line | None = None
        self._large: dict[str, int] = {}  # sizes of large records, by key
        self.connections = connections
        if connections is None:
            # One operation at a time for each worker, as requests would use the client.
            workers = 1 if getattr(client, "single_connection_client", False) else 64
            batch = Batch(self._ask, timeout=timeout, max_operations=1, max_workers=workers)
        else:
            workers = min(_WORKERS, connections.limit)
            batch = Batch(self._run, timeout=timeout, max_workers=workers)
        self._batch: Batch[Operation, Any] = batch

    def submit(
        self, operation: Operation, size: int = 0, *, droppable: bool = False
    ) -> asyncio.Future[Any]:
        """Do an operation, as `Batch.submit` describes."""
        if size > _LARGE or self._large:
            size = self.note_size(operation[0], size)
        if self._line is not None and size <= _LARGE:
            return self._line.submit(operation)
        return self._batch.submit(operation, size, droppable=droppable)

    def note_size(self, key: str, size: int) -> int:
        """Take down the size of a record if it is large.

        :param size: bytes; 0 for the size that is known.
        :return: the size, or 0 if it isn't known.
        """
        size = size or self._large.get(key, 0)
        self._large.pop(key, None)
        if size > _LARGE:
            self._large[key] = size
            if len(self._large) > _LARGE_KEPT:
                del self._large[next(iter(self._large))]
        return size

    async def finish(self) -> None:
        """Wait until nothing is under way, and give all connections back."""
        await self._batch.finish()
        while self._line is not None:
            await self._line.close()
            await self._batch.finish()
        if self.connections is not None:
            await self.connections.close()

    async def _run(self, operations: list[Operation]) -> list[Any]:
        connections: Any = self.connections
        connection = await connections.acquire()
        is_line = False
        try:
            replies = await self._exchange(connection, operations)
            if self._line is None and connections.limit > _WORKERS and self._is_quick(connection):
                self._line = _Line(self, connection)
                is_line = True
        except BaseException as error:
            # Replies may be on their way: whoever used the connection next would read them.
            await connection.disconnect(nowait=True)
            if not isinstance(error, Exception):
                raise
            replies = [error] * len(operations)
        finally:
            if not is_line:
                await connections.release(connection)
        failed = [i for i, reply in enumerate(replies) if isinstance(reply, Exception)]
        if failed:
            answers = await self._ask([operations[i] for i in failed])
            for i, answer in zip(failed, answers, strict=True):
                replies[i] = answer
        for (key, *_), reply in zip(operations, replies, strict=True):
            if reply is None:
                self._large.pop(key, None)
            elif isinstance(reply, bytes) and reply != b"OK":  # a record
                self.note_size(key, len(reply))
        return replies

    async def _exchange(self, connection: Any, operations: list[Operation]) -> list[Any]:
        if not connection.is_connected:  # of a node; a pool connects it
            await connection.connect()
        packed = b"".join([packed for _, packed, _ in operations])
        if not self._is_quick(connection):
            await connection.send_packed_command(packed)
            return [await self._read(connection) for _ in operations]
        # Below the client's interface: what stands above it takes 20 µs for a lone command and
        # 6 µs for each further reply, for a timeout that a batch has as a whole.
        writer, read = connection._writer, connection._parser.read_response
        writer.write(packed)
        await writer.drain()
        return [await read(disable_decoding=True) for _ in operations]

    def _is_quick(self, connection: Any) -> bool:
        limit = connection.socket_timeout
        return not connection.health_check_interval and (limit is None or limit >= self._timeout)

    async def _read(self, connection: Any) -> Any:
        try:
            return await connection.read_response(disable_decoding=True)
        except Exception as error:
            if not _is_reply(error):
                raise
            return error

    async def _ask(self, operations: list[Operation]) -> list[Any]:
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

    async def _ask_one(self, operation: Operation) -> Any:
        for _ in range(3):
            try:
                return await _call(self._client, operation)
            except (AttributeError, TypeError):
                # redis-py's cluster client has closed connections that others use, since a slot
                # moved; what they hold, or call, is None now.
                pass
        return await _call(self._client, operation)


class _Line:
    """A connection on which operations are written as they come; replies come in their order.

    After a second without an operation, and once a minute, the client gets it back. Without a
    reply for some time it takes no more operations, and what it has is done by other connections.
    """

    def __init__(self, server: Server, connection: Any) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._server = server
        self._connection = connection
        self._connections: Any = server.connections
        self._writer = connection._writer
        self._unsent: list[bytes] = []
        self._pending: deque[Entry[Operation, Any]] = deque()
        self._rest = b""  # of an incomplete reply
        self._is_closing = False
        self._used = self._opened = loop.time()
        self._task = loop.create_task(self._read())
        loop.call_later(self._interval, self._watch)

    def submit(self, operation: Operation) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.Future(loop=self._loop)
        if not self._unsent:
            self._used = self._loop.time()
            self._loop.call_soon(self._send)  # with all others of this turn
        self._unsent.append(operation[1])
        self._pending.append((operation, future, 0, False, self._used))
        return future

    async def close(self) -> None:
        """Wait for the replies that are due, and give the connection back."""
        self._leave()
        await asyncio.wait({self._task})

    @property
    def _interval(self) -> float:
        return min(1.0, self._server._timeout / 10)

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, []
        if not self._task.done():
            self._writer.write(b"".join(unsent))

    async def _read(self) -> None:
        pending = self._pending
        is_clean = False
        try:
            await self._read_replies()
            is_clean = not self._rest
        except asyncio.CancelledError:
            is_clean = not (pending or self._rest)
            if not self._is_closing:  # from outside: the event loop is shutting down
                while pending:
                    pending.popleft()[1].cancel()
        except Exception:  # noqa: BLE001 - the connection is lost, or it isn't Redis that speaks
            is_clean = False
        finally:
            self._leave()
            if not is_clean:
                await self._connection.disconnect(nowait=True)
            await self._connections.release(self._connection)
            while pending:
                self._repeat(pending.popleft())

    async def _read_replies(self) -> None:
        # Below the client's interface, as in Server._exchange: its parser takes 0.6 µs a reply.
        stream = self._connection._reader
        missing = 0
        while self._pending or not self._is_closing:
            data = await (stream.readexactly(missing) if missing else stream.read(_CHUNK))
            if not data:
                raise ConnectionResetError
            data = self._rest + data
            self._rest = data[self._hand_out(data) :]
            missing = _missing(self._rest) if self._rest else 0

    def _hand_out(self, data: bytes) -> int:
        """Hand out the replies that are complete, and return the position after them."""
        pending = self._pending
        is_large = len(data) > _LARGE
        position = 0
        while True:
            replies, position = read_replies(data, position)
            for reply in replies:
                operation, future, _, _, _ = pending.popleft()
                if not future.done():
                    future.set_result(reply)
                if is_large and isinstance(reply, bytes) and len(reply) > _LARGE:
                    self._server.note_size(operation[0], len(reply))
            end = data.find(b"\r\n", position) if data.startswith(b"-", position) else -1
            if end < 0:
                return position
            self._repeat(pending.popleft())
            if data.startswith(_MISPLACED, position):
                self._leave()
            position = end + 2

    def _repeat(self, entry: Entry[Operation, Any]) -> None:
        self._server._batch.put(entry, self._loop)

    def _leave(self) -> None:
        """Take no more operations, and end when the last reply has come."""
        self._is_closing = True
        if self._server._line is self:
            self._server._line = None
        if not self._pending and asyncio.current_task() is not self._task:
            self._task.cancel()

    def _watch(self) -> None:
        if self._task.done():
            return
        now = self._loop.time()
        waiting = now - self._pending[0][4] if self._pending else 0
        if waiting > self._server._timeout / 2:
            self._leave()
            self._task.cancel()
            return
        is_idle = not self._pending and now - self._used > self._interval
        if is_idle or waiting > self._interval or now - self._opened > _LINE_AGE:
            self._leave()
        self._loop.call_later(self._interval, self._watch)


class _Pool:
    """The connections of a client."""

    def __init__(self, pool: Any, *, is_copied: bool) -> None:
        self._pool = pool
        self._is_copied = is_copied
        self.limit: int = getattr(pool, "max_connections", _WORKERS)
        self.acquire = pool.get_connection
        name = inspect.signature(pool.get_connection).parameters.get("command_name")
        if name is not None and name.default is name.empty:
            self.acquire = partial(pool.get_connection, "GET")  # redis-py before 5.3
        self.release = pool.release

    async def close(self) -> None:
        if self._is_copied:
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


class Cluster:
    """Runs operations on the servers that own their keys, in one event loop."""

    def __init__(self, client: Any, timeout: float) -> None:
        self._client = client
        self._timeout = timeout
        self._servers: dict[str, Server] = {}
        self._unrouted: Batch[Operation, Any] = Batch(self._route, timeout=timeout)

    def submit(
        self, operation: Operation, size: int = 0, *, droppable: bool = False
    ) -> asyncio.Future[Any]:
        node = self._find_node(operation)
        if node is None:
            return self._unrouted.submit(operation, size, droppable=droppable)
        server = self._servers.get(node.name)
        if server is None:
            connections = _Node(node) if hasattr(node, "release") else None
            server = self._servers[node.name] = Server(self._client, connections, self._timeout)
        elif isinstance(server.connections, _Node):
            server.connections.node = node
        return server.submit(operation, size, droppable=droppable)

    def _find_node(self, operation: Operation) -> Any:
        try:
            return self._client.get_node_from_key(operation[0])
        except Exception:  # noqa: BLE001 - it doesn't know its nodes yet, or none has the slot
            return None

    async def _route(self, operations: list[Operation]) -> list[Any]:
        await self._client.initialize()
        return await asyncio.gather(
            *(
                self.submit(operation)
                if self._find_node(operation)
                else _call(self._client, operation)
                for operation in operations
            ),
            return_exceptions=True,
        )

    async def finish(self) -> None:
        await self._unrouted.finish()
        for server in list(self._servers.values()):
            await server.finish()


async def _call(client: Any, operation: Operation) -> Any:
    """Do an operation by a client's own methods."""
    key, _, call = operation
    reply = await call(client, key)
    # The client may have been told to decode replies.
    return reply.encode("utf-8") if isinstance(reply, str) else reply


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


def _missing(reply: bytes) -> int:
    """Return how many bytes a reply lacks that has begun; 0 if it doesn't tell yet.

    :raises ValueError: if it is no reply to an operation.
    """
    line, end, rest = reply.partition(b"\r\n")
    kind, size = line[:1], line[1:]
    if not end and kind in b"$:+-_" and len(line) < _CHUNK:
        return 0
    if end and kind == b"$" and size.isdigit() and len(size) < 10:
        missing = int(size) + len(b"\r\n") - len(rest)
        if missing > 0:
            return missing
    raise ValueError


def _is_reply(error: Exception) -> bool:
    """Tell whether an error is the server's answer to one command."""
    return any(kind.__name__ == "ResponseError" for kind in type(error).__mro__)
