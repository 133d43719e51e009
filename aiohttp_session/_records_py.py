"""Records that a process keeps as long as it is told of changes: the reference implementation."""

from __future__ import annotations

from collections import OrderedDict
from time import monotonic
from typing import TypeAlias, final

__all__ = ("KeptRecords",)

MAX_SIZE = 32 * 1024  # bytes: a larger record is not kept

Token: TypeAlias = list[str]
"""Stands for an answer that is due; holds its key. It is the object that counts."""


class Link:
    """A connection that tells of changes to the records that were read through it."""

    until: float = 0.0
    """When it is not to be relied upon any more (monotonic time), unless it shows life before."""


@final
class KeptRecords:
    """The records that one event loop keeps, the least recently used first.

    An answer is kept only if nothing can have changed the record since it was asked for: whoever
    asks gets a token for that, which every change makes worthless.

    :param max_records: how many are kept at most.
    :param max_bytes: how many bytes they take at most, keys included.
    """

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self.by_key: OrderedDict[str, tuple[bytes, Link]] = OrderedDict()
        self.bytes: int = 0
        self.hits: int = 0
        self.misses: int = 0
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._tokens: dict[str, Token] = {}  # of the answers that are due, by key
        self._changing: dict[str, int] = {}  # changes by other ways than the answers', by key

    def get(self, key: str) -> bytes | None:
        """Return a record that is kept, if it is to be relied upon."""
        kept = self.by_key.get(key)
        if kept is None or monotonic() >= kept[1].until:
            self.misses += 1
            return None
        self.by_key.move_to_end(key)
        self.hits += 1
        return kept[0]

    def ask(self, key: str) -> Token | None:
        """Return a token for an answer that is about to be asked for; None if it can't be kept."""
        return None if key in self._changing else self._tokens.setdefault(key, [key])

    def ask_behind(self, key: str) -> Token | None:
        """Return a token for a question right behind a change, by the same way; None as `ask`.

        Nothing that was asked for before is kept.
        """
        self.drop(key)
        if key in self._changing:
            return None
        token = self._tokens[key] = [key]
        return token

    def keep(self, token: Token, payload: bytes | None, link: Link | None) -> None:
        """Keep an answer if its token is still good, and it isn't too large.

        :param payload: None for what is not to be kept.
        :param link: what it came by; None if that is not to be relied upon.
        """
        [key] = token
        if self._tokens.get(key) is not token:
            return
        del self._tokens[key]
        self.drop(key)
        if payload is None or link is None or len(payload) > MAX_SIZE:
            return
        self.by_key[key] = payload, link
        self.bytes += len(key) + len(payload)
        while self.bytes > self._max_bytes or len(self.by_key) > self._max_records:
            self.drop(next(iter(self.by_key)))

    def forget(self, key: str) -> None:
        """Drop a record that was changed, and keep no answer that is due."""
        self._tokens.pop(key, None)
        self.drop(key)

    def drop(self, key: str) -> None:
        """Drop a record that was changed before any answer that is due was given."""
        kept = self.by_key.pop(key, None)
        if kept is not None:
            self.bytes -= len(key) + len(kept[0])

    def forget_link(self, link: Link) -> None:
        """Drop all that came by a connection, and keep no answer that is due."""
        self._tokens.clear()
        gone = [key for key, (_, other) in self.by_key.items() if other is link]
        if len(gone) == len(self.by_key):
            self.by_key.clear()
            self.bytes = 0
            return
        for key in gone:
            self.drop(key)

    def begin_change(self, key: str) -> None:
        """Drop a record that is about to be changed by another way than the answers come by.

        None is kept until that is over, as it may overtake them.
        """
        self.forget(key)
        self._changing[key] = self._changing.get(key, 0) + 1

    def end_change(self, key: str) -> None:
        """Take down that a change has been done, or has failed."""
        left = self._changing.pop(key) - 1
        if left:
            self._changing[key] = left
