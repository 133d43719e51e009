"""What a request changed in its session, and how that is applied to a newer record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ._core import Session
from .saving import MARK_TTL, Change, Replacement, emptied, is_ended


class Record(NamedTuple):
    """What a record says of a session."""

    items: dict[str, Any]
    max_age: int | None
    owner: str | None
    listed: int | None


class Changes:
    """What a request set and deleted.

    :param before: the record that its session was made of.
    """

    def __init__(self, before: Record, session: Session) -> None:
        self._before = before
        self._set = {
            name: value
            for name, value in session._mapping.items()
            if name not in before.items or not _is_same(value, before.items[name])
        }
        self._deleted = before.items.keys() - session._mapping.keys()

    def apply(self, session: Session, newer: Record) -> None:
        """Have a session hold what a newer record does, with these changes."""
        kept = {name: item for name, item in newer.items.items() if name not in self._deleted}
        session._mapping = {**kept, **self._set}
        if session._owner == self._before.owner:
            session._owner = newer.owner
            session._listed = None if newer.owner is None else (newer.owner, newer.listed)
        if session.max_age == self._before.max_age:
            session.max_age = newer.max_age


def _is_same(value: Any, other: Any) -> bool:
    """Tell whether two values are written alike: 1 and 1.0 and True are not."""
    if type(value) is str:
        return type(other) is str and value == other
    return repr(value) == repr(other)


class Merge(Change):
    """A change that applies what a request set and deleted to whatever record there is.

    :param base: the record that the session was made of.
    :param read_base: decodes the base, which is not changed.
    :param read: decodes a record.
    :param write: returns the payload of the session, and its TTL.
    """

    __slots__ = ("_base", "_changes", "_emptied", "_read", "_read_base", "_session", "_write")

    def __init__(
        self,
        session: Session,
        base: bytes,
        *,
        read_base: Callable[[bytes], Record],
        read: Callable[[bytes], Record],
        write: Callable[[Session], Replacement],
    ) -> None:
        self._session = session
        self._base = base
        self._read_base = read_base
        self._read = read
        self._write = write
        self._changes: Changes | None = None
        self._emptied: bytes | None = None

    def merge(self, record: bytes) -> None:
        """Have the session contain what a record does, with the changes."""
        if self._changes is None:
            if record == self._base:
                return
            self._changes = Changes(self._read_base(self._base), self._session)
        self._changes.apply(self._session, self._read(record))

    def _make(self, record: bytes | None) -> Replacement | None:
        if record is None or is_ended(record):
            return None
        self.merge(record)
        if not self._session.empty:
            return self._write(self._session)
        # The record of a session that was emptied stays for a while, so that the items of another
        # request find a record to be added to.
        self._emptied = self._emptied or emptied()
        return self._emptied, MARK_TTL
