"""memcached's text protocol: commands, and what they make of their replies.

See ``doc/protocol.txt`` of memcached.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, TypeAlias

from aiomcache import ClientException

from aiohttp_session._core import FutureGroup, quote, read_values

from .batch import duplicate

_RELATIVE_LIMIT = 30 * 24 * 60 * 60  # seconds: memcached takes a longer expiry for a Unix time
_KEY_LIMIT = 250  # bytes

STORED = b"STORED"
EXISTS = b"EXISTS"

_REPLIES = {
    b"set": (STORED,),
    b"add": (STORED, b"NOT_STORED"),
    b"replace": (STORED, b"NOT_STORED"),
    b"cas": (STORED, EXISTS, b"NOT_FOUND"),
    b"delete": (b"DELETED", b"NOT_FOUND"),
    b"version": (),
}
_ERRORS = (b"SERVER_ERROR ", b"CLIENT_ERROR ", b"ERROR")

Waiters: TypeAlias = dict[bytes, list["asyncio.Future[Any]"]]
Versions: TypeAlias = dict[bytes, tuple[bytes, bytes]]  # records and their tokens, by key


class ConnectionLostError(ConnectionResetError):
    """A connection was lost, or given up, after a command was sent on it.

    The command may have been done, it may be done yet, or never.
    """


def encode_key(key: str) -> bytes:
    """Write a key as memcached takes it.

    :raises ValueError: if it can't have it.
    """
    if len(key) > _KEY_LIMIT or quote(key) is None or " " in key:
        raise ValueError(
            "A memcached key is printable ASCII without spaces, and at most "
            f"{_KEY_LIMIT} characters; this one has {len(key)}"
        )
    return key.encode("ascii")


def expiry(ttl: int | None) -> int:
    """Write a TTL as memcached takes it."""
    if ttl is None:
        return 0
    return ttl if ttl <= _RELATIVE_LIMIT else int(time.time()) + ttl


class Retrieval:
    """A ``gets`` of one or more keys, and those who wait for the records.

    :param versions: takes the records and their tokens. Without it the waiters get these pairs; of
        None and nothing, if there is none.
    :param deadline: the loop's time at which it fails.
    """

    __slots__ = ("_versions", "_waiters", "deadline", "expected", "repeats", "sent")
    size = 0

    def __init__(self, waiters: Waiters, versions: Versions | None, deadline: float) -> None:
        self._waiters = waiters
        self._versions = versions
        self.deadline = deadline
        self.sent = 0.0
        """The loop's time."""
        self.expected = 0
        """Bytes from the beginning of an incomplete record to its end."""
        self.repeats = 0

    @property
    def data(self) -> bytes:
        return b"gets %b\r\n" % b" ".join(self._waiters)

    def read(self, data: bytes, position: int) -> tuple[int, bool]:
        """Hand out the records of a reply, or of the rest of one, from a position on.

        :return: the position after what is complete, and whether the reply is.
        :raises ValueError, LookupError, ClientException: if it is no such reply.
        """
        self.expected = 0
        versions, take = self._versions, self._waiters.pop
        while True:
            values, position = read_values(data, position)
            for key, value, token in values:
                result: object = value
                if versions is None:
                    result = value, token
                else:
                    versions[key] = value, token
                for future in take(key):
                    if not future.done():
                        future.set_result(result)
            end = data.find(b"\r\n", position)
            if end < 0:
                return position, False
            line = data[position:end]
            if line == b"END":
                self.settle((None, b"") if versions is None else None)
                return end + 2, True
            stop = self._read_foreign(line, data, end + 2)
            if stop > len(data):
                self.expected = stop - position
                return position, False
            position = stop

    def settle(self, result: object) -> None:
        """Give all who still wait the same result, or exception."""
        for futures in self._waiters.values():
            for future in futures:
                _settle(future, result)

    def forget_cancelled(self) -> bool:
        """Leave out the keys that nobody waits for any more; return whether any is left."""
        self._waiters = {
            key: futures
            for key, futures in self._waiters.items()
            if not all(future.done() for future in futures)
        }
        return bool(self._waiters)

    def _read_foreign(self, line: bytes, data: bytes, start: int) -> int:
        """Read a record that another program wrote, or pass over one that isn't complete.

        :return: the position after it, which may be behind the end of the data.
        """
        if not line.startswith(b"VALUE "):
            raise ClientException("gets failed", line) if line.startswith(_ERRORS) else ValueError
        _, key, flags, digits, _ = line.split(b" ")
        size = int(digits)
        stop = start + size + 2
        if size < 0:
            raise ValueError
        if stop <= len(data):
            if flags == b"0" or data[stop - 2 : stop] != b"\r\n":
                raise ValueError
            # As aiomcache: somebody put something else than text here.
            for future in self._waiters.pop(key):
                _settle(future, ClientException("received flags without handler"))
        return stop


class Command:
    """Any other command, and the one who waits for the line that answers it.

    :param name: of ``set``, ``add``, ``replace``, ``cas``, ``delete`` and ``version``.
    :param size: bytes of its payload.
    :param deadline: the loop's time at which it fails.
    """

    __slots__ = ("_name", "data", "deadline", "future", "sent", "size")
    expected = 0

    def __init__(
        self,
        name: bytes,
        data: bytes,
        size: int,
        deadline: float,
        futures: FutureGroup,
    ) -> None:
        self._name = name
        self.data = data
        self.size = size
        self.deadline = deadline
        self.future: asyncio.Future[bytes] = futures.create_future()
        self.sent = 0.0

    def read(self, data: bytes, position: int) -> tuple[int, bool]:
        """Hand out the line that answers it, as `Retrieval.read` does the records."""
        end = data.find(b"\r\n", position)
        if end < 0:
            return position, False
        line = data[position:end]
        if line not in _REPLIES[self._name]:
            self.settle(self._understand(line))
        elif not self.future.done():
            self.future.set_result(line)
        return end + 2, True

    def settle(self, result: object) -> None:
        """Give the one who waits the result, or exception."""
        _settle(self.future, result)

    def _understand(self, line: bytes) -> bytes | Exception:
        if line == b"SERVER_ERROR object too large for cache":
            return ValueError(
                f"memcached refused a session of {self.size} bytes: its limit for a record is "
                "1 MB, unless its option -I says otherwise"
            )
        failure = ClientException(f"{self._name.decode()} failed", line)
        if line.startswith(b"SERVER_ERROR "):
            return failure
        if line.startswith(_ERRORS):
            raise failure
        if self._name == b"version" and line.startswith(b"VERSION "):
            return line
        raise ValueError


def _settle(future: asyncio.Future[Any], result: object) -> None:
    """Give a waiter its result or exception, unless it is gone."""
    if future.done():
        return
    if isinstance(result, Exception):
        # A copy, since each waiter that raises it adds a traceback of its own.
        future.set_exception(duplicate(result))
        future.exception()  # or asyncio complains when nobody is left to see it
    else:
        future.set_result(result)
