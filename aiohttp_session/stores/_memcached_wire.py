"""The memcached text protocol, spoken so that many requests share a round trip."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, TypeAlias, cast
from weakref import ref

from aiomcache import ClientException

from aiohttp_session._core import read_values

from .batch import _duplicate

_CLOGGED = 64 * 1024  # bytes under way on a connection, beyond which others take another
_KEYS_LIMIT = 64  # keys in one command
_LINE_LIMIT = 2048  # bytes: a longer line is no reply of memcached's
_ERRORS = (b"SERVER_ERROR ", b"CLIENT_ERROR ", b"ERROR")
_OUTCOMES = {
    b"set": {b"STORED": True},
    b"add": {b"STORED": True, b"NOT_STORED": False},
    b"replace": {b"STORED": True, b"NOT_STORED": False},
    b"cas": {b"STORED": True, b"EXISTS": False, b"NOT_FOUND": False},
    b"delete": {b"DELETED": True, b"NOT_FOUND": False},
    b"version": {},
}

_Waiters: TypeAlias = dict[bytes, list["asyncio.Future[Any]"]]


class Link:
    """The connections of one event loop to one server.

    Commands are written as they come, those of one turn of the loop together, and the replies
    are read off in the same order. No task waits in between: a waiter that is cancelled gives up
    its future, and the stream goes on.

    :param options: for ``loop.create_connection``.
    :param timeout: seconds after which a command fails with TimeoutError, and with it what else
        its connection owes.
    :param max_connections: how many are open at the most. One carries all, unless it is clogged
        with large records.
    """

    def __init__(
        self,
        host: str,
        port: int,
        options: Mapping[str, Any],
        *,
        timeout: float,
        max_connections: int,
    ) -> None:
        self._host = host
        self._port = port
        self._options = options
        self._timeout = timeout
        self._max_connections = max_connections
        # Nothing here may keep the loop alive; and to ask for the running one is a system call in
        # Python 3.11.
        loop = ref(asyncio.get_running_loop())
        self._loop = cast("Callable[[], asyncio.AbstractEventLoop]", loop)
        self._connections: list[_Connection] = []
        self._gets: _Waiters = {}
        self._commands: list[_Retrieval | _Command] = []
        self._queued = 0  # waiters for both
        self._is_busy = False  # several commands came in one turn
        self._is_watched = False  # a timer is set for the next deadline
        self._shutdown_hook: AsyncGenerator[None, None] | None = None

    def get(self, key: bytes) -> asyncio.Future[bytes | None]:
        """Ask for a record."""
        loop = self._loop()
        future: asyncio.Future[bytes | None] = asyncio.Future(loop=loop)
        if key in self._gets:
            self._gets[key].append(future)
        else:
            self._gets[key] = [future]
        self._queued += 1
        if self._queued == 1:
            self._schedule(loop)
        return future

    def gets(self, key: bytes) -> asyncio.Future[tuple[bytes | None, int]]:
        """Ask for a record and a token, with which `store` replaces just this version of it."""
        loop = self._loop()
        future = loop.create_future()
        self._commands.append(_Retrieval(b"gets", {key: [future]}))
        self._queued += 1
        if self._queued == 1:
            self._schedule(loop)
        return future

    def store(
        self, verb: bytes, key: bytes, payload: bytes, expiry: int, token: int | None = None
    ) -> asyncio.Future[bool]:
        """Store a record with ``set``, ``replace`` or ``cas``; tell whether it was done."""
        line = b"%b %b 0 %d %d" % (verb, key, expiry, len(payload))
        if token is not None:
            line += b" %d" % token
        return self._command(verb, b"%b\r\n%b\r\n" % (line, payload), len(payload))

    def delete(self, key: bytes) -> asyncio.Future[bool]:
        """Delete a record; tell whether there was one."""
        return self._command(b"delete", b"delete %b\r\n" % key)

    async def finish(self) -> None:
        """Wait for the replies that are under way, and close the connections."""
        loop = self._loop()
        if self._queued:
            self._flush(loop)
        last = []
        for connection in self._connections:
            if connection.awaited:
                command = _Command(b"version", b"version\r\n", 0, loop)
                connection.send([command], loop.time())
                last.append(command.future)
        await asyncio.gather(*last, return_exceptions=True)
        self._close()
        await asyncio.sleep(0)  # the transports close in this turn of the loop

    def _command(self, verb: bytes, data: bytes, size: int = 0) -> asyncio.Future[bool]:
        loop = self._loop()
        command = _Command(verb, data, size, loop)
        self._commands.append(command)
        self._queued += 1
        if self._queued == 1:
            self._schedule(loop)
        return command.future

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have the first command in the queue sent, with all others of this turn."""
        if self._is_busy or (self._connections and self._connections[0].awaited):
            loop.call_soon(self._flush, loop)
        else:
            self._flush(loop)

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._queued:  # by now
            return
        now = loop.time()
        self._is_busy = self._queued > 1
        self._queued = 0
        gets, self._gets = self._gets, {}
        commands, self._commands = self._commands, []
        if gets:
            commands += _retrievals(gets)
        large = [command for command in commands if command.size >= _CLOGGED]
        if large:
            commands = [command for command in commands if command.size < _CLOGGED]
        if commands:
            self._pick(loop).send(commands, now)
        for command in large:
            self._pick(loop).send([command], now)
        if not self._is_watched:
            self._is_watched = True
            loop.call_at(now + self._timeout, self._expire, loop)

    def _pick(self, loop: asyncio.AbstractEventLoop) -> _Connection:
        for connection in self._connections:
            if connection.backlog < _CLOGGED and connection.is_usable:
                return connection
        usable = [connection for connection in self._connections if connection.is_usable]
        if len(usable) >= self._max_connections:
            return min(usable, key=lambda connection: connection.backlog)
        connection = _Connection(self._connections)
        connection.opening = loop.create_task(self._open(connection, loop))
        return connection

    async def _open(self, connection: _Connection, loop: asyncio.AbstractEventLoop) -> None:
        if self._shutdown_hook is None:
            self._shutdown_hook = self._close_at_shutdown()
            await anext(self._shutdown_hook)
        try:
            await loop.create_connection(
                lambda: connection, self._host, self._port, **self._options
            )
        except asyncio.CancelledError:
            connection.fail(ConnectionAbortedError("Cancelled while connecting to memcached"))
            raise
        except Exception as error:  # noqa: BLE001 - it goes to the waiters
            connection.fail(error)

    async def _close_at_shutdown(self) -> AsyncGenerator[None, None]:
        """Close with the event loop, for applications that don't call `finish`.

        A loop finishes its asynchronous generators before it closes (``shutdown_asyncgens``).
        """
        try:
            yield
        finally:
            self._shutdown_hook = None  # it holds the loop, which nothing here may keep alive
            self._close()

    def _close(self) -> None:
        for connection in list(self._connections):
            connection.fail(ConnectionAbortedError("The connection to memcached was closed"))

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        """Fail the connections that owe a reply for too long.

        One timer for all: one for each command would cost more than sending it.
        """
        now = loop.time()
        deadlines = []
        for connection in list(self._connections):
            if not connection.awaited:
                continue
            deadline = connection.awaited[0].since + self._timeout
            if deadline > now:
                deadlines.append(deadline)
            else:
                connection.fail(
                    TimeoutError(f"memcached did not answer within {self._timeout:g} seconds")
                )
        self._is_watched = bool(deadlines)
        if deadlines:
            loop.call_at(min(deadlines), self._expire, loop)


class _Retrieval:
    """A ``get`` or ``gets``, and those who wait for the records."""

    __slots__ = ("data", "since", "verb", "waiters")
    size = 0

    def __init__(self, verb: bytes, waiters: _Waiters) -> None:
        self.verb = verb
        self.waiters = waiters
        self.data = b"%b %b\r\n" % (verb, b" ".join(waiters))
        self.since = 0.0
        """The loop's time when it was sent."""

    def hand_out(self, data: bytes, position: int) -> int:
        """Hand out the records of ``get`` from a position on, and return the one after them."""
        values, position = read_values(data, position)
        for key, value in values:
            for future in self.waiters.pop(key):
                if not future.done():
                    future.set_result(value)
        return position

    def settle(self, result: object) -> None:
        """Give all who still wait the same result, or exception."""
        for futures in self.waiters.values():
            for future in futures:
                _settle(future, result)


class _Command:
    """Any other command, and the one who waits for its outcome."""

    __slots__ = ("data", "future", "since", "size", "verb")

    def __init__(
        self, verb: bytes, data: bytes, size: int, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.verb = verb
        self.data = data
        self.size = size
        """Bytes of its payload."""
        self.future: asyncio.Future[bool] = loop.create_future()
        self.since = 0.0

    def settle(self, result: object) -> None:
        _settle(self.future, result)


class _Connection(asyncio.Protocol):
    """A stream of commands, and the stream of their replies.

    :param siblings: the list that it is in until it fails.
    """

    opening: asyncio.Task[None]

    def __init__(self, siblings: list[_Connection]) -> None:
        self._siblings = siblings
        siblings.append(self)
        self.awaited: deque[_Retrieval | _Command] = deque()
        """What is not answered, in the order in which it was sent."""
        self._transport: asyncio.Transport | None = None
        self._unsent: list[bytes] = []  # until it is open
        self._payload = 0  # bytes of records that were sent and are not answered
        self._received: list[bytes] = []  # of an incomplete reply
        self._size = 0  # of that
        self._needed = 0  # size from which on it may be complete

    @property
    def is_usable(self) -> bool:
        return self._transport is None or not self._transport.is_closing()

    @property
    def backlog(self) -> int:
        """Bytes of records that are known to be under way, in either direction."""
        return self._payload + self._needed

    def send(self, commands: list[_Retrieval | _Command], now: float) -> None:
        """Write commands in one go, or have them written once the connection is open."""
        for command in commands:
            command.since = now
            self._payload += command.size
        self.awaited += commands
        data = b"".join([command.data for command in commands])
        if self._transport is None:
            self._unsent.append(data)
        else:
            self._transport.write(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        if self in self._siblings:
            self._transport.write(b"".join(self._unsent))  # type: ignore[union-attr]
        else:
            self._transport.abort()  # type: ignore[union-attr]

    def data_received(self, data: bytes) -> None:
        if self._received:
            self._received.append(data)
            self._size += len(data)
            if self._size < self._needed:
                return
            data = b"".join(self._received)
        try:
            position = self._read(data)
        except (ValueError, LookupError):
            self.fail(ClientException("memcached sent what is no reply to the commands it got"))
        except ClientException as error:
            self.fail(error)
        else:
            self._size = len(data) - position
            self._received = [data[position:]] if self._size else []

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(exc or ConnectionResetError("memcached closed the connection"))

    def fail(self, error: Exception) -> None:
        """Take no more commands, and give the error to those who wait."""
        if self in self._siblings:
            self._siblings.remove(self)
        if self._transport is None:
            self.opening.cancel()
        else:
            self._transport.abort()
        while self.awaited:
            self.awaited.popleft().settle(error)

    def _read(self, data: bytes) -> int:
        """Read the replies that are complete, and return the position after them.

        :raises ValueError, LookupError, ClientException: if the stream can't be trusted any more.
        """
        self._needed = position = 0
        while position < len(data):
            command = self.awaited[0]
            if isinstance(command, _Retrieval) and command.verb == b"get":
                position = command.hand_out(data, position)
            end = data.find(b"\r\n", position)
            if end < 0:
                break
            line = data[position:end]
            if isinstance(command, _Command):
                outcome = _outcome(command, line)
                command.settle(outcome)
            elif line == b"END":
                command.settle(None if command.verb == b"get" else (None, 0))
            else:
                stop = _read_value(command, line, data, end + 2)
                if stop > len(data):
                    self._needed = stop - position
                    return position
                position = stop
                continue
            self.awaited.popleft()
            self._payload -= command.size
            position = end + 2
        if len(data) - position > _LINE_LIMIT:
            raise ValueError
        return position


def _retrievals(waiters: _Waiters) -> list[_Retrieval]:
    if len(waiters) <= _KEYS_LIMIT:
        return [_Retrieval(b"get", waiters)]
    keys = list(waiters)
    return [
        _Retrieval(b"get", {key: waiters[key] for key in keys[start : start + _KEYS_LIMIT]})
        for start in range(0, len(keys), _KEYS_LIMIT)
    ]


def _read_value(command: _Retrieval, line: bytes, data: bytes, start: int) -> int:
    """Read the value that a line announces, if it is complete; return the position after it."""
    words = line.split(b" ")
    if words[0] != b"VALUE":
        raise ClientException("get failed", line) if line.startswith(_ERRORS) else ValueError
    size = int(words[3])
    stop = start + size + 2
    if size < 0:
        raise ValueError
    if stop > len(data):
        return stop
    value = data[start : stop - 2]
    if data[stop - 2 : stop] != b"\r\n":
        raise ValueError
    result: object = value if command.verb == b"get" else (value, int(words[4]))
    if words[2] != b"0":
        # As aiomcache: it was written by a program that put something else than text here.
        result = ClientException("received flags without handler")
    for future in command.waiters.pop(words[1]):
        _settle(future, result)
    return stop


def _outcome(command: _Command, line: bytes) -> bool | Exception:
    """Understand the line that answers a command.

    :raises ValueError, ClientException: if the stream can't be trusted any more.
    """
    outcome = _OUTCOMES[command.verb].get(line)
    if outcome is not None:
        return outcome
    if line == b"SERVER_ERROR object too large for cache":
        return ValueError(
            f"memcached refused a session of {command.size} bytes: its limit for a record is 1 MB, "
            "unless its option -I says otherwise"
        )
    failure = ClientException(f"{command.verb.decode()} failed", line)
    if line.startswith(b"SERVER_ERROR ") or line == b"NOT_STORED":
        return failure
    if line.startswith(_ERRORS):
        raise failure
    if command.verb == b"version" and line.startswith(b"VERSION "):
        return True
    raise ValueError


def _settle(future: asyncio.Future[Any], result: object) -> None:
    """Give a waiter its result or exception, unless it is gone."""
    if future.done():
        return
    if isinstance(result, Exception):
        # A copy, since each waiter that raises it adds a traceback of its own.
        future.set_exception(_duplicate(result))
        future.exception()  # or asyncio complains when nobody is left to see it
    else:
        future.set_result(result)
