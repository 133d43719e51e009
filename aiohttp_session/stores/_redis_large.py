"""Which records are large: they don't travel with others."""

from __future__ import annotations

from ._redis_pipeline import LARGE

_KEPT = 1000  # keys


class LargeRecords(dict[str, int]):
    """The sizes of the large records that were read or written last, by key."""

    def note(self, key: str, size: int = 0) -> int:
        """Take down the size of a record if it is large.

        :param size: bytes; 0 for the size that is known.
        :return: the size, or 0 if it isn't known.
        """
        size = size or self.get(key, 0)
        self.pop(key, None)
        if size > LARGE:
            self[key] = size
            if len(self) > _KEPT:
                del self[next(iter(self))]
        return size
