"""The session: the reference implementation of ``_session_c``."""

from __future__ import annotations

import marshal
import time
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from ._owner import check_owner, is_owner
from ._payload_py import decode, encode

__all__ = ("Session", "fingerprint", "payload_of", "restore", "unsaved")

_SCALARS = frozenset((str, int, float, bool, type(None)))
_UNTAKEN: Any = object()  # in place of a fingerprint, while no container was handed out
_CONTAINERS = frozenset((list, tuple, dict, set, frozenset))


class Session(MutableMapping[str, Any]):
    """A user's session: a dict that knows whether it must be saved.

    Made by a storage; an application gets it from `get_session` or `new_session`.

    :param identity: the id under which a server storage keeps the session, or None.
    :param data: ``{"created": <Unix time>, "session": {...}}`` or None. An empty mapping makes a
        new session without an identity, so that nobody chooses the id of somebody else's session.
    :param new: whether the session did not come with the request.
    :param max_age: seconds after the last save at which the session expires; None means never.
    """

    __module__ = "aiohttp_session"  # its public name, for pickles and for readers

    _changed: bool
    _contents: dict[str, Any]
    _created: int
    _identity: Any | None
    _max_age: int | None
    _new: bool

    # What a storage needs to know at the save; class attributes, since they rarely differ.
    _ended: bytes | None = None
    """The record, as it was loaded, of the session that is to be ended at the save."""
    _fingerprint: bytes | None = None
    """What its containers held when it was made or last saved."""
    _issued: int | None = None
    """When the session was first saved, for an absolute lifetime."""
    _listed: tuple[str, int | None] | None = None
    """The owner in whose index a server storage has the session, and until when."""
    _owner: str | None = None
    _record: bytes | None = None
    """The payload that a server storage holds of the session, as it was loaded."""
    _renew: bool = False
    """The identity is to be replaced by a new one at the save."""
    _replaces: str | None = None
    """The cookie value of the earlier session that a new one replaces."""
    _touch: bool = False
    """Due for a save only to stay alive."""

    def __init__(
        self,
        identity: Any | None,
        *,
        data: Any | None,
        new: bool,
        max_age: int | None = None,
    ) -> None:
        mapping: dict[str, Any] = {}
        created = data.get("created", None) if data else None
        # Without a known age, a session is as old as Unix time.
        expired = max_age is not None and _now() - (created or 0) > max_age
        if data and not expired:
            mapping.update(data.get("session", None) or ())
        # A literal empty mapping is a record that was emptied: its id must not be used again.
        emptied = data == {}
        self._changed = False
        self._contents = mapping
        self._identity = None if emptied else identity
        self._new = new or emptied
        self._max_age = max_age
        self._created = _now() if self._new or created is None else created
        self._fingerprint = fingerprint(mapping)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} [new:{self.new}, changed:{self._changed}, "
            f"created:{self.created}] {self._contents!r}>"
        )

    @property
    def _mapping(self) -> dict[str, Any]:
        """What the session holds, for whoever may change it."""
        if not self._changed:
            _take_fingerprint(self)
        return self._contents

    @_mapping.setter
    def _mapping(self, value: dict[str, Any]) -> None:
        _take_fingerprint(self)
        self._contents = value

    @property
    def new(self) -> bool:
        """Whether the session did not come with the request."""
        return self._new

    @property
    def identity(self) -> Any | None:
        """The id under which a server storage keeps the session; None until it is first saved."""
        return self._identity

    @property
    def created(self) -> int:
        """Unix time in seconds of the creation or of the last change, whichever is later."""
        return self._created

    @property
    def empty(self) -> bool:
        """Whether the session has neither items nor an owner."""
        return not self._contents and self._owner is None

    @property
    def owner(self) -> str | None:
        """The application's name for the user whose session this is: 1 to 1,000 characters.

        Set it at login, and a server storage can list and end all sessions of this user; see
        `ServerStorage.sessions_of`. It is kept with the session, until it is set to None, or the
        session is cleared or invalidated.

        :raises TypeError: if it is set to anything but a str or None.
        :raises ValueError: if it is empty, or too long.
        """
        return self._owner

    @owner.setter
    def owner(self, value: str | None) -> None:
        if value is not None:
            check_owner(value)
            value = str(value)
        if value != self._owner:
            self._owner = value
            self._changed = True
            self._created = _now()

    @property
    def max_age(self) -> int | None:
        """Seconds after the last save at which the session expires; None means never."""
        return self._max_age

    @max_age.setter
    def max_age(self, value: int | None) -> None:
        self._max_age = value

    def changed(self) -> None:
        """Mark the session as changed, so that it is saved."""
        self._changed = True

    def invalidate(self) -> None:
        """Empty the session; its record and cookie are deleted when the response is sent.

        What is written afterwards is saved under a new id.
        """
        self._changed = True
        self._renew = True
        # What is written from here on is another session.
        self._ended = self._record
        self._issued = self._owner = self._record = None
        self._contents = {}

    def regenerate_id(self) -> None:
        """Keep the data, and give the session a new id. The former id stops working.

        Call this method at each login and whenever privileges change, so that an id that was
        planted or seen earlier is worthless (OWASP session management: renew the session id).
        """
        self._changed = True
        self._renew = True

    def set_new_identity(self, identity: Any | None) -> None:
        """Choose the id of a new session.

        :raises RuntimeError: if the session is not new.
        """
        if not self._new:
            raise RuntimeError("Can't change identity for a session which is not new")
        self._identity = identity

    def clear(self) -> None:
        """Empty the session and remove its owner; its record is deleted."""
        super().clear()
        self.owner = None

    def __len__(self) -> int:
        return len(self._contents)

    def __iter__(self) -> Iterator[str]:
        return iter(self._contents)

    def __contains__(self, key: object) -> bool:
        return key in self._contents

    def __getitem__(self, key: str) -> Any:
        value = self._contents[key]
        if self._fingerprint is _UNTAKEN and type(value) not in _SCALARS:
            _take_fingerprint(self)  # whoever has it may change it
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._contents[key] = value
        self._changed = True
        self._created = _now()

    def __delitem__(self, key: str) -> None:
        del self._contents[key]
        self._changed = True
        self._created = _now()

    def _needs_save(self) -> bool:
        """Tell whether the session must be saved, and note nested changes that nobody announced."""
        if self._changed or self._replaces is not None:
            if self._touch:
                self._created = _now()
            return True
        taken = self._fingerprint is not None and self._fingerprint is not _UNTAKEN
        if taken and self._fingerprint != fingerprint(self._contents):
            self._changed = True
        elif not self._touch:
            return False
        self._created = _now()
        return True

    def _was_saved(self) -> None:
        """Start over with looking for changes, after a save."""
        self._changed = self._renew = self._touch = False
        self._replaces = None
        self._fingerprint = fingerprint(self._contents)

    def __getstate__(self) -> dict[str, Any]:
        _take_fingerprint(self)
        state = {**self.__dict__, "_mapping": self._contents}
        del state["_contents"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def restore(payload: str | bytes, identity: Any | None, max_age: int | None) -> Session | None:
    """Make a session of a payload in the usual form: created, session and perhaps max_age.

    :param max_age: the session's, if the payload has none of its own.
    :return: None for any other payload, also for a damaged one and an expired session.
    """
    try:
        data = decode(payload)
    except (ValueError, RecursionError):
        return None
    if type(data) is not dict:
        return None
    created: Any = data.get("created")
    owner = listed = None
    if len(data) != 2:
        max_age = data.get("max_age", max_age)
        owner, listed = data.get("owner"), data.get("listed")
        if len(data) != 2 + sum(name in data for name in ("max_age", "owner", "listed")):
            return None
        if not ((owner is None or is_owner(owner)) and (listed is None or _is_time(listed))):
            return None
    stored = data.get("session")
    if not (_is_time(created) and type(stored) is dict):
        return None
    if max_age is not None and not (_is_time(max_age) and _now() - created <= max_age):
        return None
    session = Session.__new__(Session)
    session._changed = session._new = False
    session._created = created
    session._identity = identity
    session._contents = stored  # not a copy: nobody else has it
    session._max_age = max_age
    session._fingerprint = _UNTAKEN
    if owner is not None:
        session._owner, session._listed = owner, (owner, listed)
    return session


def payload_of(session: Session, max_age: int | None) -> bytes | None:
    """Write a session's payload in the usual form: created and session, as `restore` reads it.

    :param max_age: the storage's.
    :return: None for a session that is empty, or has more to say than that, or can't be written.
    """
    if type(session) is not Session or session._owner is not None or session._max_age != max_age:
        return None
    contents, created = session._contents, session._created
    if not (type(contents) is dict and contents and _is_time(created) and created >= 0):
        return None
    try:
        return b'{"created":%d,"session":%b}' % (created, encode(contents))
    except (TypeError, ValueError):
        return None


def unsaved(session: Any) -> Any:
    """Return what a request has as its session, if that must be saved; else None.

    It may also be None, or somebody's own object, as `get_session` allows.
    """
    if isinstance(session, Session):
        return session if session._needs_save() else None
    return session if getattr(session, "_changed", False) else None


def _take_fingerprint(session: Session) -> None:
    if session._fingerprint is _UNTAKEN:
        session._fingerprint = fingerprint(session._contents)


def fingerprint(mapping: dict[str, Any]) -> bytes | None:
    """Describe the containers among a session's values, so that a change inside shows.

    Other values can only change by being set, which the session sees.

    :return: None if there are no containers, else bytes that are equal for equal contents of
        equal types.
    """
    nested = [value for value in mapping.values() if type(value) not in _SCALARS]
    if not nested:
        return None
    try:
        # marshal has a limit of depth, but goes on with the next item there: it would take every
        # way through a circle of two branches. This ends at the first.
        plain = _is_json(nested)
    except RecursionError:
        plain = False
    return _write(nested) if plain else _describe(nested)


def _is_json(values: Iterable[Any]) -> bool:
    """Tell whether these are JSON's types.

    :raises RecursionError: if they are too deep, or hold a circle.
    """
    for value in values:
        kind: Any = type(value)
        if kind in _SCALARS:
            continue
        if kind is dict:
            inner = value.values()
        elif kind is list or kind is tuple:
            inner = value
        else:
            return False
        if not _is_json(inner):
            return False
    return True


def _write(tree: list[Any]) -> bytes:
    try:
        # Format 2 has no back references: the same contents always give the same bytes.
        # They are only compared, never loaded.
        return marshal.dumps(tree, 2)
    except ValueError:  # an odd key, or too deep
        return _describe(tree)


def _describe(nested: list[Any]) -> bytes:
    """Describe containers of whatever depth, with circles, and of values that JSON does not have.

    Each container is walked once, however many hold it.
    """
    parts: list[object] = []
    numbers: dict[int, int] = {}
    waiting: list[Any] = [nested]
    while waiting:
        value = waiting.pop()
        kind: Any = type(value)
        if kind in _CONTAINERS:
            number = numbers.setdefault(id(value), len(parts))
            is_new = number == len(parts)
            parts.append((kind.__name__, number, len(value)))
            if is_new:
                waiting += value
                if kind is dict:
                    waiting += value.values()
        else:
            try:
                parts.append(marshal.dumps(value, 2))
            except ValueError:
                parts.append(repr(value))
    return repr(parts).encode("utf-8", "backslashreplace")


def _is_time(value: Any) -> bool:
    return type(value) is int and -(2**53) < value < 2**53


def _now() -> int:
    return int(time.time())
