"""Connections of a client's, seen to answer before operations are written to them."""

from __future__ import annotations

import asyncio
import math
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp_session.time_limit import time_limit

from ._redis_client import Node, Pool, close, give_back


class Checkout:
    """Takes connections from a client, and gives them back.

    A network that has forgotten one connection may have forgotten all, and tells nobody. So when
    one has stalled, those that have not been heard of since then are opened anew.

    :param patience: seconds that a connection may take to answer, before another one is tried.
    """

    def __init__(self, connections: Pool | Node, patience: float) -> None:
        self._connections = connections
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._heard: WeakKeyDictionary[Any, float] = WeakKeyDictionary()  # loop time, by writer
        self._suspect = -math.inf  # loop time

    def distrust(self, since: float) -> None:
        """Note that a connection has stalled.

        :param since: when it was asked what it has not answered (loop time).
        """
        self._suspect = max(self._suspect, since)

    async def take(self) -> Any:
        """Return an open connection.

        :raises Exception: of the client's, if none can be had.
        """
        patience: float | None = self._patience
        while True:
            connection, begun = None, self._loop.time()
            try:
                async with time_limit(patience, monotonic()):
                    connection = await self._connections.acquire()
                    await self._prepare(connection)
                    return connection
            except BaseException as error:
                if connection is not None:
                    await give_back(self._connections, connection, is_clean=False)
                elif not isinstance(error, TimeoutError):
                    raise  # the client has made its own attempts
                if patience is None or not isinstance(error, Exception):
                    raise
            self.distrust(begun)
            patience = None

    async def give_back(self, connection: Any, *, is_clean: bool) -> None:
        """Let a connection go.

        :param is_clean: it has answered all that it was asked.
        """
        if is_clean:
            self._hear(connection)
        await give_back(self._connections, connection, is_clean=is_clean)

    async def _prepare(self, connection: Any) -> None:
        writer = getattr(connection, "_writer", None)
        if isinstance(writer, asyncio.StreamWriter):
            if self._heard.get(writer, -math.inf) < self._suspect:
                await close(connection)
                await connection.connect()
            self._hear(connection)

    def _hear(self, connection: Any) -> None:
        writer = getattr(connection, "_writer", None)
        if isinstance(writer, asyncio.StreamWriter):
            self._heard[writer] = self._loop.time()
