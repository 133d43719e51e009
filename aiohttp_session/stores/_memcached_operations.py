"""A store's operations as commands to memcached: each is done once, or known to have failed.

A command whose connection was lost may have been done, and while the network holds its bytes it
may be done at any later time: memcached can't be told to refuse it. So each is one that does no
harm then, and says what became of it if it is sent again:

- A record is replaced by ``cas`` alone, which names the version to replace by the token that came
  with it. Versions never come back. A ``cas`` that is late, be it a duplicate or not, finds
  another one and does nothing, as does one that is late for a record deleted or made anew.
- So a ``cas`` may be sent again, with the same token. If that does nothing either, then the first
  was done, or never will be: if the record is the one that was to be stored, it was, and otherwise
  nobody can tell (`UnsettledError`).
- An ``add`` is never sent again: done late, it would bring back a session that was deleted since.
  If the record is there, it was done, and otherwise it has failed: by its error nobody knows the
  new id, and should it be done late, nobody finds the record.
- A ``delete`` may be sent again. Done late it could hurt only a record made anew under the same
  key, which random ids don't have.
- Reads may be repeated (`Client` does).

All steps of an operation share its time limit. One that is cancelled sends nothing more.
"""

from __future__ import annotations

import asyncio

from . import UnsettledError
from ._memcached_client import Client
from ._memcached_protocol import EXISTS, STORED, ConnectionLostError


class Operations:
    """The operations of a store on a client; expiries are as memcached takes them."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def read(self, key: bytes) -> asyncio.Future[bytes | None]:
        return self._client.get(key)

    async def create(self, key: bytes, payload: bytes, expiry: int) -> None:
        deadline = self._client.deadline()
        while not await self._add(key, payload, expiry, deadline):
            if await self._replace(key, payload, expiry, deadline, None):
                return

    async def update(self, key: bytes, payload: bytes, expiry: int) -> bool:
        token = self._client.take_token(key)
        return await self._replace(key, payload, expiry, self._client.deadline(), token)

    async def swap(self, key: bytes, expected: bytes, payload: bytes, expiry: int) -> bool:
        deadline = self._client.deadline()
        record, token = await self._client.gets(key, deadline)
        if record != expected:
            return False
        return await self._cas(key, payload, expiry, deadline, token) == STORED

    async def delete(self, key: bytes) -> None:
        deadline = self._client.deadline()
        try:
            await self._client.delete(key, deadline)
        except ConnectionLostError:
            await self._client.delete(key, deadline)

    async def finish(self) -> None:
        await self._client.finish()

    async def _add(self, key: bytes, payload: bytes, expiry: int, deadline: float) -> bool:
        """Store a record if there is none; return whether it was."""
        try:
            reply = await self._client.store(b"add", key, payload, expiry, deadline)
        except ConnectionLostError:
            record, _ = await self._client.gets(key, deadline)
            if record != payload:
                raise
            return True
        return reply == STORED

    async def _replace(
        self, key: bytes, payload: bytes, expiry: int, deadline: float, token: bytes | None
    ) -> bool:
        """Replace a record, whatever version of it there is; return False if there is none."""
        while True:
            if token is None:
                record, token = await self._client.gets(key, deadline)
                if record is None:
                    return False
            reply = await self._cas(key, payload, expiry, deadline, token)
            if reply != EXISTS:
                return reply == STORED
            token = None

    async def _cas(
        self, key: bytes, payload: bytes, expiry: int, deadline: float, token: bytes
    ) -> bytes:
        """Replace a version of a record; return the reply.

        :raises UnsettledError: if it may have been done, and can't be done any more.
        """
        try:
            return await self._client.store(b"cas", key, payload, expiry, deadline, token)
        except ConnectionLostError:
            reply = await self._client.store(b"cas", key, payload, expiry, deadline, token)
        if reply != STORED:
            record, _ = await self._client.gets(key, deadline)
            if record != payload:
                raise UnsettledError(
                    "The connection to memcached was lost, and another program changed or deleted "
                    "the session meanwhile: whether it was stored before that is not known"
                )
        return STORED
