"""The connections of one event loop to one memcached server, which many commands share."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, TypeVar, cast
from weakref import ref

from aiohttp_session._core import FutureGroup

from ._memcached_connection import AnyCommand, Connection
from ._memcached_protocol import Command, ConnectionLostError, Retrieval, Versions, Waiters

_AnyCommand = TypeVar("_AnyCommand", Retrieval, Command)

REPEATS = 3  # of one command, since the next connection may be lost as well
_CLOGGED = 64 * 1024  # bytes under way on a connection, beyond which others take another
_KEYS_LIMIT = 64  # keys in one command
_VERSIONS_LIMIT = 1024


class Client:
    """A client of memcached whose commands share connections and round trips.

    Commands are written as they come, those of one iteration of the loop together, and the
    replies are read off in the same order. No task waits in between: a waiter that is cancelled
    gives up its future, and the stream goes on.

    A read whose connection is lost is repeated. Any other command fails with
    `ConnectionLostError`, and whoever sent it decides.

    :param options: for ``loop.create_connection``.
    :param timeout: seconds after which a command fails with TimeoutError; a hundredth more when
        many do.
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
        self._futures = FutureGroup(asyncio.get_running_loop())
        self._connections: list[Connection] = []
        self._gets: Waiters = {}
        self._commands: list[AnyCommand] = []
        self._queued = 0  # waiters for both
        self._is_busy = False  # several commands came in one iteration
        self._timer_at = math.inf  # the loop's time
        self.losses = 0
        """How many connections were lost."""
        self._versions: Versions = {}
        self._older_versions: Versions = {}
        self._shutdown_hook: AsyncGenerator[None, None] | None = None

    def deadline(self) -> float:
        """Return the loop's time at which an operation fails that begins now."""
        return self._loop().time() + self._timeout

    def get(self, key: bytes) -> asyncio.Future[bytes | None]:
        """Ask for a record, and keep its token for a while."""
        loop = self._loop()
        future: asyncio.Future[bytes | None] = self._futures.create_future()
        if key in self._gets:
            self._gets[key].append(future)
        else:
            self._gets[key] = [future]
        self._queued += 1
        if self._queued == 1:
            self._schedule(loop)
        return future

    def take_token(self, key: bytes, record: bytes) -> bytes | None:
        """Return, and forget, the token of the version of a record that was last read.

        :param record: the contents of that version; None is returned for any other.
        """
        read = self._versions.pop(key, None) or self._older_versions.pop(key, None)
        return read[1] if read is not None and read[0] == record else None

    def gets(self, key: bytes, deadline: float) -> asyncio.Future[tuple[bytes | None, bytes]]:
        """Ask for a record, and the token with which `cas` replaces just this version of it."""
        future: asyncio.Future[tuple[bytes | None, bytes]] = self._futures.create_future()
        self._submit(Retrieval({key: [future]}, None, deadline))
        return future

    def set(
        self, key: bytes, payload: bytes, expires: int, deadline: float
    ) -> asyncio.Future[bytes]:
        """Store a record; return the reply."""
        size = len(payload)
        data = b"set %b 0 %d %d\r\n%b\r\n" % (key, expires, size, payload)
        return self._submit(Command(b"set", data, size, deadline, self._futures)).future

    def replace(
        self, key: bytes, payload: bytes, expires: int, deadline: float
    ) -> asyncio.Future[bytes]:
        """Replace a record, if there is one; return the reply."""
        size = len(payload)
        data = b"replace %b 0 %d %d\r\n%b\r\n" % (key, expires, size, payload)
        return self._submit(Command(b"replace", data, size, deadline, self._futures)).future

    def add(
        self, key: bytes, payload: bytes, expires: int, deadline: float
    ) -> asyncio.Future[bytes]:
        """Store a record if there is none; return the reply."""
        size = len(payload)
        data = b"add %b 0 %d %d\r\n%b\r\n" % (key, expires, size, payload)
        return self._submit(Command(b"add", data, size, deadline, self._futures)).future

    def cas(
        self, key: bytes, payload: bytes, expires: int, deadline: float, token: bytes
    ) -> asyncio.Future[bytes]:
        """Replace the version of a record that a token tells; return the reply."""
        size = len(payload)
        data = b"cas %b 0 %d %d %b\r\n%b\r\n" % (key, expires, size, token, payload)
        return self._submit(Command(b"cas", data, size, deadline, self._futures)).future

    def delete(self, key: bytes, deadline: float) -> asyncio.Future[bytes]:
        """Delete a record; return the reply."""
        data = b"delete %b\r\n" % key
        return self._submit(Command(b"delete", data, 0, deadline, self._futures)).future

    async def finish(self) -> None:
        """Wait until nothing is under way, for as long as a command may take; then close."""
        loop = self._loop()
        deadline = self.deadline()
        while loop.time() < deadline:
            if self._queued:
                self._flush(loop)
            last = []
            for connection in self._connections:
                if connection.awaited:
                    command = Command(b"version", b"version\r\n", 0, deadline, self._futures)
                    connection.send([command], loop.time())
                    last.append(command.future)
            if not last:
                break
            await asyncio.gather(*last, return_exceptions=True)
        self._close()
        await asyncio.sleep(0)  # the transports close in this iteration of the loop

    def _submit(self, command: _AnyCommand) -> _AnyCommand:
        self._commands.append(command)
        self._queued += 1
        if self._queued == 1:
            self._schedule(self._loop())
        if command.deadline < self._timer_at:
            self._set_timer(command.deadline, self._loop())
        return command

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have the first command in the queue sent, with all others of this iteration."""
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
            commands += self._retrievals(gets, now + self._timeout)
        large = [command for command in commands if command.size >= _CLOGGED]
        if large:
            commands = [command for command in commands if command.size < _CLOGGED]
        if commands:
            self._pick(now, loop).send(commands, now)
        for command in large:
            self._pick(now, loop).send([command], now)
        if now + self._timeout / 2 < self._timer_at:
            self._set_timer(now + self._timeout / 2, loop)

    def _retrievals(self, waiters: Waiters, deadline: float) -> list[Retrieval]:
        if len(self._versions) > _VERSIONS_LIMIT:
            # All go at once when they are old; to look for the oldest would take more time.
            self._versions, self._older_versions = {}, self._versions
        if len(waiters) <= _KEYS_LIMIT:
            return [Retrieval(waiters, self._versions, deadline)]
        keys = list(waiters)
        chunks = (keys[start : start + _KEYS_LIMIT] for start in range(0, len(keys), _KEYS_LIMIT))
        return [
            Retrieval({key: waiters[key] for key in chunk}, self._versions, deadline)
            for chunk in chunks
        ]

    def _pick(self, now: float, loop: asyncio.AbstractEventLoop) -> Connection:
        if len(self._connections) > 1:
            for connection in self._connections:
                if not connection.is_prompt(now):
                    connection.close_idle()
                    break
        for connection in self._connections:
            if connection.backlog < _CLOGGED and connection.is_prompt(now):
                return connection
        usable = [connection for connection in self._connections if connection.is_usable]
        if len(usable) >= self._max_connections:
            return min(usable, key=lambda each: (not each.is_prompt(now), each.backlog))
        connection = Connection(
            self._connections, self._timeout, self._futures, self._fail_command, self._forget
        )
        connection.opening = loop.create_task(self._open(connection, loop))
        return connection

    async def _open(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
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

    def _fail_command(self, command: AnyCommand, error: Exception) -> None:
        if (
            isinstance(error, ConnectionLostError)
            and isinstance(command, Retrieval)
            and command.repeats < REPEATS
            and command.forget_cancelled()
        ):
            command.repeats += 1
            self._commands.append(command)
            self._queued += 1
            loop = self._loop()
            loop.call_soon(self._flush, loop)
        else:
            command.settle(error)

    def _forget(self) -> None:
        """Forget the versions that were read: the server may have been restarted."""
        # New ones: the replies that are still to come fill those that the commands in flight hold.
        self._versions, self._older_versions = {}, {}
        self.losses += 1

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

    def _set_timer(self, when: float, loop: asyncio.AbstractEventLoop) -> None:
        """Have `_expire` called at a time of the loop's, and not at the time set before.

        One timer serves all: one for each command would cost more than sending it. Its handle is
        not kept, since that would keep the loop alive.
        """
        self._timer_at = when
        loop.call_at(when, self._expire, when, loop)

    def _expire(self, when: float, loop: asyncio.AbstractEventLoop, turns: int = 2) -> None:
        """Fail the commands that are due, and the connections that stall.

        :param turns: iterations of the loop to wait before that, so that the replies are read
            that came while the process stood still; a loop may look at its timers first.
        """
        if when != self._timer_at:
            return
        now = loop.time()
        if turns and any(connection.due <= now for connection in self._connections):
            loop.call_soon(self._expire, when, loop, turns - 1)
            return
        for connection in list(self._connections):
            connection.expire(now)
        # What is on its way to another connection is in the queue.
        due = [connection.due for connection in self._connections]
        due += [command.deadline for command in self._commands]
        first = min(due, default=math.inf)
        self._timer_at = math.inf
        if first < math.inf:
            # Not for each of thousands that wait: to look at them all takes milliseconds.
            self._set_timer(max(first, now + self._timeout / 100), loop)
