"""A record that is compared and replaced without a script: WATCH and MULTI on one connection."""

from __future__ import annotations

from typing import Any

from aiohttp_session._core import write_command, write_get, write_set

from ._redis_resp import is_reply


async def swap_by_transaction(
    connection: Any, key: str, expected: bytes, payload: bytes, ttl: int | None
) -> Any:
    """Replace a record if it still is the expected one; three round trips.

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
    # Alone, or the record would be set unconditionally where MULTI is refused.
    [multi] = await exchange(connection, [write_command(b"MULTI")])
    if isinstance(multi, Exception):
        await exchange(connection, [write_command(b"UNWATCH")])
        return multi
    commands = [write_set(key, payload, ttl, b""), write_command(b"EXEC")]
    queued, done = await exchange(connection, commands)
    if isinstance(queued, Exception):
        return queued
    return done if isinstance(done, Exception) else done is not None


async def exchange(connection: Any, commands: list[bytes]) -> list[Any]:
    """Send commands by a client's connection, in one round trip; errors stand in for replies.

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
