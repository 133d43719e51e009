"""A proxy that holds the bytes of either direction, and delivers them late."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from tests.proxy import Proxy
from tests.waiting import until


class HeldProxy(Proxy):
    """A proxy that holds bytes of its connections, and drops no request.

    What a client sends on a held connection waits here until it is released, or the server closes
    the connection. The client may have closed the connection by then, or may have been told that
    it is gone: the server still gets each byte, and then the end of the stream.
    """

    def __init__(self, server_port: int) -> None:
        super().__init__(server_port)
        self._channels: dict[object, _Channel] = {}  # by the writer to the client
        self._of_new = False, False
        self.held = 0
        """How many chunks from clients the proxy has held, in whole or in part."""
        self.on_request: Callable[[], object] = lambda: None
        """Called with each read from a client, before it is passed on or held."""

    async def cut(self) -> None:
        """Cut all open connections, and drop what is held."""
        await super().cut()
        for channel in self._channels.values():  # of tasks that were cancelled before they began
            channel.lose_client()
        self._channels.clear()

    def hold_requests(self) -> None:
        """Hold what clients send from now on, on all the connections that are open."""
        self.hold_bytes(requests=True, replies=False)

    def hold_bytes(
        self, *, requests: bool, replies: bool, size: int = 0, on_new: bool = False
    ) -> None:
        """Hold what is sent from now on.

        :param size: bytes that each open connection still passes on in each direction.
        :param on_new: whether the connections that are made later are held as well.
        """
        for channel in self._channels.values():
            channel.hold(requests, replies, size)
        if on_new:
            self._of_new = requests, replies

    def release(self) -> None:
        """Deliver all that is held, though the clients may be gone, and hold no more."""
        self._of_new = False, False
        for channel in self._channels.values():
            channel.release()

    def release_one(self, number: int) -> None:
        """Release one connection, if the proxy holds any of its bytes."""
        if holding := [channel for channel in self._channels.values() if channel.is_holding]:
            holding[number % len(holding)].release()

    def cut_held(self) -> None:
        """Cut the connections of which something is held, as their client sees it."""
        for channel in self._channels.values():
            if channel.is_holding:
                channel.lose_client()

    @property
    def is_blocking(self) -> bool:
        """Whether a client may wait for something that is held."""
        return any(one.is_holding and not one.is_lost for one in self._channels.values())

    async def holds(self, text: bytes) -> None:
        """Wait until something with this text is held of what clients sent."""
        while not any(text in one.up.kept for one in self._channels.values()):  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def delivers(self) -> None:
        """Wait until the server has processed what it was sent by clients that are gone."""
        await until(
            lambda: not any(one.is_lost and not one.up.kept for one in self._channels.values())
        )

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._channels[writer] = channel = _Channel(writer)
        channel.hold(*self._of_new, 0)
        await super()._accept(reader, writer)

    async def _forward(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self._channels[client] = self._channels.pop(to_client)
        try:
            await super()._forward(client, to_client)
        finally:
            del self._channels[client]

    async def _pass_requests(
        self, client: asyncio.StreamReader, server: asyncio.StreamWriter
    ) -> None:
        channel = self._channels[client]
        channel.up.writer = server
        with contextlib.suppress(OSError):
            while data := await client.read(2**16):
                self.on_request()
                if channel.up.send(data):
                    self.passed += 1
                else:
                    self.held += 1
        channel.lose_client()
        channel.up.end()
        await asyncio.get_running_loop().create_future()  # until the server closes the connection

    async def _pass_replies(
        self, server: asyncio.StreamReader, client: asyncio.StreamWriter
    ) -> None:
        channel = next(one for one in self._channels.values() if one.to_client is client)
        to_client: Any = channel.down
        await super()._pass_replies(server, to_client)
        if not server.at_eof():
            channel.lose_client()
            with contextlib.suppress(OSError):
                while await server.read(2**16):
                    pass
        await until(lambda: not channel.down.kept)


class _Channel:
    """A connection of a client, and the one to the server."""

    def __init__(self, to_client: asyncio.StreamWriter) -> None:
        self.to_client = to_client
        self.up = _Stream()
        self.down = _Stream()
        self.down.writer = to_client
        self.is_lost = False
        """Whether the client is gone, or was told that the connection is gone."""

    @property
    def is_holding(self) -> bool:
        return bool(self.up.kept or self.down.kept)

    def hold(self, requests: bool, replies: bool, size: int) -> None:
        if requests:
            self.up.hold(size)
        if replies:
            self.down.hold(size)

    def release(self) -> None:
        self.up.release()
        self.down.release()

    def lose_client(self) -> None:
        self.is_lost = True
        self.to_client.transport.abort()
        self.down.writer = None
        self.down.release()


class _Stream:
    """One direction of a connection; it stands in for the writer."""

    def __init__(self) -> None:
        self.kept = bytearray()
        self.writer: asyncio.StreamWriter | None = None
        """The task that passes the bytes on; None if the receiver is gone."""
        self._is_held = False
        self._has_ended = False
        self._allowed = 0  # bytes that are still passed on

    def hold(self, size: int) -> None:
        if not self._is_held:
            self._is_held, self._allowed = True, size

    def release(self) -> None:
        self._is_held = False
        kept, self.kept = self.kept, bytearray()
        self.send(kept)
        if self._has_ended:
            self.end()

    def send(self, data: bytes | bytearray) -> bool:
        """Pass data on, or hold some of it; return whether everything was passed on."""
        passed = data
        if self._is_held:
            passed, self._allowed = data[: self._allowed], max(0, self._allowed - len(data))
            self.kept += data[len(passed) :]
        if passed and self.writer is not None:
            self.writer.write(passed)
        return len(passed) == len(data)

    def end(self) -> None:
        """End the stream behind what is held."""
        self._has_ended = True
        if not self.kept and self.writer is not None and not self.writer.is_closing():
            self.writer.write_eof()

    write = send

    async def drain(self) -> None:
        if self.writer is not None:
            await self.writer.drain()
