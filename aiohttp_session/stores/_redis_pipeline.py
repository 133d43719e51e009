"""A connection that many requests share: operations are written as they come (pipelining)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeAlias

from aiohttp_session._core import FutureGroup, read_replies

from ._redis_resp import ErrorReply, is_final, is_misplaced, missing, read_odd
from .batch import Entry

LARGE = 32 * 1024  # bytes: what does not travel with others
_MAX_AGE = 60  # seconds
_CHUNK = 64 * 1024  # bytes


class LostError(Exception):
    """The reply to an operation won't come: its connection broke, or stalled.

    :param client: which connection it was, as `Fence` names it; None if nobody knows.
    """

    def __init__(self, client: Any) -> None:
        super().__init__(client)
        self.client = client


class UnsentError(Exception):
    """A connection was closed before operations were written to it."""


# An operation: its key; what it sends; what does the same by the client's own methods; and its
# fate: whether it may be done a second time, or how it was lost. A plain tuple, as a NamedTuple
# takes 0.3 µs to make.
READ, WRITE = "read", "write"
Operation: TypeAlias = tuple[str, bytes, Callable[[Any, str], Awaitable[Any]], "str | LostError"]


class Owner(Protocol):
    """What a pipelined connection belongs to."""

    stall: float
    """Seconds without a reply after which a connection is given up."""

    def distrust(self, since: float) -> None:
        """Take no connection for alive that was not heard of since some loop time."""

    def note_size(self, key: str, size: int = 0) -> int:
        """Take down the size of a large record."""

    def repeat(self, entry: Entry[Operation, Any]) -> None:
        """Take back an operation that was not done, or may be done again."""

    def leave(self, connection: PipelinedConnection) -> None:
        """Give a connection no more operations."""

    async def close(self, connection: Any, client: Any, *, is_clean: bool, owes: bool) -> None:
        """Take a connection of the client's back.

        :param owes: writes may be under way on it.
        """


class PipelinedConnection:
    """A connection on which operations are written as they come; replies come in their order.

    After a second without an operation, and once a minute, the client gets it back. Without a
    reply for some time it takes no more operations. What it owes when it ends, its owner gets.

    :param connection: the client's, open, with no reply under way.
    :param client: which connection this is, as `Fence` names it.
    """

    def __init__(self, owner: Owner, connection: Any, client: Any) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._futures = FutureGroup(loop)
        self._owner = owner
        self._connection = connection
        self._client = client
        self._writer = connection._writer
        self._unsent: list[bytes] = []
        self._pending: deque[Entry[Operation, Any]] = deque()
        self._rest = b""  # of an incomplete reply
        self.is_closing = False
        # Until many share it, it has to leave time for another one.
        self.stall = owner.stall / 2
        self._used = self._opened = loop.time()
        self._task = loop.create_task(self._read())
        self._watch_in(self._interval)

    async def start(self) -> None:
        """Make ready to be the one that all share, or leave."""

    def submit(self, operation: Operation, *, is_batched: bool = False) -> asyncio.Future[Any]:
        """Write an operation with all others of this turn; return the future of its reply.

        :param is_batched: the future is for the owner, which gets errors, `LostError` and
            `UnsentError` as results; otherwise for a waiter, and the owner is asked to repeat what
            failed.
        """
        future = self._futures.create_future()
        if not self._unsent:
            self._used = self._loop.time()
            self._loop.call_soon(self._send)
        self._unsent.append(operation[1])
        self._pending.append((operation, future, 0, is_batched, self._used))
        return future

    def is_writing(self, key: str) -> bool:
        """Tell whether a write to a key is under way."""
        return any(entry[0][0] == key and entry[0][3] is not READ for entry in self._pending)

    def leave(self) -> None:
        """Take no more operations, and end when the last reply has come."""
        self.is_closing = True
        self._owner.leave(self)
        if not self._pending and asyncio.current_task() is not self._task:
            self._task.cancel()

    async def close(self) -> None:
        """Wait for the replies that are due, and give the connection back."""
        self.leave()
        await asyncio.wait({self._task})

    def give_up(self) -> None:
        """End now, whatever is under way."""
        self.leave()
        self._task.cancel()

    async def abort(self) -> None:
        """End now, whatever is under way, and give the connection back."""
        self.give_up()
        await asyncio.wait({self._task})

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, []
        if unsent:  # or the connection has ended since
            self._writer.write(b"".join(unsent))

    async def _read(self) -> None:
        is_clean = False
        try:
            await self._read_replies()
            is_clean = not self._rest
        except asyncio.CancelledError:
            is_clean = not (self._pending or self._rest)
            if not self.is_closing:  # from outside: the event loop is shutting down
                for _, future, *_ in self._pending:
                    future.cancel()
        except Exception:  # noqa: BLE001 - the connection is lost, or it isn't Redis that speaks
            is_clean = False
        finally:
            await self._end(is_clean=is_clean)

    async def _end(self, *, is_clean: bool) -> None:
        self.leave()
        pending, self._pending = self._pending, deque()
        unsent, self._unsent = len(self._unsent), []
        sent = [pending.popleft() for _ in range(len(pending) - unsent)]
        owes = any(entry[0][3] is WRITE for entry in sent)
        if sent:
            self._owner.distrust(sent[0][4])
        await self._owner.close(self._connection, self._client, is_clean=is_clean, owes=owes)
        for (key, _, call, fate), future, size, is_batched, since in sent:
            lost = LostError(self._client)
            if future.done():
                pass  # nobody waits for it: it is not sent again
            elif is_batched:
                future.set_result(lost)
            elif fate is WRITE:
                self._owner.repeat(((key, b"", call, lost), future, size, False, since))
            else:
                self._owner.repeat(((key, _, call, fate), future, size, False, since))
        for entry in pending:
            if entry[1].done():
                pass
            elif entry[3]:  # whoever has the batch waits for it
                entry[1].set_result(UnsentError())
            else:
                self._owner.repeat(entry)

    async def _read_replies(self) -> None:
        # Below the client's interface: its parser takes 0.6 µs a reply.
        stream = self._connection._reader
        lacks = 0
        while self._pending or not self.is_closing:
            data = await (stream.readexactly(lacks) if lacks else stream.read(_CHUNK))
            if not data:
                raise ConnectionResetError
            data = self._rest + data
            self._rest = data[self._hand_out(data) :]
            lacks = missing(self._rest) if self._rest else 0

    def _hand_out(self, data: bytes) -> int:
        """Hand out the replies that are complete, and return the position after them."""
        pending = self._pending
        is_large = len(data) > LARGE
        position = 0
        while True:
            replies, position = read_replies(data, position)
            for reply in replies:
                operation, future, _, _, _ = pending.popleft()
                if not future.done():
                    future.set_result(reply)
                if is_large and isinstance(reply, bytes) and len(reply) > LARGE:
                    self._owner.note_size(operation[0], len(reply))
            if position == len(data):
                return position
            found = read_odd(data, position)
            if found is None:
                return position
            reply, position = found
            self._hand_out_odd(reply)

    def _hand_out_odd(self, reply: Any) -> None:
        if not isinstance(reply, ErrorReply):
            raise ValueError("No operation has such a reply")
        entry = self._pending.popleft()
        _, future, _, is_batched, _ = entry
        reply = self._connection._parser.parse_error(reply.text.decode("utf-8", "replace"))
        if is_misplaced(reply):
            self.leave()
        if future.done():
            pass
        elif is_batched:
            future.set_result(reply)
        elif is_final(reply):
            future.set_exception(reply)
        else:
            self._owner.repeat(entry)

    @property
    def _interval(self) -> float:
        return min(1.0, self._owner.stall / 5)

    def _watch_in(self, seconds: float) -> None:
        self._watch_due = self._loop.time() + seconds
        self._loop.call_later(seconds, self._watch)

    def _watch(self) -> None:
        if self._task.done():
            return
        now = self._loop.time()
        waiting = now - self._pending[0][4] if self._pending else 0
        if now - self._watch_due > self._interval:
            # The process, or its loop, was paused: replies may lie in the socket.
            self._watch_in(self._interval)
            return
        if waiting > self._interval:
            self._owner.distrust(self._pending[0][4])
        if waiting > self.stall:
            self.give_up()
            return
        if waiting > self._interval or self._is_spent(now):
            self.leave()
        self._watch_in(min(self._interval, self.stall - waiting))

    def _is_spent(self, now: float) -> bool:
        """Tell whether the client is to have its connection back."""
        is_idle = not self._pending and now - self._used > self._interval
        return is_idle or now - self._opened > _MAX_AGE
