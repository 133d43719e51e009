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
from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

from . import UnsettledError
from ._memcached_client import REPEATS, Client
from ._memcached_protocol import EXISTS, STORED, ConnectionLostError, encode_key, expiry


class Operations:
    """The operations of a store, on a client; see `Store`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._replacing: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()

    def read(self, key: str) -> asyncio.Future[bytes | None]:
        return self._client.get(encode_key(key))

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        name, expires = encode_key(key), expiry(ttl)
        deadline = self._client.deadline()
        while not await self._add(name, payload, expires, deadline):
            if await self._replace(name, payload, expires, deadline):
                return

    async def update(self, key: str, payload: bytes, ttl: int | None) -> bool:
        name, expires, deadline = encode_key(key), expiry(ttl), self._client.deadline()
        token = self._client.take_token(name)
        if token is None:
            return await self._replace(name, payload, expires, deadline)
        try:  # as `_cas` does, but for one call, of all operations in the one that is done most
            reply = await self._client.cas(name, payload, expires, deadline, token)
        except ConnectionLostError:
            reply = await self._repeat_cas(name, payload, expires, deadline, token)
        if reply == EXISTS:  # somebody else wrote since it was read, and this is the last write
            return await self._replace(name, payload, expires, deadline)
        return reply == STORED

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        name, deadline = encode_key(key), self._client.deadline()
        if expected is None:
            return await self._add(name, payload, expiry(ttl), deadline)
        record, token = await self._client.gets(name, deadline)
        if record != expected:
            return False
        return await self._cas(name, payload, expiry(ttl), deadline, token) == STORED

    async def delete(self, key: str) -> None:
        name, deadline = encode_key(key), self._client.deadline()
        try:
            await self._client.delete(name, deadline)
        except ConnectionLostError:
            await _repeat(lambda: self._client.delete(name, deadline))

    async def finish(self) -> None:
        await self._client.finish()

    async def _add(self, key: bytes, payload: bytes, expires: int, deadline: float) -> bool:
        """Store a record if there is none; return whether it was."""
        try:
            reply = await self._client.add(key, payload, expires, deadline)
        except ConnectionLostError:
            record, _ = await self._client.gets(key, deadline)
            if record != payload:
                raise
            return True
        return reply == STORED

    async def _replace(self, key: bytes, payload: bytes, expires: int, deadline: float) -> bool:
        """Replace whatever version of a record there is; return False if there is none."""
        # In turn, or of a hundred in this process each would fail a hundred times.
        async with self._replacing.setdefault(key, asyncio.Lock()):
            while True:
                record, token = await self._client.gets(key, deadline)
                if record is None:
                    return False
                if await self._cas(key, payload, expires, deadline, token) == STORED:
                    return True

    async def _cas(
        self, key: bytes, payload: bytes, expires: int, deadline: float, token: bytes
    ) -> bytes:
        """Replace a version of a record; return the reply, or what it would have been."""
        try:
            return await self._client.cas(key, payload, expires, deadline, token)
        except ConnectionLostError:
            return await self._repeat_cas(key, payload, expires, deadline, token)

    async def _repeat_cas(
        self, key: bytes, payload: bytes, expires: int, deadline: float, token: bytes
    ) -> bytes:
        """Replace a version of a record that may have been replaced already.

        :raises UnsettledError: if it may have been, and can't be any more.
        """
        reply = await _repeat(
            lambda: self._client.cas(key, payload, expires, deadline, token),
        )
        if reply != STORED:
            record, _ = await self._client.gets(key, deadline)
            if record != payload:
                raise UnsettledError(
                    "The connection to memcached was lost, and another program changed or deleted "
                    "the session meanwhile: whether it was stored before that is not known"
                )
        return STORED


async def _repeat(send: Callable[[], Awaitable[bytes]]) -> bytes:
    """Send a command again that was lost, as often as a read, and return the reply."""
    for _ in range(REPEATS - 1):
        try:
            return await send()
        except ConnectionLostError:
            pass
    return await send()
