"""Operations on one Redis server. A write is sent once; a read may be sent again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any
from weakref import WeakSet

from aiohttp_session._core import write_command
from aiohttp_session.time_limit import time_limit

from ._redis_checkout import Checkout
from ._redis_client import WORKERS, Node, Pool, call, has_successor, is_pipelined, tell
from ._redis_large import LargeRecords
from ._redis_pipeline import (
    LARGE,
    READ,
    LostError,
    Operation,
    PipelinedConnection,
    UnsentError,
    do,
    unsettled,
)
from ._redis_resp import is_asking, is_final, is_misplaced, is_reply
from ._redis_tracking import Tracking
from ._redis_transaction import exchange
from .batch import Batch, Entry

_CALLS = 64  # at the same time, of a client whose own methods have to be used
_ATTEMPTS = 10  # to find the server that is in charge
_PAUSE = 0.05  # seconds: how much longer each of them waits than the one before
_ASKING: Operation = (
    "",
    write_command(b"ASKING"),
    (lambda client, _: client.execute_command("ASKING"),),
    READ,
)


class Server:
    """Does operations on one server, in one event loop.

    The first ones go as a batch by a connection of the client. It is kept as the pipelined
    connection, on which the next ones are written as they come; large ones go apart from it.

    A read whose connection was lost is sent again, up to twice. What else goes wrong with one is
    asked again by the client's own methods, so its rules for retries, redirections and failover
    hold; but a slot that is moving is asked for where it goes. A write is sent once:

    - if a server refused it as not the right one, a read by the client's own methods finds the one
      that is, and it goes there;
    - if its connection was lost, it fails with `UnsettledError`;
    - if its caller was cancelled, it is given up.

    With a client of which only its own methods will do, its own rules hold for writes too: it may
    send them again.

    :param connections: the client's; None if only its own methods will do.
    :param locate: finds the server that is in charge of a key, by what the client knows and by
        the error with which another one refused it; None if there is only this one.
    """

    def __init__(
        self,
        client: Any,
        connections: Pool | Node | None,
        timeout: float,
        locate: Callable[[str, Exception], Server] | None = None,
        *,
        tracking: Tracking | None = None,
    ) -> None:
        self._client = client
        self._timeout = timeout
        self._pipeline: PipelinedConnection | None = None
        self._left: WeakSet[PipelinedConnection] = WeakSet()  # of which replies are due, perhaps
        self._large = LargeRecords()
        self._connect = PipelinedConnection if tracking is None else tracking.connect
        note = None if tracking is None else tracking.note
        self._locate = locate or (lambda key, error: self)
        self._attempts = _ATTEMPTS if has_successor(client) else 1
        self.stall = timeout / 2
        self.connections = connections
        if connections is None:
            # One operation at a time for each worker, as requests would use the client.
            workers = 1 if getattr(client, "single_connection_client", False) else _CALLS
            self._batch: Batch[Operation, Any] = Batch(
                self._ask, timeout=timeout, max_operations=1, max_workers=workers, note=note
            )
        else:
            self._checkout = Checkout(connections, timeout / 4)
            workers = min(WORKERS, connections.limit)
            self._batch = Batch(self._run, timeout=timeout, max_workers=workers, note=note)
        spare = 1 if connections is None else connections.limit - WORKERS - 1
        self._transactions: Batch[Operation, Any] = Batch(
            self._transact,
            timeout=timeout,
            max_operations=1,
            max_workers=max(1, min(WORKERS, spare)),
            note=note,
        )

    def submit(
        self, operation: Operation, size: int = 0, *, droppable: bool = False
    ) -> asyncio.Future[Any]:
        """Do an operation, as `Batch.submit` describes."""
        pipeline = self._pipeline
        if size > LARGE or self._large:
            size = self.note_size(operation[0], size)
            if size > LARGE:
                pipeline = None
        if pipeline is not None:
            return pipeline.submit(operation)
        return self._batch.submit(operation, size, droppable=droppable)

    def resubmit(self, operation: Operation, since: float, size: int = 0) -> asyncio.Future[Any]:
        """Do an operation that has a part of its time behind it.

        :param since: when it was first submitted (loop time).
        """
        return self._batch.submit(operation, size, since=since)

    def submit_transaction(self, operation: Operation, since: float) -> asyncio.Future[Any]:
        """Do a write that takes several round trips: its call gets a connection, not the client.

        :raises NotImplementedError: if only the client's own methods will do.
        """
        if self.connections is None:
            raise NotImplementedError("A client with methods of its own has no transactions")
        return self._transactions.submit(operation, since=since)

    def note_size(self, key: str, size: int = 0) -> int:
        """Take down the size of a large record, as `LargeRecords.note` does."""
        return self._large.note(key, size)

    async def finish(self) -> None:
        """Wait until nothing is under way, and give all connections back."""
        await self._transactions.finish()
        await self._batch.finish()
        while self._pipeline is not None or self._left:
            for connection in filter(None, (self._pipeline, *self._left)):
                await connection.close()
            self._left.clear()
            await self._batch.finish()
        if self.connections is not None:
            await self.connections.close()

    # What a pipelined connection asks of its owner.

    def repeat(self, entry: Entry[Operation, Any]) -> None:
        """Take back an operation that was not done, or may be done again."""
        self._batch.put(entry, asyncio.get_running_loop())

    def leave(self, connection: PipelinedConnection) -> None:
        """Give a connection no more operations."""
        if self._pipeline is connection:
            self._pipeline = None
            self._left.add(connection)

    def distrust(self, since: float) -> None:
        """Take no connection for alive that was not heard of since some loop time."""
        self._checkout.distrust(since)

    async def close(self, connection: Any, *, is_clean: bool) -> None:
        """Give a connection of the client's back."""
        await self._checkout.give_back(connection, is_clean=is_clean)

    async def _run(self, operations: list[Operation]) -> list[Any]:
        is_unsent = False
        try:
            replies = await self._exchange_patiently(operations)
        except Exception as error:  # noqa: BLE001 - no connection could be had
            is_unsent = True
            replies = [error] * len(operations)
        failed = [
            i
            for i, reply in enumerate(replies)
            if isinstance(reply, Exception) and (is_unsent or not is_final(reply))
        ]
        reads = [i for i in failed if operations[i][3] is READ and not is_asking(replies[i])]
        answers = await self._ask([operations[i] for i in reads])
        for i, answer in zip(reads, answers, strict=True):
            replies[i] = answer
        for i in failed:
            if i not in reads:
                replies[i] = await self._mend(operations[i], replies[i], is_unsent=is_unsent)
        for (key, *_), reply in zip(operations, replies, strict=True):
            if reply is None:
                self._large.pop(key, None)
            elif isinstance(reply, bytes) and reply != b"OK":  # a record
                self.note_size(key, len(reply))
        return replies

    async def _exchange_patiently(self, operations: list[Operation]) -> list[Any]:
        """Send operations; once more if nothing was sent, and up to twice the reads that were lost.

        :raises Exception: of the client's, if nothing was sent.
        """
        try:
            replies = await self._exchange(operations)
        except UnsentError:
            replies = await self._exchange(operations)
        with contextlib.suppress(Exception):  # no connection: the client's own methods will try
            for _ in range(2):
                lost = [
                    i
                    for i, reply in enumerate(replies)
                    if isinstance(reply, LostError) and operations[i][3] is READ
                ]
                again = await self._exchange([operations[i] for i in lost]) if lost else []
                for i, reply in zip(lost, again, strict=True):
                    replies[i] = reply
        return replies

    async def _exchange(self, operations: list[Operation]) -> list[Any]:
        """Send operations once; return their replies, with errors in the place of those that fail.

        :raises Exception: of the client's, if nothing was sent.
        """
        connection = await self._checkout.take()
        limit = getattr(connection, "socket_timeout", None)
        self.stall = self._timeout / 2 if limit is None else min(self._timeout / 2, limit)
        if is_pipelined(connection):
            return await self._exchange_pipelined(connection, operations)
        tell(
            f"by {type(connection).__name__}'s own methods, a batch at a time",
            "they are not the library's",
        )
        doing = exchange(connection, [packed for _, packed, *_ in operations])
        result: Any = await self._use(connection, doing)
        return [result] * len(operations) if isinstance(result, LostError) else result

    async def _exchange_pipelined(self, connection: Any, operations: list[Operation]) -> list[Any]:
        connections: Any = self.connections
        pipeline = self._connect(self, connection)
        futures = [pipeline.submit(operation, is_batched=True) for operation in operations]
        is_shared = False
        try:
            await asyncio.wait(futures)
            if self._pipeline is None and connections.limit > WORKERS:
                await pipeline.start()
                is_shared = self._pipeline is None and not pipeline.is_closing
        except BaseException:
            await pipeline.abort()
            raise
        if is_shared:
            pipeline.stall = self.stall
            self._pipeline = pipeline
        else:
            await pipeline.close()
        replies = [future.result() for future in futures]
        if isinstance(replies[0], UnsentError):  # then all of them are
            raise replies[0]
        return replies

    async def _use(self, connection: Any, doing: Awaitable[Any]) -> Any:
        """Await what uses a connection, and give that back; return the result, or `LostError`."""
        is_clean = False
        try:
            async with time_limit(self.stall / 2, monotonic()):
                result = await doing
            is_clean = True
        except Exception:  # noqa: BLE001 - the connection is lost
            result = LostError()
        finally:
            await self.close(connection, is_clean=is_clean)
        return result

    async def _mend(self, operation: Operation, error: Exception, *, is_unsent: bool) -> Any:
        """Find out what became of an operation, or do it now if it was not done."""
        if not isinstance(error, LostError) and (is_unsent or is_misplaced(error)):
            return await self._place(operation, error)
        return _settle(error)

    async def _place(self, operation: Operation, error: Any) -> Any:
        """Send an operation, which has not been done, to the server that is in charge.

        Not by the client's own methods: redis-py's may say ASKING on one connection and send the
        operation on another, and so get nowhere.
        """
        for attempt in range(self._attempts):
            await asyncio.sleep(attempt * _PAUSE)
            try:
                if not is_asking(error):  # the client learns who is in charge now
                    await self._client.get(operation[0])
                server = self._locate(operation[0], error)
            except Exception as failure:  # noqa: BLE001 - it goes to the waiter
                return failure
            try:
                reply = await server.send(operation, is_asking=is_asking(error))
            except Exception as failure:  # noqa: BLE001 - no connection: once more, or the waiter's
                reply = failure
            else:
                if not is_misplaced(reply):
                    return reply
            error = reply
        return error

    async def send(self, operation: Operation, *, is_asking: bool) -> Any:
        """Send an operation once; return its reply, or an error.

        :param is_asking: the server is yet to take over the slot of its key.
        :raises Exception: of the client's, if it was not sent.
        """
        if not operation[1]:
            connection = await self._checkout.take()
            return _settle(await self._use(connection, do(operation, connection)))
        operations = [_ASKING, operation] if is_asking else [operation]
        return _settle((await self._exchange(operations))[-1])

    async def _transact(self, operations: list[Operation]) -> list[Any]:
        try:
            reply = await self.send(operations[0], is_asking=False)
            is_done = not is_misplaced(reply)
        except Exception as error:  # noqa: BLE001 - no connection could be had
            reply, is_done = error, False
        return [reply if is_done else await self._place(operations[0], reply)]

    async def _ask(self, operations: list[Operation]) -> list[Any]:
        """Do reads by the client's own methods."""
        answers: list[Any] = []
        for operation in operations:
            try:
                answers.append(await call(self._client, operation))
            except Exception as error:  # noqa: BLE001 - it goes to the waiter
                if not is_reply(error):
                    # The server can't be reached: the others need not try for themselves.
                    return answers + [error] * (len(operations) - len(answers))
                answers.append(error)
        return answers


def _settle(reply: Any) -> Any:
    """Return what the caller of a write gets in the place of `LostError`."""
    return unsettled() if isinstance(reply, LostError) else reply
