"""Operations on a Redis Cluster: each on the server that owns its key."""

from __future__ import annotations

import asyncio
from typing import Any

from ._redis_client import Node, call
from ._redis_pipeline import READ, Operation
from ._redis_resp import is_asking
from ._redis_server import Server
from ._redis_tracking import Tracking
from .batch import Batch


class Cluster:
    """Does operations on the servers that own their keys, in one event loop.

    :param client: a client for a cluster, of redis-py or valkey-py.
    :param timeout: seconds after which an operation fails with TimeoutError.
    :param tracking: what the near cache is told by; None if there is none.
    """

    def __init__(self, client: Any, timeout: float, *, tracking: Tracking | None = None) -> None:
        self._client = client
        self._timeout = timeout
        self._tracking = tracking
        self._servers: dict[str, Server] = {}
        note = None if tracking is None else tracking.note
        self._unrouted: Batch[Operation, Any] = Batch(self._route, timeout=timeout, note=note)

    def submit(
        self, operation: Operation, size: int = 0, *, droppable: bool = False
    ) -> asyncio.Future[Any]:
        """Do an operation, as `Batch.submit` describes."""
        node = self._find_node(operation[0])
        if node is None:
            return self._unrouted.submit(operation, size, droppable=droppable)
        return self._server(node).submit(operation, size, droppable=droppable)

    def resubmit(self, operation: Operation, since: float, size: int = 0) -> asyncio.Future[Any]:
        """Do an operation that has a part of its time behind it.

        :param since: when it was first submitted (loop time).
        """
        node = self._find_node(operation[0])
        if node is not None:
            return self._server(node).resubmit(operation, since, size)
        return self._unrouted.submit(operation, size, since=since)

    def submit_transaction(self, operation: Operation, since: float) -> asyncio.Future[Any]:
        """Do an operation that takes several round trips, as `Server.submit_transaction` does."""
        node = self._find_node(operation[0])
        if node is None:
            raise ConnectionError("No node of the Redis Cluster is known to have the record")
        return self._server(node).submit_transaction(operation, since)

    async def finish(self) -> None:
        """Wait until nothing is under way, and give all connections back."""
        await self._unrouted.finish()
        for server in list(self._servers.values()):
            await server.finish()

    def _server(self, node: Any) -> Server:
        server = self._servers.get(node.name)
        if server is None:
            connections = Node(node) if hasattr(node, "release") else None
            server = Server(
                self._client,
                connections,
                self._timeout,
                self._locate,
                tracking=self._tracking,
            )
            self._servers[node.name] = server
        elif isinstance(server.connections, Node):
            server.connections.node = node
        return server

    def _locate(self, key: str, error: Exception) -> Server:
        if is_asking(error):
            address = str(error).split()[-1]
            return self._server(self._client.get_node(node_name=address))
        return self._server(self._client.get_node_from_key(key))

    def _find_node(self, key: str) -> Any:
        try:
            return self._client.get_node_from_key(key)
        except Exception:  # noqa: BLE001 - it doesn't know its nodes yet, or none has the slot
            return None

    async def _route(self, operations: list[Operation]) -> list[Any]:
        await self._client.initialize()
        return await asyncio.gather(*map(self._route_one, operations), return_exceptions=True)

    async def _route_one(self, operation: Operation) -> Any:
        key, _, _, fate = operation
        if self._find_node(key) is None and fate is not READ:
            # The client's own rules find out who has the slot now; it does not send the write.
            await self._client.get(key)
        if self._find_node(key) is None:
            return await call(self._client, operation)
        return await self.submit(operation)
