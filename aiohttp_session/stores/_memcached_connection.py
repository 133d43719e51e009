"""One connection to memcached: a stream of commands, and the stream of their replies."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from aiomcache import ClientException

from aiohttp_session._core import FutureGroup

from ._memcached_protocol import Command, ConnectionLostError, Retrieval

_LINE_LIMIT = 2048  # bytes: a longer line is no reply of memcached's

AnyCommand: TypeAlias = Retrieval | Command


class Connection(asyncio.Protocol):
    """A connection that is being opened, or is open.

    :param siblings: the list that it is in until it fails.
    :param timeout: seconds that opening it may take. When it owes a reply for half of the time
        that the command had left, it is given up, so that there is time left for another.
    :param futures: that the commands' futures are of.
    :param fail: gets the commands without an answer when it fails, and the error.
    :param forget: is called when it fails.
    """

    opening: asyncio.Task[None]

    def __init__(
        self,
        siblings: list[Connection],
        timeout: float,
        futures: FutureGroup,
        fail: Callable[[AnyCommand, Exception], None],
        forget: Callable[[], None],
    ) -> None:
        self._siblings = siblings
        siblings.append(self)
        self._timeout = timeout
        self._futures = futures
        self._fail_command = fail
        self._forget_versions = forget
        self.awaited: deque[AnyCommand] = deque()
        """What is not answered, in the order in which it was sent."""
        self.used = math.inf
        """The loop's time when it was last written to, once it is open."""
        self._transport: asyncio.Transport | None = None
        self._unsent: list[bytes] = []  # until it is open
        self._payload = 0  # bytes of records that were sent and are not answered
        self._received: list[bytes] = []  # of an incomplete reply
        self._size = 0  # of that
        self._expected = 0  # size from which on it may be complete

    @property
    def is_usable(self) -> bool:
        return self._transport is None or not self._transport.is_closing()

    def is_prompt(self, now: float) -> bool:
        """Tell whether it is usable, and owes no reply for so long that another is better."""
        if self._transport is None:
            return True
        if self._transport.is_closing():
            return False
        return not self.awaited or now - self.awaited[0].sent < min(1.0, self._timeout / 10)

    @property
    def backlog(self) -> int:
        """Bytes of records that are known to be under way, in either direction."""
        return self._payload + self._expected

    @property
    def due(self) -> float:
        """The loop's time at which `expire` has something to do."""
        if not self.awaited:
            return math.inf
        return min(self._given_up, *(command.deadline for command in self.awaited))

    def send(self, commands: list[AnyCommand], now: float) -> None:
        """Write commands in one go, or have them written once the connection is open."""
        for command in commands:
            command.sent = now
            self._payload += command.size
        self.awaited += commands
        data = b"".join([command.data for command in commands])
        if self._transport is None:
            self._unsent.append(data)
        else:
            self.used = now
            self._transport.write(data)

    def expire(self, now: float) -> None:
        """Fail the commands whose time is up; give the connection up if it stalls."""
        for command in self.awaited:
            if command.deadline <= now:
                command.deadline = math.inf
                command.settle(
                    TimeoutError(f"memcached did not answer within {self._timeout:g} seconds")
                )
        if self.awaited and self._given_up <= now:
            kind = TimeoutError if self._transport is None else ConnectionLostError
            self.fail(kind("memcached did not answer in time"))

    def close_idle(self) -> None:
        """Close the siblings that are idle since this one was asked what it has not answered.

        A network that has forgotten one connection may have forgotten all.
        """
        for sibling in list(self._siblings) if self.awaited else ():
            if not sibling.awaited and sibling.used < self.awaited[0].sent:
                sibling.fail(ConnectionAbortedError("It was not known to be alive"))

    def fail(self, error: Exception) -> None:
        """Take no more commands, and give up those that are not answered."""
        self.close_idle()
        self._forget_versions()
        if self in self._siblings:
            self._siblings.remove(self)
        if self._transport is None:
            self.opening.cancel()
        else:
            self._transport.abort()
        while self.awaited:
            self._fail_command(self.awaited.popleft(), error)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.used = self.opening.get_loop().time()
        if self in self._siblings:
            self._transport.write(b"".join(self._unsent))  # type: ignore[union-attr]
        else:
            self._transport.abort()  # type: ignore[union-attr]

    def data_received(self, data: bytes) -> None:
        if self._received:
            self._received.append(data)
            self._size += len(data)
            if self._size < self._expected:
                return
            data = b"".join(self._received)
        self._futures.hold()
        try:
            position = self._read(data)
        except (ValueError, LookupError):
            self.fail(ClientException("memcached sent what is no reply to the commands it got"))
        except ClientException as error:
            self.fail(error)
        else:
            self._size = len(data) - position
            self._received = [data[position:]] if self._size else []
        finally:
            self._futures.release()

    def connection_lost(self, exc: Exception | None) -> None:
        error = ConnectionLostError("memcached closed the connection")
        error.__cause__ = exc
        self.fail(error)

    @property
    def _given_up(self) -> float:
        oldest = self.awaited[0]
        if self._transport is None:
            return oldest.sent + self._timeout
        left = min(oldest.deadline - oldest.sent, self._timeout)
        # One that was sent late says little about the connection.
        return oldest.sent + max(left / 2, self._timeout / 8)

    def _read(self, data: bytes) -> int:
        """Read the replies that are complete, and return the position after them.

        :raises ValueError, LookupError, ClientException: if the stream can't be trusted any more.
        """
        self._expected = position = 0
        while position < len(data):
            command = self.awaited[0]
            position, is_complete = command.read(data, position)
            if not is_complete:
                self._expected = command.expected
                if not self._expected and len(data) - position > _LINE_LIMIT:
                    raise ValueError
                break
            self.awaited.popleft()
            self._payload -= command.size
        return position
