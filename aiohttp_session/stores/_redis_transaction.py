"""A record that is compared and replaced without a script: WATCH and MULTI on one connection."""

from __future__ import annotations

from typing import Any

from aiohttp_session._core import write_command, write_get, write_set

from ._redis_fence import exchange


async def swap_by_transaction(
    connection: Any, key: str, expected: bytes, payload: bytes, ttl: int | None
) -> Any:
    """Replace a record if it still is the expected one; two round trips.

    :param connection: a client's, that nobody else uses.
    :return: whether it was, or the server's error.
    :raises Exception: of the client's, if the connection is lost.
    """
    commands = [write_command(b"WATCH", key.encode()), write_get(key)]
    watching, record = await exchange(connection, commands)
    if isinstance(watching, Exception):
        return watching
    if record != expected:
        await exchange(connection, [write_command(b"UNWATCH")])
        return record if isinstance(record, Exception) else False
    commands = [
        write_command(b"MULTI"),
        write_set(key, payload, ttl, b""),
        write_command(b"EXEC"),
    ]
    _, queued, done = await exchange(connection, commands)
    if isinstance(queued, Exception):
        return queued
    return done if isinstance(done, Exception) else done is not None
