"""Many waiters, one round trip."""

from __future__ import annotations

import asyncio
import copy
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeAlias, TypeVar

from aiohttp_session.time_limit import timed_out

_Operation = TypeVar("_Operation")
_Result = TypeVar("_Result")


# An operation in the queue: itself, its future, its size, whether it may be dropped, and when it
# came (loop time). A plain tuple, which is what there are most of.
Entry: TypeAlias = tuple[_Operation, "asyncio.Future[_Result]", int, bool, float]


class Batch(Generic[_Operation, _Result]):
    """Run together the operations that arrive in one turn of an event loop.

    Operations run in tasks of their own, called workers: a waiter that is cancelled gives up its
    place, and disturbs nobody. A lone operation runs at once. While `max_workers` batches are
    under way, operations gather, and the next free worker takes them.

    When its time is up, an operation fails, whatever becomes of its worker. A batch belongs to one
    event loop; see `PerLoop`.

    :param run: does a list of operations; returns their results in the same order, with an
        exception in the place of one that failed. What it raises, all of them get. It is
        cancelled when the time is up, and again until it ends.
    :param timeout: seconds from its submission after which an operation fails with TimeoutError.
        A store that stalls can make it a quarter less, or a hundredth more.
    :param max_operations: how many operations run together.
    :param max_bytes: how many bytes run together; an operation that is larger runs alone.
    :param max_workers: how many batches are under way at the same time.
    :param note: is told of each operation that is queued, before its waiter can wait.
    """

    def __init__(
        self,
        run: Callable[[list[_Operation]], Awaitable[Sequence[_Result | BaseException]]],
        *,
        timeout: float,
        max_operations: int = 64,
        max_bytes: int = 64 * 1024,
        max_workers: int = 4,
        note: Callable[[Entry[_Operation, _Result]], None] | None = None,
    ) -> None:
        self._run = run
        self._note = note
        self._timeout = timeout
        self._max_operations = max_operations
        self._max_bytes = max_bytes
        self._max_workers = max_workers
        self.queue: deque[Entry[_Operation, _Result]] = deque()  # what no worker has taken
        self._deadlines: dict[asyncio.Task[None], float] = {}  # of the workers
        self._chunks: dict[asyncio.Task[None], list[Entry[_Operation, _Result]]] = {}
        self._expired: set[asyncio.Task[None]] = set()
        self._starting: asyncio.Task[None] | None = None  # is about to look at the queue
        # For the next deadline, and its time: a handle of uvloop's may not tell.
        self._timer: asyncio.Handle | None = None
        self._timer_due = 0.0

    def submit(
        self,
        operation: _Operation,
        size: int = 0,
        *,
        droppable: bool = False,
        since: float | None = None,
    ) -> asyncio.Future[_Result]:
        """Queue an operation, and return the future of its result.

        :param size: bytes that it sends or receives, as far as that is known.
        :param droppable: don't begin it if its waiter has been cancelled by then.
        :param since: when its time began (loop time); by default now.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Result] = loop.create_future()
        begun = loop.time() if since is None else since
        self.put((operation, future, size, droppable, begun), loop)
        return future

    def put(self, entry: Entry[_Operation, _Result], loop: asyncio.AbstractEventLoop) -> None:
        """Queue an operation that has its future, and perhaps a part of its time behind it."""
        self.queue.append(entry)
        if self._note is not None:
            self._note(entry)
        if self._starting is None and len(self._deadlines) < self._max_workers:
            self._start_worker(loop)
        else:
            self._set_timer(entry[4] + self._timeout, loop)

    async def finish(self) -> None:
        """Wait until nothing is under way."""
        while self._deadlines:
            await asyncio.wait(list(self._deadlines))

    def _start_worker(self, loop: asyncio.AbstractEventLoop) -> None:
        # The task begins in the next turn of the loop, and finds what arrived in this one.
        task = self._starting = loop.create_task(self._work(loop))
        task.add_done_callback(self._end_worker)
        self._set_deadline(task, self.queue[0][4] + self._timeout, loop)

    async def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        task: asyncio.Task[None] = self._starting  # type: ignore[assignment]
        self._starting = None
        while task not in self._expired and (chunk := self._take(loop)):
            self._chunks[task] = chunk
            self._set_deadline(task, chunk[0][4] + self._timeout, loop)
            if self.queue and self._starting is None and len(self._deadlines) < self._max_workers:
                self._start_worker(loop)
            await self._run_chunk(chunk, task)

    def _end_worker(self, task: asyncio.Task[None]) -> None:
        del self._deadlines[task]
        self._chunks.pop(task, None)
        was_expired = task in self._expired
        self._expired.discard(task)
        if task is self._starting:
            self._starting = None
        if task.cancelled() and not was_expired:  # from outside: the loop is shutting down
            while self.queue:
                self.queue.popleft()[1].cancel()
        elif self.queue and self._starting is None:
            self._start_worker(task.get_loop())

    def _take(self, loop: asyncio.AbstractEventLoop) -> list[Entry[_Operation, _Result]]:
        chunk: list[Entry[_Operation, _Result]] = []
        queue = self.queue
        size = 0
        too_old = loop.time() - self._timeout
        # One deadline for all of them: those that came much later run apart.
        too_young = queue[0][4] + self._timeout / 4 if queue else 0.0
        while queue and len(chunk) < self._max_operations:
            entry = queue[0]
            _, future, entry_size, droppable, since = entry
            size += entry_size
            if chunk and (size > self._max_bytes or since > too_young):
                break
            queue.popleft()
            if since <= too_old:
                fail(future, timed_out(self._timeout))
            elif not (droppable and future.done()):
                chunk.append(entry)
        return chunk

    async def _run_chunk(
        self, chunk: list[Entry[_Operation, _Result]], task: asyncio.Task[None]
    ) -> None:
        try:
            results = await self._run([entry[0] for entry in chunk])
            for entry, result in zip(chunk, results, strict=True):
                future = entry[1]
                if isinstance(result, BaseException):
                    fail(future, result)
                elif not future.done():
                    future.set_result(result)
        except asyncio.CancelledError:
            if task not in self._expired:  # or they have failed already
                for _, future, *_ in chunk:
                    future.cancel()
                raise
        except Exception as error:  # noqa: BLE001 - it goes to the waiters
            for _, future, *_ in chunk:
                fail(future, error)

    def _set_deadline(
        self, task: asyncio.Task[None], deadline: float, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._deadlines[task] = deadline
        if self._timer is None or deadline < self._timer_due:
            self._set_timer(deadline, loop)

    def _set_timer(self, due: float, loop: asyncio.AbstractEventLoop) -> None:
        # One timer for all: one for each round trip would cost more than the rest of this file.
        if self._timer is not None:
            if due >= self._timer_due:
                return
            self._timer.cancel()
        self._timer_due = due
        self._timer = loop.call_at(due, self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        """Fail the operations whose time is up, and cancel the workers that they were with."""
        now = loop.time()
        self._timer = None
        for task, deadline in self._deadlines.items():
            if deadline <= now:
                self._expired.add(task)
                # Once more if it does not end: `asyncio.wait_for` of Python before 3.12 loses a
                # cancellation that meets its completion.
                task.cancel()
                self._deadlines[task] = now + self._timeout / 4
                for _, future, *_ in self._chunks.get(task, ()):
                    fail(future, timed_out(self._timeout))
        due = [*self._deadlines.values()]
        if self.queue:  # no worker may be free to take them
            due.append(self._expire_queue(now - self._timeout) + self._timeout)
        if due:
            # Not for each of thousands that wait: to look at them all takes a millisecond.
            self._set_timer(max(min(due), now + self._timeout / 100), loop)

    def _expire_queue(self, too_old: float) -> float:
        """Fail what came too long ago, and return when the first of the others came."""
        waiting = []
        for entry in self.queue:
            if entry[4] > too_old:
                waiting.append(entry)
            else:
                fail(entry[1], timed_out(self._timeout))
        self.queue.clear()
        self.queue.extend(waiting)
        return min((entry[4] for entry in waiting), default=math.inf)


def fail(future: asyncio.Future[_Result], error: BaseException) -> None:
    """Give a future an exception, unless it is done."""
    if not future.done():
        # Each waiter that raises an exception adds its own traceback to it.
        future.set_exception(duplicate(error))
        future.exception()  # or asyncio complains when nobody is left to see it


def duplicate(error: BaseException) -> BaseException:
    """Copy an error: each caller that raises an exception adds a traceback of its own to it."""
    try:
        duplicate = copy.copy(error)
    except Exception:  # noqa: BLE001 - any constructor may be behind it
        return error
    duplicate.__cause__ = error.__cause__ or error.__context__
    return duplicate.with_traceback(error.__traceback__)
