"""Many waiters, one round trip."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, ref

_T = TypeVar("_T")
_Operation = TypeVar("_Operation")
_Result = TypeVar("_Result")


class _Entry(NamedTuple, Generic[_Operation, _Result]):
    operation: _Operation
    future: asyncio.Future[_Result]
    size: int
    droppable: bool
    since: float


class Batch(Generic[_Operation, _Result]):
    """Run together the operations that arrive in one turn of an event loop.

    Operations run in tasks of their own, called workers: a waiter that is cancelled gives up its
    place, and disturbs nobody. A lone operation runs at once. While `max_workers` batches are
    under way, operations gather, and the next free worker takes them.

    A batch belongs to one event loop; see `PerLoop`.

    :param run: does a list of operations; returns their results in the same order, with an
        exception in the place of one that failed. What it raises, all of them get. It is
        cancelled when the time is up.
    :param timeout: seconds from its submission after which an operation fails with TimeoutError.
        A store that stalls can make it a quarter less.
    :param max_operations: how many operations run together.
    :param max_bytes: how many bytes run together; an operation that is larger runs alone.
    :param max_workers: how many batches are under way at the same time.
    """

    def __init__(
        self,
        run: Callable[[list[_Operation]], Awaitable[Sequence[_Result | BaseException]]],
        *,
        timeout: float,
        max_operations: int = 64,
        max_bytes: int = 64 * 1024,
        max_workers: int = 4,
    ) -> None:
        self._run = run
        self._timeout = timeout
        self._max_operations = max_operations
        self._max_bytes = max_bytes
        self._max_workers = max_workers
        self._queue: deque[_Entry[_Operation, _Result]] = deque()
        self._deadlines: dict[asyncio.Task[None], float] = {}  # of the workers
        self._expired: set[asyncio.Task[None]] = set()
        self._is_starting = False  # a worker is about to look at the queue
        self._is_watched = False  # a timer is set for the next deadline

    def submit(
        self, operation: _Operation, size: int = 0, *, droppable: bool = False
    ) -> asyncio.Future[_Result]:
        """Queue an operation, and return the future of its result.

        :param size: bytes that it sends or receives, as far as that is known.
        :param droppable: don't begin it if its waiter has been cancelled by then.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Result] = loop.create_future()
        self._queue.append(_Entry(operation, future, size, droppable, loop.time()))
        if not self._is_starting and len(self._deadlines) < self._max_workers:
            self._start_worker(loop)
        return future

    async def finish(self) -> None:
        """Wait until nothing is under way."""
        while self._deadlines:
            await asyncio.wait(list(self._deadlines))

    def _start_worker(self, loop: asyncio.AbstractEventLoop) -> None:
        # The task begins in the next turn of the loop, and finds what arrived in this one.
        self._is_starting = True
        task = loop.create_task(self._work(loop))
        self._deadlines[task] = self._queue[0].since + self._timeout
        if not self._is_watched:
            self._is_watched = True
            loop.call_at(self._deadlines[task], self._expire, loop)

    async def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        task: asyncio.Task[None] = asyncio.current_task()  # type: ignore[assignment]
        try:
            while not self._expired or task not in self._expired:
                self._is_starting = False
                chunk = self._take(loop)
                if not chunk:
                    break
                self._deadlines[task] = chunk[0].since + self._timeout
                if self._queue and len(self._deadlines) < self._max_workers:
                    self._start_worker(loop)
                await self._run_chunk(chunk, task)
        except BaseException:  # cancelled from outside: the loop is shutting down
            while self._queue:
                self._queue.popleft().future.cancel()
            raise
        finally:
            del self._deadlines[task]
            self._expired.discard(task)
            if self._queue and not self._is_starting:
                self._start_worker(loop)

    def _take(self, loop: asyncio.AbstractEventLoop) -> list[_Entry[_Operation, _Result]]:
        chunk: list[_Entry[_Operation, _Result]] = []
        size = 0
        too_old = loop.time() - self._timeout
        while self._queue and len(chunk) < self._max_operations:
            entry = self._queue[0]
            # One deadline for all of them: those that waited much longer run apart.
            if chunk and (
                size + entry.size > self._max_bytes
                or entry.since - chunk[0].since > self._timeout / 4
            ):
                break
            self._queue.popleft()
            if entry.since <= too_old:
                self._fail(entry, self._timeout_error())
            elif not (entry.droppable and entry.future.done()):
                chunk.append(entry)
                size += entry.size
        return chunk

    async def _run_chunk(
        self, chunk: list[_Entry[_Operation, _Result]], task: asyncio.Task[None]
    ) -> None:
        try:
            results = await self._run([entry.operation for entry in chunk])
            for entry, result in zip(chunk, results, strict=True):
                if isinstance(result, BaseException):
                    self._fail(entry, result)
                elif not entry.future.done():
                    entry.future.set_result(result)
        except asyncio.CancelledError:
            if task not in self._expired:
                for entry in chunk:
                    entry.future.cancel()
                raise
            for entry in chunk:
                self._fail(entry, self._timeout_error())
        except Exception as error:  # noqa: BLE001 - it goes to the waiters
            for entry in chunk:
                self._fail(entry, _duplicate(error))

    def _fail(self, entry: _Entry[_Operation, _Result], error: BaseException) -> None:
        if not entry.future.done():
            entry.future.set_exception(error)
            entry.future.exception()  # or asyncio complains when nobody is left to see it

    def _timeout_error(self) -> TimeoutError:
        return TimeoutError(f"The session store did not answer within {self._timeout:g} seconds")

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancel the workers whose time is up, and come back for the next deadline.

        One timer for all: a timer for each round trip would cost more than the rest of this file.
        """
        now = loop.time()
        for task, deadline in self._deadlines.items():
            if deadline <= now and task not in self._expired:
                self._expired.add(task)
                task.cancel()
        rest = [time for task, time in self._deadlines.items() if task not in self._expired]
        self._is_watched = bool(rest)
        if rest:
            loop.call_at(min(rest), self._expire, loop)


class PerLoop(Generic[_T]):
    """An object for each event loop: a storage may serve several, one after another or in threads.

    :param make: makes the object; it must not hold a reference to the loop.
    """

    def __init__(self, make: Callable[[], _T]) -> None:
        self._make = make
        self._objects: WeakKeyDictionary[asyncio.AbstractEventLoop, _T] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._latest: tuple[Callable[[], object], _T | None] = (lambda: None, None)

    def get(self) -> _T:
        """Return the object of the running loop."""
        loop = asyncio.get_running_loop()
        loop_of, value = self._latest  # one attribute, since threads meet here
        if loop_of() is loop:
            return value  # type: ignore[return-value]
        with self._lock:
            value = self._objects.get(loop)
            if value is None:
                value = self._objects[loop] = self._make()
            self._latest = ref(loop), value
        return value


def _duplicate(error: Exception) -> Exception:
    """Copy an exception: each waiter that raises it adds its own traceback."""
    try:
        duplicate = copy.copy(error)
    except Exception:  # noqa: BLE001 - any constructor may be behind it
        return error
    duplicate.__cause__ = error.__cause__ or error.__context__
    return duplicate.with_traceback(error.__traceback__)
