"""An event loop that never waits, and surroundings in which nothing depends on time or chance."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
from collections import defaultdict, deque
from collections.abc import Iterator
from contextvars import Context, ContextVar, copy_context
from typing import Any
from unittest import mock

NOW = 1_700_000_000


class Handle:
    """A callback that the loop is about to run. This is `asyncio.Handle`, but faster."""

    __slots__ = ("_args", "_callback", "_context", "_is_cancelled")

    def __init__(self, context: Context | None, callback: Any, *args: Any) -> None:
        self._context = context or copy_context()
        self._callback = callback
        self._args = args
        self._is_cancelled = False

    def __call__(self) -> None:
        if not self._is_cancelled:
            self._context.run(self._callback, *self._args)

    def cancel(self) -> None:
        self._is_cancelled = True


class Loop(asyncio.AbstractEventLoop):
    """An event loop that runs what is ready, and never waits."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[Any]] = []
        self._ready: deque[Handle] = deque()

    def run(self) -> None:
        """Run until nothing is ready any more."""
        asyncio._set_running_loop(self)
        try:
            while self._ready:
                self._ready.popleft()()
        finally:
            asyncio._set_running_loop(None)
        self.tasks = [task for task in self.tasks if not task.done()]

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> Any:  # type: ignore[override]
        handle = Handle(context, callback, *args)
        self._ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> Any:
        return self.call_at(delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> Any:
        handle = Handle(context, callback, *args)
        if when <= 0:  # no time passes, so no other timer is ever due
            self._ready.append(handle)
        return handle

    def time(self) -> float:
        return 0.0

    def is_closed(self) -> bool:
        return False

    def get_debug(self) -> bool:
        return False

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        options["name"] = origin.get().next("task")
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, **options)
        self.tasks.append(task)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        pass  # an error that matters shows in a request


class Origin:
    """The request that a task belongs to: the names of its tasks and ids begin with its name."""

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.now = now
        self._numbers: defaultdict[str, int] = defaultdict(int)

    def next(self, kind: str) -> str:
        self._numbers[kind] += 1
        return f"{self.name}.{kind}{self._numbers[kind]}"

    def draw(self, size: int = 32) -> bytes:
        name = self.next("id")
        drawn = hashlib.sha256(name.encode()).digest()[:size]
        _names[drawn.hex()] = name
        return drawn


_names: dict[str, str] = {}
origin: ContextVar[Origin] = ContextVar("origin")


def readable(text: str) -> str:
    """Replace random ids by their names."""
    return re.sub("[0-9a-f]{32,64}", lambda found: _names.get(found[0], found[0][:6]), text)


@contextlib.contextmanager
def controlled() -> Iterator[None]:
    """Let nothing depend on time or chance, and log nothing."""
    outside = Origin("outside", NOW)
    with contextlib.ExitStack() as stack:
        for name, value in {
            "time.time": lambda: origin.get(outside).now,
            "os.urandom": lambda size: origin.get(outside).draw(size),
            "secrets.token_bytes": lambda size=32: origin.get().draw(size),
            "secrets.token_hex": lambda size=32: origin.get().draw(size).hex(),
            "secrets.randbelow": lambda below: int.from_bytes(origin.get().draw(), "big") % below,
            "random.uniform": lambda low, high: 0,
        }.items():
            stack.enter_context(mock.patch(name, value))
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, logging.NOTSET)
        yield
