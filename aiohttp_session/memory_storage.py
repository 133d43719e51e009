"""Sessions in the memory of this process."""

from __future__ import annotations

from ._options import Unpack, show_options
from .server_storage import ServerOptions, ServerStorage
from .stores.memory import MemoryStore


@show_options
class MemoryStorage(ServerStorage):
    """Keep sessions in this process, for development, tests and services of one process.

    They are gone when the process ends, and no other process sees them; its event loops may all
    use them, in whatever threads. Once there are too many, the least recently used go first.

    :param max_sessions: how many sessions are kept at most.
    :param max_bytes: how many bytes they take at most, as JSON and with their ids. A session
        that is larger by itself can't be saved, which is a ValueError.
    :raises ValueError: if max_sessions or max_bytes is not positive.

    Takes the options of `AbstractStorage`, `LifecycleStorage` and `ServerStorage` as well.
    """

    store: MemoryStore

    def __init__(
        self,
        *,
        max_sessions: int = 100_000,
        max_bytes: int = 100_000_000,
        **options: Unpack[ServerOptions],
    ) -> None:
        for name, limit in (("max_sessions", max_sessions), ("max_bytes", max_bytes)):
            if limit < 1:
                raise ValueError(f"{name} must be at least 1, not {limit!r}")
        super().__init__(MemoryStore(max_records=max_sessions, max_bytes=max_bytes), **options)

    def __len__(self) -> int:
        """Return the number of sessions, expired ones included until they are next asked for."""
        return len(self.store)

    def __bool__(self) -> bool:
        return True
