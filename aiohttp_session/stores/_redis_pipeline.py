"""A connection that many requests share: operations are written as they come (pipelining)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Iterable
from typing import Any, Protocol, TypeAlias

from aiohttp_session._core import FutureGroup, answer, read_replies

from . import UnsettledError
from ._redis_resp import ErrorReply, is_final, is_misplaced, missing, read_odd
from .batch import Entry, fail

LARGE = 32 * 1024  # bytes: what does not travel with others
_MAX_AGE = 60  # seconds


class LostError(Exception):
    """The reply to an operation won't come: its connection broke, or stalled."""


def unsettled() -> UnsettledError:
    """Return the error of a write whose connection was lost."""
    return UnsettledError(
        "The connection to Redis was lost with a write in flight: it is unknown whether the write "
        "was applied"
    )


class UnsentError(Exception):
    """A connection was closed before operations were written to it."""


# An operation: its key; what it sends; what does the same by the client's own methods, a function
# with its arguments behind the client and the key; and whether it is a READ, which may be sent a
# second time, or a WRITE. Plain tuples: a NamedTuple takes 0.3 µs to make, a partial 0.1 µs.
READ, WRITE = "read", "write"
Operation: TypeAlias = tuple[str, bytes, tuple[Any, ...], str]


def do(operation: Operation, client: Any) -> Awaitable[Any]:
    """Begin an operation by the client's own methods."""
    key, _, (function, *arguments), _ = operation
    return function(client, key, *arguments)  # type: ignore[no-any-return]


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

    async def close(self, connection: Any, *, is_clean: bool) -> None:
        """Take a connection of the client's back."""


class PipelinedConnection(asyncio.Protocol):
    """A connection on which operations are written as they come; replies come in their order.

    After a second without an operation, and once a minute, the client gets it back. Without a
    reply for some time it takes no more operations. When it ends, its owner repeats the reads that
    were not answered, and the writes fail with `UnsettledError`.

    What comes in goes to this, and not to the client's stream, which would take two turns of the
    event loop more for each reply.

    :param connection: the client's, open, with no reply under way.
    """

    _PROMPT = 1  # commands in one turn, after which the next one need not wait for others

    def __init__(self, owner: Owner, connection: Any) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._futures = FutureGroup(loop)
        self._owner = owner
        self._connection = connection
        self._unsent: list[bytes] = []
        self._pending: deque[Entry[Operation, Any]] = deque()
        self._parts: list[bytes] = []  # of an incomplete reply
        self._lacks = 0  # bytes of that, as far as is known
        self._is_busy = True  # several operations may come in this turn, as in the last one
        self.is_closing = False
        # Until many share it, it has to leave time for another one.
        self.stall = owner.stall / 2
        self._used = self._opened = loop.time()
        self._over: asyncio.Future[bool] = loop.create_future()  # whether it was lost
        self._task = loop.create_task(self._run())
        self._transport = connection._writer.transport
        self._former: asyncio.Protocol = self._transport.get_protocol()
        self._transport.set_protocol(self)
        if self._transport.is_closing() or connection._reader.at_eof():
            self._finish(is_lost=True)
        self._watch_in(self._interval)

    async def start(self) -> None:
        """Make ready to be the one that all share, or leave."""

    def submit(self, operation: Operation, *, is_batched: bool = False) -> asyncio.Future[Any]:
        """Write an operation, with all others of this turn; return the future of its reply.

        :param is_batched: the future is for the owner, which gets errors, `LostError` and
            `UnsentError` as results; otherwise for a waiter, and the owner is asked to repeat what
            failed.
        """
        future = self._futures.create_future()
        is_first = not self._unsent
        if is_first:
            self._used = self._loop.time()
        self._unsent.append(operation[1])
        self._pending.append((operation, future, 0, is_batched, self._used))
        if is_first:
            self._schedule()
        return future

    def leave(self) -> None:
        """Take no more operations, and end when the last reply has come."""
        self.is_closing = True
        self._owner.leave(self)
        if not self._pending:
            self._finish(is_lost=False)

    async def close(self) -> None:
        """Wait for the replies that are due, and give the connection back."""
        self.leave()
        await asyncio.wait({self._task})

    def give_up(self) -> None:
        """End now, whatever is under way."""
        self.leave()
        self._finish(is_lost=False)

    async def abort(self) -> None:
        """End now, whatever is under way, and give the connection back."""
        self.give_up()
        await asyncio.wait({self._task})

    # What the event loop calls.

    def data_received(self, data: bytes) -> None:
        """Hand out the replies that are complete."""
        if self._parts:
            self._parts.append(data)
            self._lacks -= len(data)
            if self._lacks > 0:
                return
            data = b"".join(self._parts)
            self._parts.clear()
        self._futures.hold()
        try:
            position = self._hand_out(data)
            if position < len(data):
                rest = data[position:]
                self._parts.append(rest)
                self._lacks = missing(rest)
            if self.is_closing and not self._pending:
                self._finish(is_lost=False)
        except Exception:  # noqa: BLE001 - it isn't Redis that speaks
            self._finish(is_lost=True)
        finally:
            self._futures.release()

    def eof_received(self) -> bool | None:
        """End, since no more replies come."""
        self._finish(is_lost=True)
        return self._former.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        """End."""
        self._finish(is_lost=True)
        self._former.connection_lost(error)

    def pause_writing(self) -> None:
        """Pass it on: whoever writes here has no more than a turn's operations to write."""
        self._former.pause_writing()

    def resume_writing(self) -> None:
        """Pass it on."""
        self._former.resume_writing()

    def _schedule(self) -> None:
        """Have what is unsent written: now, or with what else may come in this turn."""
        if self._is_busy or len(self._pending) > len(self._unsent):
            self._loop.call_soon(self._send)
        else:
            self._send()

    def _send(self) -> None:
        if self._over.done():
            return
        unsent, self._unsent = self._unsent, []
        self._is_busy = len(unsent) > self._PROMPT
        try:
            self._transport.write(b"".join(unsent))
        except Exception:  # noqa: BLE001 - uvloop's, if it is lost, which it says here as well
            self._finish(is_lost=True)

    def _finish(self, *, is_lost: bool) -> None:
        """Have it end: nothing more is written or handed out."""
        if not self._over.done():
            self._over.set_result(is_lost)
            self._transport.set_protocol(self._former)
            self.leave()

    async def _run(self) -> None:
        is_lost = False
        try:
            is_lost = await self._over
        except asyncio.CancelledError:
            self._transport.set_protocol(self._former)
            if not self.is_closing:  # from outside: the event loop is shutting down
                for _, future, *_ in self._pending:
                    future.cancel()
        finally:
            await self._end(is_clean=not (is_lost or self._pending or self._parts))

    async def _end(self, *, is_clean: bool) -> None:
        self.leave()
        pending, self._pending = self._pending, deque()
        unsent, self._unsent = len(self._unsent), []
        sent = [pending.popleft() for _ in range(len(pending) - unsent)]
        if sent:
            self._owner.distrust(sent[0][4])
        await self._owner.close(self._connection, is_clean=is_clean)
        for entry in sent:
            operation, future, _, is_batched, _ = entry
            if future.done():
                pass  # its caller was cancelled: it is not sent again
            elif is_batched:
                future.set_result(LostError())
            elif operation[3] is READ:
                self._owner.repeat(entry)
            else:
                fail(future, unsettled())
        for entry in pending:
            if entry[1].done():
                pass
            elif entry[3]:  # whoever has the batch waits for it
                entry[1].set_result(UnsentError())
            else:
                self._owner.repeat(entry)

    def _hand_out(self, data: bytes) -> int:
        """Hand out the replies that are complete, and return the position after them."""
        position = 0
        while True:
            position = self._hand_out_usual(data, position)
            if position == len(data):
                return position
            found = read_odd(data, position)
            if found is None:
                return position
            odd, position = found
            self._hand_out_odd(odd)

    def _hand_out_usual(self, data: bytes, position: int) -> int:
        replies, position = read_replies(data, position)
        if len(data) > LARGE:
            self._note_sizes(replies)
        answer(self._pending, replies)
        return position

    def _note_sizes(self, replies: Iterable[object]) -> None:
        for ((key, *_), *_), reply in zip(self._pending, replies, strict=False):
            if key and isinstance(reply, bytes) and len(reply) > LARGE:
                self._owner.note_size(key, len(reply))

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
