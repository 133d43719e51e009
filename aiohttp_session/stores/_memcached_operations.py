"""A store's operations as commands to memcached.

A command whose connection was lost may have been applied, or be applied at any later time, since
memcached can't be told to refuse it. So each command is one that is harmless then:

- A record is replaced by ``cas`` alone, which names the version to replace by the token that came
  with the record. A late ``cas`` finds another version and has no effect. Tokens start anew when
  the server is restarted, so none is kept once a connection is lost.
- A ``set`` stores a record under a new id only, which nobody received if the ``set`` has failed.
- An ``add`` stores a record where there is none. Only the index of an owner, and an id that the
  application chose, may have had one before.
- A ``delete`` may be sent again, since the id of a deleted record is never used again.
- Reads may be repeated (`Client` does).

All steps of an operation share its time limit. An operation whose caller was cancelled sends
nothing more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp_session.log import log

from . import UnsettledError
from ._memcached_client import REPEATS, Client
from ._memcached_protocol import EXISTS, STORED, ConnectionLostError, encode_key, expiry

_NO_TOKEN = b"0"  # of a server that runs without cas


class Operations:
    """The operations of a store, on a client; see `Store`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._is_told = False

    def read(self, key: str) -> asyncio.Future[bytes | None]:
        return self._client.get(encode_key(key))

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        name, deadline = encode_key(key), self._client.deadline()
        try:
            await self._client.set(name, payload, expiry(ttl), deadline)
        except ConnectionLostError as error:
            raise _unsettled() from error

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        name, expires, deadline = encode_key(key), expiry(ttl), self._client.deadline()
        try:
            if expected is None:
                return await self._client.add(name, payload, expires, deadline) == STORED
            known = self._client.take_token(name, expected)
            if known is not None and known != _NO_TOKEN:
                reply = await self._client.cas(name, payload, expires, deadline, known)
                if reply != EXISTS:
                    return reply == STORED
            for _ in range(REPEATS):
                losses = self._client.losses
                record, token = await self._client.gets(name, deadline)
                if losses == self._client.losses:
                    break
            else:  # the server may have been restarted each time
                raise _unsettled()
            if record != expected:
                return False
            if token == _NO_TOKEN:
                return await self._replace(name, payload, expires, deadline)
            return await self._client.cas(name, payload, expires, deadline, token) == STORED
        except ConnectionLostError as error:
            raise _unsettled() from error

    async def _replace(self, name: bytes, payload: bytes, expires: int, deadline: float) -> bool:
        """Replace a record that was just read, on a server that has no versions."""
        if not self._is_told:
            self._is_told = True
            log.warning(
                "memcached runs without cas (-C): a record is read and then replaced. Of two "
                "requests that change a session at the same time, one may undo the other, and so "
                "may a write that the network delivers late"
            )
        return await self._client.replace(name, payload, expires, deadline) == STORED

    async def delete(self, key: str) -> None:
        name, deadline = encode_key(key), self._client.deadline()
        try:
            await self._client.delete(name, deadline)
        except ConnectionLostError:
            await _repeat(lambda: self._client.delete(name, deadline))

    async def finish(self) -> None:
        await self._client.finish()


def _unsettled() -> UnsettledError:
    return UnsettledError(
        "The connection to memcached was lost with a write in flight: it is unknown whether the "
        "write was applied"
    )


async def _repeat(send: Callable[[], Awaitable[bytes]]) -> bytes:
    """Send a command again that was lost, as often as a read, and return the reply."""
    for _ in range(REPEATS - 1):
        try:
            return await send()
        except ConnectionLostError:
            pass
    return await send()
