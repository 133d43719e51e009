"""A proxy whose network keeps what was sent, and delivers it late."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import TYPE_CHECKING

from benchmarks.servers import HOST

if TYPE_CHECKING:
    from typing_extensions import Self


class HeldProxy:
    """Forwards connections to a memcached server on `HOST`; an async context manager."""

    port: int
    accepted = 0
    """The number of connections that were ever made to it."""
    replies_to_lose = 0
    """So many of the next reads from the server are lost, and their connections cut."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._tasks: set[asyncio.Task[None]] = set()
        self._channels: set[_Channel] = set()
        self._held: list[_Channel] = []
        self._has_held = asyncio.Event()
        self._has_reply = asyncio.Event()
        self.passed = bytearray()
        """What the server was sent."""

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._forward, HOST, 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def hold(self) -> None:
        """Hold back what is sent from now on by the connections that are open now."""
        self._has_held.clear()
        for channel in self._channels:
            channel.is_held = True

    async def holds(self) -> None:
        """Wait until something is held back."""
        await self._has_held.wait()
        self._has_held.clear()

    def hold_replies(self) -> None:
        """Hold back what the server replies on the connections that are open now."""
        self._has_reply.clear()
        for channel in self._channels:
            channel.is_mute = True

    async def holds_reply(self, text: bytes) -> None:
        """Wait until a reply with this text is held back."""
        while not any(text in channel.replied for channel in self._channels):
            await self._has_reply.wait()
            self._has_reply.clear()

    def pass_reply(self, end: bytes) -> None:
        """Pass on what is held back of the replies, up to the first end of one, and hold the rest.

        The client's connections stay open, whatever has become of the server.
        """
        for channel in self._channels:
            reply, found, rest = bytes(channel.replied).partition(end)
            if found:
                channel.to_client.write(reply + found)
                channel.replied = bytearray(rest)

    def cut(self) -> None:
        """Cut the connections whose bytes are held back, as their client sees it."""
        for channel in self._channels:
            if channel.is_held or channel.is_mute:
                channel.to_client.transport.abort()

    def cut_others(self) -> None:
        """Cut the connections of which nothing is held back, as their client sees it."""
        for channel in self._channels:
            if not (channel.is_held or channel.is_mute):
                channel.to_client.transport.abort()

    async def release(self) -> None:
        """Deliver to the server what was held back, and wait until it was done."""
        held, self._held = self._held, []
        for channel in held:
            channel.to_client.transport.abort()
            self.passed += channel.kept
            channel.to_server.write(channel.kept)
            channel.to_server.write_eof()
            await channel.replies

    async def _forward(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        server, to_server = await asyncio.open_connection(HOST, self._server_port)
        channel = _Channel(to_client, to_server)
        channel.replies = asyncio.ensure_future(self._pass_replies(server, channel))
        self._channels.add(channel)
        try:
            with contextlib.suppress(ConnectionError):
                while data := await client.read(2**16):
                    if channel.is_held:
                        self._keep(channel, data)
                    else:
                        self.passed += data
                        to_server.write(data)
            self._channels.discard(channel)
            if not channel.kept:
                to_server.close()
            await channel.replies
        finally:
            channel.replies.cancel()
            to_server.close()
            to_client.close()
            self._channels.discard(channel)
            self._tasks.discard(task)

    def _keep(self, channel: _Channel, data: bytes) -> None:
        if not channel.kept:
            self._held.append(channel)
        channel.kept += data
        self._has_held.set()

    async def _pass_replies(self, server: asyncio.StreamReader, channel: _Channel) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await server.read(2**16):
                if self.replies_to_lose:
                    self.replies_to_lose -= 1
                    channel.to_client.transport.abort()
                elif channel.is_mute:
                    channel.replied += data
                    self._has_reply.set()
                else:
                    channel.to_client.write(data)


class _Channel:
    """One connection of a client's, and that to the server."""

    replies: asyncio.Task[None]

    def __init__(self, to_client: asyncio.StreamWriter, to_server: asyncio.StreamWriter) -> None:
        self.to_client = to_client
        self.to_server = to_server
        self.is_held = False
        self.kept = bytearray()  # for the server
        self.is_mute = False
        self.replied = bytearray()  # for the client
