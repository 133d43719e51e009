"""Sessions in memcached."""

from __future__ import annotations

from ._options import Unpack, show_options
from .server_storage import ServerOptions, ServerStorage
from .stores import Store
from .stores.outage import CircuitBreaker

try:
    import aiomcache

    from .stores.memcached import MemcachedStore
except ImportError as _error:
    raise ImportError(
        "Please install aiomcache: pip install aiohttp-session[aiomcache]"
    ) from _error


@show_options
class MemcachedStorage(ServerStorage):
    """Keep sessions in memcached, under ``cookie_name + "_" + id``.

    :param memcached_conn: the client, which says where the server is and how many connections there
        may be. The storage opens its own, and fewer.
    :param timeout: seconds after which a load or save fails with TimeoutError.
    :param circuit_breaker: while the store is down, let operations fail at once with
        `StoreUnavailableError`; see `CircuitBreaker`.
    :raises ValueError: if timeout is not positive; at a save, for a session larger than the server
        takes, or a key that memcached can't have.

    Takes the options of `AbstractStorage`, `LifecycleStorage` and `ServerStorage` as well.
    """

    def __init__(
        self,
        memcached_conn: aiomcache.Client,
        *,
        timeout: float = 5,
        circuit_breaker: bool = True,
        **options: Unpack[ServerOptions],
    ) -> None:
        store = MemcachedStore(memcached_conn, timeout=timeout)
        super().__init__(CircuitBreaker(store) if circuit_breaker else store, **options)
        self._timeout = timeout
        self._conn = memcached_conn

    @property
    def conn(self) -> aiomcache.Client:
        """The client."""
        return self._conn

    @conn.setter
    def conn(self, client: aiomcache.Client) -> None:
        self._conn = client
        # It is the last one behind any number of layers.
        holder: object = self
        while isinstance(inner := getattr(holder, "store", None), Store) and hasattr(
            inner, "store"
        ):
            holder = inner
        holder.store = MemcachedStore(client, timeout=self._timeout)  # type: ignore[attr-defined]
