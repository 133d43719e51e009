"""The package's logger."""

from __future__ import annotations

import logging
import math
import time

log: logging.Logger = logging.getLogger("aiohttp_session")


class RateLimited:
    """A line of the log that anybody may cause, as often as they like.

    :param seconds: it is logged once in so many; the next line counts those held back.
    """

    def __init__(self, level: int, message: str, *, seconds: float) -> None:
        self._level = level
        self._message = message
        self._seconds = seconds
        self._logged_at = -math.inf
        self._held_back = 0

    def log(self, *args: object) -> None:
        """Log the line, or count it."""
        now = time.monotonic()
        if now - self._logged_at < self._seconds:
            self._held_back += 1
            return
        self._logged_at = now
        message, held_back, self._held_back = self._message, self._held_back, 0
        if held_back:
            message, args = (
                f"{message} (and %d times more since the last such line)",
                (
                    *args,
                    held_back,
                ),
            )
        log.log(self._level, message, *args, stacklevel=2)
