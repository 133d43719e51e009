"""What belongs to an event loop, and is asked for often: the reference implementation."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final
from weakref import WeakKeyDictionary, ref

if TYPE_CHECKING:
    from ._core import KeptRecords
    from ._records_py import Link

__all__ = ("FutureGroup", "PerLoop", "answer", "answer_tracked")

_T = TypeVar("_T")


@final
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
        """Return the object of the running loop.

        :raises RuntimeError: if none is running.
        """
        loop = asyncio.get_running_loop()
        loop_of, value = self._latest  # one attribute, since threads meet here
        return value if loop_of() is loop else self._find(loop)  # type: ignore[return-value]

    def _find(self, loop: asyncio.AbstractEventLoop) -> _T:
        with self._lock:
            value = self._objects.get(loop)
            if value is None:
                for other in [other for other in self._objects if other.is_closed()]:
                    del self._objects[other]
                value = self._objects[loop] = self._make()
            self._latest = ref(loop), value
        return value


@final
class FutureGroup:
    """Makes futures of an event loop, as its own ``create_future()`` does.

    The compiled ones that are done in one turn of the loop share a callback there; with asyncio's
    each has one, which takes half a microsecond. Those that are done between `hold` and `release`
    need no other turn: who waits for them goes on within `release`. And the compiled ones don't
    report an exception that nobody asked for.

    :param loop: is not kept alive.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)

    def create_future(self) -> asyncio.Future[Any]:
        """Make a future."""
        return asyncio.Future(loop=self._loop())

    def hold(self) -> None:
        """Have those who wait go on when `release` is called."""

    def release(self) -> None:
        """Let those go on who wait for what is done: at once, if no task is running."""


def answer(pending: deque[Any], replies: Iterable[object]) -> None:
    """Give each reply to the future that is next, unless nobody waits for that any more.

    :param pending: entries with their futures in second place; they are taken off.
    :raises IndexError: if there are more replies than entries.
    """
    for reply in replies:
        future = pending.popleft()[1]
        if not future.done():
            future.set_result(reply)


def answer_tracked(
    pending: deque[Any],
    tokens: deque[Any],
    replies: Iterable[object],
    records: KeptRecords,
    link: Link | None,
) -> None:
    """Do as `answer` does, and keep or drop records.

    :param tokens: for each entry: the token by which its reply is kept, a function that takes the
        reply, or None.
    :param replies: a str among them is not one, but the key of a record that was changed.
    :param link: what the replies came by; None if it is not to be relied upon.
    """
    for reply in replies:
        if type(reply) is str:
            records.drop(reply)
            continue
        future = pending.popleft()[1]
        token = tokens.popleft()
        if type(token) is list:
            records.keep(token, reply if type(reply) is bytes else None, link)
        elif token is not None:
            token(reply)
        if not future.done():
            future.set_result(reply)
