import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, final

from ._core import KeptRecords
from ._records_py import Link

_T = TypeVar("_T")

@final
class PerLoop(Generic[_T]):
    def __init__(self, make: Callable[[], _T]) -> None: ...
    def get(self) -> _T: ...

@final
class FutureGroup:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None: ...
    def create_future(self) -> asyncio.Future[Any]: ...
    def hold(self) -> None: ...
    def release(self) -> None: ...

def answer(pending: deque[Any], replies: Iterable[object]) -> None: ...
def answer_tracked(
    pending: deque[Any],
    tokens: deque[Any],
    replies: Iterable[object],
    records: KeptRecords,
    link: Link | None,
) -> None: ...
