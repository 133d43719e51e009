"""An object for each event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary, ref

_T = TypeVar("_T")


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
                for other in [other for other in self._objects if other.is_closed()]:
                    del self._objects[other]
                value = self._objects[loop] = self._make()
            self._latest = ref(loop), value
        return value
