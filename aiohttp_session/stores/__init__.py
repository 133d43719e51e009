"""Where server storages keep their records: stores, and what may stand in front of one."""

from __future__ import annotations

import abc
from collections.abc import Awaitable, Callable, Hashable, Mapping


class UnsettledError(ConnectionError):
    """A write was either done or never will be, and it is unknown which.

    A store raises it only if the write can no longer be done late. The storage then looks at the
    record to see what became of it.
    """


class StoreUnavailableError(ConnectionError):
    """The store is down, so nothing was sent to it. ``__cause__`` is the last error seen."""


class Store(abc.ABC):
    """A store of records: bytes under a key that live for a number of seconds.

    Keys are printable ASCII without spaces, and at most 250 bytes. A TTL is in whole seconds, at
    least 1; None is for ever. Each operation is atomic, as other clients of the store see
    it. It is done once when it returns, and has failed when it raises; a write whose outcome is
    unknown raises `UnsettledError`, or whatever else the store's client raises.
    """

    timeout: float | None = None
    """Seconds after which an operation fails with TimeoutError; None if it always ends soon."""

    server_of: Callable[[str], Hashable] | None = None
    """Returns the name of the server that has a key, if several may fail one by one."""

    @abc.abstractmethod
    def read(self, key: str) -> Awaitable[bytes | None]:
        """Return the record under a key, or None if there is none."""

    def read_latest(self, key: str) -> Awaitable[bytes | None]:
        """Return the record under a key as it is now, even if reads may be a moment behind."""
        return self.read(key)

    @abc.abstractmethod
    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        """Store a record under a key, whether or not there is one."""

    @abc.abstractmethod
    async def update(self, key: str, payload: bytes, ttl: int | None) -> bool:
        """Replace a record; return False, and do nothing, if there is none."""

    @abc.abstractmethod
    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        """Replace a record if it is still the expected one; return whether it was.

        :param expected: None to store it only if there is no record.
        """

    @abc.abstractmethod
    async def delete(self, key: str) -> None:
        """Delete a record, if there is one."""

    def describe(self) -> Mapping[str, str | int]:
        """Describe the store in the terms of OpenTelemetry's conventions for databases.

        ``db.system.name``, and ``server.address`` and ``server.port`` if there is just one server.
        """
        return {"db.system.name": type(self).__name__}

    async def finish(self) -> None:  # noqa: B027 - most have nothing to finish
        """Wait for what is under way in this event loop, and let go of its connections."""
