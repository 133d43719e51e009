"""Connections on which Redis tells of changes to what was read through them.

The means is ``CLIENT TRACKING`` with RESP3: the server remembers which keys a connection has read,
and pushes a message into its replies, in order with them, when one of these is changed; once, then
it has forgotten the key. So what comes in, in its order, tells what may be kept.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

from aiohttp_session._core import answer_tracked, read_tracked, write_command, write_get
from aiohttp_session.log import log

from ._redis_pipeline import LARGE, READ, Operation, Owner, PipelinedConnection
from ._redis_resp import ErrorReply, Push
from .batch import Entry
from .kept_records import KeptRecords, Link

TRUST = 2.0  # seconds: how long the answer to a heartbeat vouches for a connection
_BEAT = 1.0  # seconds from one heartbeat to the next
_ATTEMPTS = 3  # connections that are lost before tracking was once on
# Not with NOLOOP, though changes by this connection itself are known: with it, Redis says nothing
# of the keys either that it evicts, from its table or the database, to make room for our commands.
_HELLO = write_command(b"HELLO", b"3")
_TRACK = write_command(b"CLIENT", b"TRACKING", b"ON")
# Not PING: this also says, by an error, that the server is a replica by now.
_HEARTBEAT = write_command(b"WAIT", b"0", b"0")
_DELETION = b"*2\r\n$3\r\nDEL"
_REFUSED = re.compile(rb"(?:NOPERM|NOPROTO|ERR) (?!.*replica)")  # else it may be for a while


class Tracking:
    """Where to keep what is read, and whether the servers can tell of changes to it.

    :param records: gives what keeps the records of the running event loop.
    """

    def __init__(self, records: Callable[[], KeptRecords]) -> None:
        self._records = records
        self._lost = 0
        self._is_confirmed = False
        self._is_possible = True

    def connect(self, owner: Owner, connection: Any) -> PipelinedConnection:
        """Make a pipelined connection, one with tracking if that is possible."""
        if self._is_possible:
            return TrackedConnection(owner, connection, self, self._records())
        return PipelinedConnection(owner, connection)

    def note(self, entry: Entry[Operation, Any]) -> None:
        """Note an operation that is done by another way than a tracked connection, or was.

        What was read there before a change may come in after it.
        """
        (key, _, _, fate), future, *_ = entry
        if self._is_possible and fate is not READ:
            records = self._records()
            records.begin_change(key)
            future.add_done_callback(lambda _: records.end_change(key))

    def confirm(self) -> None:
        """Note that it works."""
        self._is_confirmed = True

    def note_lost(self) -> None:
        """Note that a connection was lost before it could be seen to work."""
        self._lost += 1
        if self._lost == _ATTEMPTS and not self._is_confirmed:
            self.give_up("the connection is closed")

    def give_up(self, reason: str) -> None:
        """Do without from now on, in all event loops."""
        if self._is_possible:
            self._is_possible = False
            log.warning(
                "near_cache has no effect: Redis was asked to track what is read (HELLO 3, CLIENT "
                "TRACKING, WAIT), and %s",
                reason,
            )


class TrackedConnection(PipelinedConnection, Link):
    """A pipelined connection that keeps what it reads, and drops what was changed.

    It does so from `start` on, and is not given back to the client then, but closed.
    """

    _PROMPT = 2  # an operation that writes has a read behind it
    _is_started = _is_tracking = False

    def __init__(
        self,
        owner: Owner,
        connection: Any,
        tracking: Tracking,
        records: KeptRecords,
    ) -> None:
        super().__init__(owner, connection)
        self._tracking = tracking
        self._records = records
        # For each reply that is due: the token to keep it by; or of a command of our own, what is
        # called with it; or None.
        self._tokens: deque[Any] = deque()
        self._behind: Entry[Operation, Any]  # what is read right behind a write of this turn
        self._nobody = self._loop.create_future()  # waits for what was not asked by an operation
        self._nobody.set_result(None)
        self._answered = self._loop.create_future()

    async def start(self) -> None:
        """Ask for tracking, with the first heartbeat right behind, and wait for the answer."""
        self._is_started = True
        self._tokens.extend([None] * len(self._pending))
        self._command(_HELLO, lambda reply: None)
        self._command(_TRACK, self._confirm)
        self._beat()
        # No operation is written before: something between here and the server may take offence.
        await asyncio.wait({self._answered, self._task}, return_when=asyncio.FIRST_COMPLETED)

    def submit(self, operation: Operation, *, is_batched: bool = False) -> asyncio.Future[Any]:
        """Write an operation; what it reads or writes is kept."""
        if not self._is_started:
            return super().submit(operation, is_batched=is_batched)
        is_first = not self._unsent
        if is_first:
            self._begin()
        key, packed, _, fate = operation
        future = self._futures.create_future()
        self._unsent.append(packed)
        self._pending.append((operation, future, 0, False, self._used))
        if fate is READ:
            self._tokens.append(self._records.ask(key))
        elif packed.startswith(_DELETION):
            self._tokens.append(None)
            self._records.forget(key)
        else:
            # Redis forgets that we know a key when we write it. For a few bytes more, the next read
            # need not ask.
            self._unsent.append(write_get(key))
            self._pending.append(self._behind)
            self._tokens += None, self._records.ask_behind(key)
        if is_first:
            self._schedule()
        return future

    def leave(self) -> None:
        """Take no more operations, and rely on nothing that came by it."""
        if self._is_tracking:
            self._is_tracking = False
            self.until = 0.0
            self._records.forget_link(self)
            for entry in self._pending:
                # Reads come in by another connection from now on, and may be from before.
                self._tracking.note(entry)
        super().leave()

    def _finish(self, *, is_lost: bool) -> None:
        if is_lost and self._is_started and not (self._is_tracking or self.is_closing):
            self._tracking.note_lost()
        super()._finish(is_lost=is_lost)

    async def _end(self, *, is_clean: bool) -> None:
        await super()._end(is_clean=is_clean and not self._is_started)

    def _is_spent(self, now: float) -> bool:
        return not self._is_started and super()._is_spent(now)

    def _beat(self) -> None:
        if not self.is_closing:
            self._command(_HEARTBEAT, partial(self._rely, monotonic()))
            self._loop.call_later(_BEAT, self._beat)

    def _command(self, packed: bytes, take: Callable[[Any], object]) -> None:
        """Write a command of our own."""
        is_first = not self._unsent
        if is_first:
            self._begin()
        self._unsent.append(packed)
        self._pending.append((_OWN, self._nobody, 0, True, self._used))
        self._tokens.append(take)
        if is_first:
            self._schedule()

    def _begin(self) -> None:
        """Take down when it is that this turn's operations were written."""
        self._used = now = self._loop.time()
        self._behind = _BEHIND, self._nobody, 0, True, now

    def _confirm(self, reply: object) -> None:
        self._is_tracking = not self.is_closing
        self._tracking.confirm()

    def _rely(self, since: float, reply: object) -> None:
        if self._is_tracking:
            # All that was changed before then has been announced before this.
            self.until = since + TRUST
            if not self._answered.done():
                self._answered.set_result(None)

    def _hand_out_usual(self, data: bytes, position: int) -> int:
        if not self._is_started:
            return super()._hand_out_usual(data, position)
        # As in the base, but with tokens, and messages that tell of changes: writes cause them.
        replies, position = read_tracked(data, position)
        if len(data) > LARGE:
            self._note_sizes(reply for reply in replies if type(reply) is not str)
        link = self if self._is_tracking else None
        answer_tracked(self._pending, self._tokens, replies, self._records, link)
        return position

    def _hand_out_odd(self, reply: Any) -> None:
        if not self._is_started:
            super()._hand_out_odd(reply)
        elif isinstance(reply, Push):
            # The database was flushed; or it is a message that isn't known.
            self._records.forget_link(self)
        elif isinstance(reply, ErrorReply):
            operation = self._pending[0][0]
            token = self._tokens.popleft()
            if isinstance(token, list):
                # It is asked again elsewhere: what is answered behind it may be from before that.
                self._records.forget(token[0])
            super()._hand_out_odd(reply)
            if operation is _OWN:
                self._do_without(reply.text)
        elif self._pending[0][0] is _OWN:  # what the server says of itself
            self._pending.popleft()
            self._tokens.popleft()
        else:
            super()._hand_out_odd(reply)

    def _do_without(self, error: bytes) -> None:
        """Leave the connection, since a command of our own was refused."""
        if _REFUSED.match(error):
            self._tracking.give_up(f"replied: {error[:200].decode('ascii', 'replace')}")
        self.leave()


# Two of them, so they must not be equal; neither is ever repeated.
_OWN: Operation = ("", b"", ("own",), READ)
_BEHIND: Operation = ("", b"", ("behind",), READ)
