"""Where server storages keep their records: stores, and what may stand in front of one."""

from __future__ import annotations

import abc
from collections.abc import Awaitable, Callable, Hashable, Mapping


class UnsettledError(ConnectionError):
    """The outcome of a write is unknown: it may have been applied, or be applied at any later time.

    A store raises it when a connection is lost with a write in flight. The storage then reads the
    record and repeats the same swap, until the outcome is known.
    """


class StoreUnavailableError(ConnectionError):
    """The store is down, so nothing was sent to it. ``__cause__`` is the last error seen."""


class Store(abc.ABC):
    """A store of records: bytes under a key that live for a number of seconds.

    A store implements four verbs. Each is atomic, as other clients of the store see it. When a verb
    returns, it was applied once; when it raises, it failed, or its outcome is unknown. A network, a
    proxy or a paused process may deliver a write at any later time, also after the client was told
    that the connection is gone. The verbs are chosen so that a late write is harmless:

    ==========  ================================  ==============================================
    verb        effect                            effect if it is applied late
    ==========  ================================  ==============================================
    read        return the record                 none
    create      store a record under a new id     a record whose id nobody received
    swap        replace the expected record       none: the record is another one by then
    delete      remove the record                 none: an id is never used again
    ==========  ================================  ==============================================

    Keys are printable ASCII without spaces, and at most 250 bytes. A TTL is in whole seconds, at
    least 1; None means that the record does not expire.
    """

    timeout: float | None = None
    """Seconds after which an operation fails with TimeoutError; None if each one ends soon."""

    reads_locally: bool = False
    """Whether reads may be answered in this process, without asking a server."""

    server_of: Callable[[str], Hashable] | None = None
    """Returns the name of the server that has a key, if several may fail one by one."""

    @abc.abstractmethod
    def read(self, key: str) -> Awaitable[bytes | None]:
        """Return the record under a key, or None if there is none."""

    def read_latest(self, key: str) -> Awaitable[bytes | None]:
        """Return the record under a key as it is now, even if `read` may be a moment behind."""
        return self.read(key)

    @abc.abstractmethod
    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        """Store a record under a key.

        The storage calls it for new random ids only, so there is no record yet; the store need not
        check that.
        """

    @abc.abstractmethod
    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        """Replace a record if it is exactly the expected one; return whether it was.

        :param expected: None to store the payload only if there is no record.
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
