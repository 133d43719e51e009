"""Writes whose outcome may be unknown: they are looked up, never just repeated.

A store raises `UnsettledError` for a write that was either done or never will be. To repeat it
could undo what somebody else has written since; so the record is looked at first.
"""

from __future__ import annotations

import random
from asyncio import sleep

from .stores import Store, UnsettledError

ATTEMPTS = 100
"""How often a record that others keep changing is tried to be changed."""
MARK_TTL = 60  # seconds: a mark must outlive the requests that have read the record before
MOVED = b'{"moved":'
"""How the mark begins that stays under the former id of a session; nothing follows it."""


class ConflictError(RuntimeError):
    """A session could not be saved, because other requests kept changing its record."""


async def pause(attempt: int) -> None:
    """Wait a little before the next attempt, the longer the more there were."""
    await sleep(random.uniform(0, 0.001 * min(attempt, 20)))  # noqa: S311


def is_ended(record: bytes | None) -> bool:
    """Tell whether a session is no longer where this record is, or was."""
    return record is None or record.startswith(MOVED)


async def settle(
    store: Store, key: str, record: bytes, payload: bytes, ttl: int | None, error: UnsettledError
) -> bool:
    """Replace a record, as was tried before, unless that has worked.

    :param record: the record as it was seen last, before this was tried.
    :return: False if the session was ended meanwhile.
    :raises UnsettledError: if somebody else has replaced the record, before or after.
    """
    if await store.swap(key, record, payload, ttl):
        return True
    found = await store.read(key)
    if is_ended(found):
        return False
    if found != payload:
        raise error
    return True


async def swap(
    store: Store, key: str, record: bytes | None, payload: bytes, ttl: int | None
) -> bytes | None:
    """Replace a record if it has not changed.

    :param record: None if there was none.
    :return: the very payload if that is there now; else the record that is; None if the session
        was ended meanwhile.
    :raises UnsettledError: if that can't be told.
    """
    unsettled = None
    try:
        if await store.swap(key, record, payload, ttl):
            return payload
    except UnsettledError as error:
        unsettled = error
    found = await store.read(key)
    if unsettled is not None and found == payload:
        return payload
    if found is None or is_ended(found):
        return None
    if unsettled is not None and found != record:
        raise unsettled
    return found


async def mark(store: Store, key: str, text: bytes) -> bytes | None:
    """Put a mark in place of a record, whatever that is; return None if there is none."""
    try:
        return text if await store.update(key, text, MARK_TTL) else None
    except UnsettledError:
        if await store.read(key) == text:
            return text
        return text if await store.update(key, text, MARK_TTL) else None
