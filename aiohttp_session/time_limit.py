"""One time limit for something that takes several operations."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from time import monotonic

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:  # pragma: no cover - Python 3.10
    from async_timeout import timeout


@contextlib.asynccontextmanager
async def time_limit(seconds: float | None, since: float) -> AsyncIterator[None]:
    """Fail what is inside with TimeoutError when its time is up.

    :param seconds: how long it may take; None for as long as it likes.
    :param since: when it began, by `time.monotonic`.
    """
    if seconds is None:
        yield
        return
    try:
        async with timeout(since + seconds - monotonic()):
            yield
    except asyncio.TimeoutError as error:  # Python 3.10 has two of them
        raise timed_out(seconds) from error


def timed_out(seconds: float) -> TimeoutError:
    """Return the error of an operation that took too long."""
    return TimeoutError(f"The session store did not answer within {seconds:g} seconds")
