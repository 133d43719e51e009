"""What a request changed in its session, and how that is applied to a newer record."""

from __future__ import annotations

from typing import Any, NamedTuple

from ._core import Session


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
            if name not in before.items or repr(value) != repr(before.items[name])
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
