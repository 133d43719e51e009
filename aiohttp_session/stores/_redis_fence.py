"""Writes whose connection was lost are never done late: the server is told to forget it.

A network may hold what was written to a connection, and deliver it minutes after the connection
was given up. So before anything that follows is written elsewhere, the server is told to close
that connection (``CLIENT KILL``). After that the writes on it have been done, or never will be.

A connection is known by its id and its address, which the server tells when it is opened
(``CLIENT ID``, ``CLIENT INFO``). Both must fit: ids begin anew when a server is restarted, where
the lost connection is gone anyway. Only the same address can tell: after a failover nobody knows
what the old primary does, and its writes are errors. The same holds where a user may not use these
commands (ACL: ``+client|id +client|info +client|kill``).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp_session._core import write_command
from aiohttp_session.log import log

from ._redis_resp import is_reply

_LIMIT = 1000  # connections that are lost, and not yet forgotten by the server
_WHO = [write_command(b"CLIENT", b"ID"), write_command(b"CLIENT", b"INFO")]


@dataclass(eq=False)
class Client:
    """A connection, as its server knows it."""

    server: Any
    """The address of the server, as the socket has it."""
    identity: int
    address: bytes | None
    """The client's address; None if the server is too old to tell (before 6.2)."""
    is_forgotten: bool = False
    """The server has closed it, and does nothing more that was written to it."""

    def kill(self) -> bytes:
        """Write the command that closes this connection."""
        parts = [b"CLIENT", b"KILL", b"ID", b"%d" % self.identity]
        if self.address is not None:
            parts += [b"ADDR", self.address]
        return write_command(*parts)


class Fence:
    """Knows the connections to a server, and closes those that may still hold writes."""

    def __init__(self) -> None:
        self._clients: WeakKeyDictionary[Any, Client] = WeakKeyDictionary()
        self._lost: dict[Client, None] = {}
        self._is_refused = False

    async def open(self, connection: Any) -> Client | None:
        """Prepare a connection to be written to; return who it is, None if nobody can tell.

        :raises Exception: of the client's, if the connection is lost.
        """
        writer = getattr(connection, "_writer", None)
        if not isinstance(writer, asyncio.StreamWriter):
            return None  # as of a fake
        server = writer.get_extra_info("peername")
        client = self._clients.get(writer)
        commands = [] if client is not None or self._is_refused else list(_WHO)
        lost = [other for other in self._lost if other.server == server]
        commands += [other.kill() for other in lost]
        if not commands:
            return client
        replies = await exchange(connection, commands)
        if client is None and not self._is_refused:
            identity, info = replies[:2]
            if isinstance(identity, int):
                address = _find_address(info)
                client = self._clients[writer] = Client(server, identity, address)
            else:
                self._refuse()
        for other, reply in zip(lost, replies[len(replies) - len(lost) :], strict=True):
            if isinstance(reply, int):
                self._lost.pop(other, None)
                other.is_forgotten = True
            else:
                self._refuse()
        return client

    def lose(self, client: Client | None) -> None:
        """Note that writes may be under way on a connection that was given up."""
        if client is not None:
            self._lost[client] = None
            if len(self._lost) > _LIMIT:
                del self._lost[next(iter(self._lost))]

    def holds(self, client: Client | None) -> bool:
        """Tell whether writes on a lost connection have been done, or never will be."""
        return client is not None and client.is_forgotten

    def _refuse(self) -> None:
        if not self._is_refused:
            self._is_refused = True
            log.info(
                "Redis refuses CLIENT ID or CLIENT KILL: a write whose connection is lost is an "
                "error, and the network may still deliver it"
            )


async def exchange(connection: Any, commands: list[bytes]) -> list[Any]:
    """Do commands by a client's connection, one round trip; errors stand in place of replies.

    :raises Exception: of the client's, if the connection is lost.
    """
    await connection.send_packed_command(b"".join(commands))
    return [await _read(connection) for _ in commands]


async def _read(connection: Any) -> Any:
    try:
        return await connection.read_response(disable_decoding=True)
    except Exception as error:
        if not is_reply(error):
            raise
        return error


def _find_address(info: Any) -> bytes | None:
    fields = info.split() if isinstance(info, bytes) else []
    return next((field[5:] for field in fields if field.startswith(b"addr=")), None)
