"""The keys of records: a cookie's name and a session id."""

from __future__ import annotations

import hashlib
import os
from weakref import WeakSet

from ._core import join_token

_LIMIT = 250  # bytes: memcached's


def random_id() -> str:
    """Return 128 random bits in hex (OWASP ASVS 5.0, 7.2.3)."""
    return os.urandom(16).hex()


class RecordKeys:
    """What turns session ids into keys: ``cookie_name + "_" + id``.

    :param hashed: take the SHA-256 of an id, in hex, in its place.
    """

    def __init__(self, cookie_name: str, *, hashed: bool) -> None:
        self._name = cookie_name
        self._prefix = f"{cookie_name}_"
        self.is_hashed = hashed
        self._room = _LIMIT - len(self._prefix)  # for an id
        # With the names N and N_ADMIN in one store, nobody may get at N_ADMIN_1 as N's id ADMIN_1.
        self._foreign: tuple[str, ...] = ()
        for other in list(_in_use):
            self._keep_apart(other)
            other._keep_apart(self)
        _in_use.add(self)

    def find(self, identity: str) -> str | None:
        """Return the key of a session id; None for a text that can't be one, in any store."""
        key = join_token(self._prefix, identity, self._room)  # as nearly all are
        if key is None:
            if not self.is_possible(identity):
                return None
            key = f"{self._prefix}{identity}"
        if self.is_hashed:
            return self.known(identity)
        if self._foreign and identity.startswith(self._foreign):
            return None
        return key

    def known(self, identity: object) -> str:
        """Return the key of a session id that has been looked at by `find` or `get`."""
        if self.is_hashed:
            identity = hashlib.sha256(str(identity).encode("ascii")).hexdigest()
        return f"{self._prefix}{identity}"

    def get(self, identity: object) -> str:
        """Return the key of a session id.

        :raises ValueError: for what can't be one.
        """
        key = self.find(str(identity))
        if key is None:
            raise ValueError(
                "A session id must be printable ASCII without spaces, and at most "
                f"{self._room} characters, and no key of another cookie's "
                "sessions; see key_factory"
            )
        return key

    def tail(self, identity: object) -> str:
        """Return what follows the cookie's name in the key of a session id."""
        return self.get(identity)[len(self._prefix) :]

    def at(self, tail: str) -> str:
        """Return the key with this tail."""
        return f"{self._prefix}{tail}"

    def of_owner(self, owner: str) -> str:
        """Return the key of the index of a user's sessions."""
        digest = hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()
        return f"{self._name}@{digest}"

    def is_possible(self, tail: str) -> bool:
        """Tell whether a text can be part of a key, in any store."""
        if len(tail) > self._room or not tail.isascii():
            return False
        return tail.isprintable() and " " not in tail and "../" not in tail and tail != ""

    def overlaps(self, other: RecordKeys) -> bool:
        """Tell whether an id of one may look like a key of the other."""
        return self._rest(other) is not None or other._rest(self) is not None

    def _rest(self, other: RecordKeys) -> str | None:
        if self.is_hashed or not other._name.startswith(self._prefix):
            return None
        return other._name[len(self._prefix) :]

    def _keep_apart(self, other: RecordKeys) -> None:
        rest = self._rest(other)
        if rest is not None:
            self._foreign = tuple({*self._foreign, f"{rest}_", f"{rest}@"})


_in_use: WeakSet[RecordKeys] = WeakSet()
