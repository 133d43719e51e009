import asyncio
from typing import Any, final

@final
class FutureGroup:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None: ...
    def create_future(self) -> asyncio.Future[Any]: ...
