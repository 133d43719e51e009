"""A TCP proxy that makes trouble between a client and a real server."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING

from benchmarks.servers import HOST
from tests.waiting import until

if TYPE_CHECKING:
    from typing_extensions import Self


class Proxy:
    """Forwards connections to a server on `HOST`; an async context manager.

    The attributes can be changed at any time, and hold for open connections too.
    """

    port: int
    """Where it listens; free when it starts, and the same after `refuse` and `listen`."""
    accepted = 0
    """The number of connections that were ever made to it."""
    passed = 0
    """The number of reads from clients that were passed on."""
    held_requests = 0
    """The number of reads from clients that wait to be passed on; one for each connection."""
    held_replies = 0
    """The number of reads from the server that wait to be passed on; one for each connection."""

    fragment = 2**16
    """Bytes of a reply that are passed on at a time, with a turn of the loop between."""
    reply_budget: int | None = None
    """Bytes of replies that are still passed on; the one that exceeds it ends its connection."""
    intolerable: bytes | None = None
    """What ends the connection of a client that sends it."""
    replies_to_lose = 0
    """So many of the next reads from the server are lost, and end their connections."""
    fake_reply: bytes | None = None
    """Sent in place of each read from the server."""
    fake_replies: int | None = None
    """How many more of them are sent before the server's own come again; None is no limit."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._asking = asyncio.Event()
        self._asking.set()
        self._answering = asyncio.Event()
        self._answering.set()
        self._allowed = 0  # bytes to each client while replies are held
        self._sent: Counter[asyncio.StreamWriter] = Counter()  # since then
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.refuse()

    @property
    def open(self) -> int:
        """The number of connections that are open now."""
        return len(self._connections)

    async def settles(self, connections: int) -> None:
        """Wait until so many connections are open."""
        await until(lambda: self.open == connections)

    async def listen(self) -> None:
        """Accept connections, at first or again after `refuse`."""
        port = getattr(self, "port", 0)
        self._listener = await asyncio.start_server(self._accept, HOST, port)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Refuse new connections and cut all that are open."""
        self._listener.close()
        await self.cut()

    async def cut(self) -> None:
        """Cut all open connections."""
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def hold_requests(self) -> None:
        """Pass no more requests on, but keep the connections."""
        self._asking.clear()

    def resume_requests(self) -> None:
        """Pass on the requests that were held back, and those that come."""
        self._asking.set()

    def hold(self, after: int = 0) -> None:
        """Pass no more replies on, but keep the connections.

        :param after: bytes of replies that each connection still passes on; what it read from the
            server at once is not divided.
        """
        self._answering.clear()
        self._allowed = after
        self._sent.clear()

    def resume(self) -> None:
        """Pass on the replies that were held back, and those that come."""
        self._answering.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.ensure_future(self._forward(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _forward(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            server, to_server = await asyncio.open_connection(HOST, self._server_port)
        except OSError:
            to_client.close()
            return
        pumps = [
            asyncio.ensure_future(self._pass_requests(client, to_server)),
            asyncio.ensure_future(self._pass_replies(server, to_client)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            to_client.close()
            to_server.close()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pass_requests(
        self, client: asyncio.StreamReader, server: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await client.read(2**16):
                if self.intolerable is not None and self.intolerable in data:
                    return
                self.held_requests += 1
                try:
                    await self._asking.wait()
                finally:
                    self.held_requests -= 1
                self.passed += 1
                server.write(data)
                await server.drain()

    async def _pass_replies(
        self, server: asyncio.StreamReader, client: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await server.read(self.fragment):
                if self.replies_to_lose:
                    self.replies_to_lose -= 1
                    return
                if self._sent[client] >= self._allowed:
                    self.held_replies += 1
                    try:
                        await self._answering.wait()
                    finally:
                        self.held_replies -= 1
                self._sent[client] += len(data)
                if self.fake_reply is not None and self.fake_replies != 0:
                    data = self.fake_reply
                    if self.fake_replies is not None:
                        self.fake_replies -= 1
                exceeded = False
                if self.reply_budget is not None:
                    exceeded = len(data) > self.reply_budget
                    data = data[: self.reply_budget]
                    self.reply_budget -= len(data)
                client.write(data)
                await client.drain()
                if exceeded:
                    return
                if self.fragment < 2**16:
                    await asyncio.sleep(0)
