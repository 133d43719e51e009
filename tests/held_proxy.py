"""A proxy that holds the requests of single connections, as a network can, and releases late."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from tests.proxy import Proxy


class HeldProxy(Proxy):
    """A proxy whose connections to the server can be held one by one.

    What a client sends on a held connection waits here, also when the client has closed it by
    then, until it is released, or the server closes the connection.
    """

    def __init__(self, server_port: int) -> None:
        super().__init__(server_port)
        self._held: set[int] = set()
        self._released = asyncio.Event()
        self._numbers: dict[asyncio.StreamReader, int] = {}
        self._servers: dict[int, asyncio.StreamWriter] = {}
        self.keeps: Callable[[bytes], bool] = lambda data: True
        """Whether something is held where it comes; what comes behind it always is."""
        self.held = 0
        """The number of reads from clients that were ever held."""
        self._clients: dict[int, asyncio.StreamWriter] = {}
        self.waiting: dict[int, bytes] = {}
        """What is held, by the number of its connection (from 1, in the order of acceptance)."""

    def hold_requests(self) -> None:
        """Hold what comes from now on, on all the connections that are open."""
        self._held.update(range(1, self.accepted + 1))

    def release(self) -> None:
        """Let the server have all that is held, though the clients may be gone."""
        self._held.clear()
        for number, data in self.waiting.items():
            self._servers[number].write(data)
        self.waiting.clear()
        self._released.set()
        self._released = asyncio.Event()

    def cut_held(self) -> None:
        """Cut the connections of which something is held, as their client sees it."""
        for number in self.waiting:
            self._clients[number].transport.abort()

    async def holds(self, text: bytes) -> None:
        """Wait until something with this text is held."""
        while not any(text in data for data in self.waiting.values()):  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._numbers[reader] = self.accepted + 1  # here: several may be accepted at once
        await super()._accept(reader, writer)

    async def _forward(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        number = self._numbers[client]
        self._clients[number] = to_client
        await super()._forward(client, to_client)
        del self._clients[number]

    async def _pass_requests(
        self, client: asyncio.StreamReader, server: asyncio.StreamWriter
    ) -> None:
        number = self._numbers.pop(client)
        self._servers[number] = server
        try:
            with contextlib.suppress(OSError):
                while data := await client.read(2**16):
                    if number in self._held and (number in self.waiting or self.keeps(data)):
                        self.held += 1
                        self.waiting[number] = self.waiting.get(number, b"") + data
                        continue
                    self.passed += 1
                    server.write(data)
                    await server.drain()
            while number in self.waiting:
                await self._released.wait()
            with contextlib.suppress(OSError):
                await server.drain()
        finally:
            self.waiting.pop(number, None)
            del self._servers[number]
