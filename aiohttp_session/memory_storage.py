"""Sessions in the memory of this process."""

from __future__ import annotations

from ._options import Unpack, show_options
from .server_storage import ServerOptions, ServerStorage
from .stores.memory import MemoryStore


@show_options
class MemoryStorage(ServerStorage):
    """Keep sessions in this process, for development, tests and services of one process.

    They are gone when the process ends, and no other process sees them.

    :param max_sessions: how many sessions are kept at the most; the least recently used goes
        first.
    :raises ValueError: if max_sessions is not positive.

    Takes the options of `AbstractStorage`, `LifecycleStorage` and `ServerStorage` as well.
    """

    store: MemoryStore

    def __init__(self, *, max_sessions: int = 100_000, **options: Unpack[ServerOptions]) -> None:
        if max_sessions < 1:
            raise ValueError(f"max_sessions must be at least 1, not {max_sessions!r}")
        super().__init__(MemoryStore(max_records=max_sessions), **options)

    def __len__(self) -> int:
        """Return the number of sessions, expired ones included until they are next asked for."""
        return len(self.store)

    def __bool__(self) -> bool:
        return True
