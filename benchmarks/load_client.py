"""HTTP load: so many connections, each with one request after the other."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

_PATIENCE = 5.0  # seconds, for the last answers


class Client:
    """Keeps connections to a server, and puts load on it when asked to."""

    def __init__(self, host: str, port: int, connections: int) -> None:
        self._host = host
        self._port = port
        self._wanted = connections
        self._connections: list[_Connection] = []

    async def load(self, path: str, cookies: list[str], seconds: float) -> dict[str, Any]:
        """Put load on the server, and return what was seen; times are in seconds."""
        loop = asyncio.get_running_loop()
        while len(self._connections) < self._wanted:
            _, connection = await loop.create_connection(_Connection, self._host, self._port)
            self._connections.append(connection)
        start = time.perf_counter()
        for number, connection in enumerate(self._connections):
            head = f"GET {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            head += f"Cookie: {cookies[number % len(cookies)]}\r\n\r\n"
            connection.start(head.encode("ascii"))
        await asyncio.sleep(seconds)
        stopped = {connection.stop() for connection in self._connections}
        _, unanswered = await asyncio.wait(stopped, timeout=_PATIENCE)
        taken = time.perf_counter() - start
        latencies = [latency for each in self._connections for latency in each.latencies]
        failures = [each.failure for each in self._connections if each.failure]
        failures += ["a request was not answered" for _ in unanswered]
        if failures or len(latencies) < 2:
            return {"failure": failures[0] if failures else "no answers"}
        percentiles = statistics.quantiles(latencies, n=100)
        return {
            "requests": len(latencies),
            "seconds": taken,
            "p50": percentiles[49],
            "p99": percentiles[98],
        }

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections:
            connection.close()


class _Connection(asyncio.Protocol):
    """A connection that sends its request again as soon as it is answered."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.failure = ""
        self._received = b""
        self._is_stopping = False
        self._stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def start(self, request: bytes) -> None:
        self.latencies = []
        if self.failure:
            return
        self._stopped = asyncio.get_running_loop().create_future()
        self._is_stopping = False
        self._request = request
        self._send()

    def stop(self) -> asyncio.Future[None]:
        """Send no more requests; the future is done with the answer to the last one."""
        self._is_stopping = True
        return self._stopped

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        self._received = b""
        self.latencies.append(time.perf_counter() - self._sent)
        if not head.startswith(b"HTTP/1.1 200"):
            self._fail(head.partition(b"\r\n")[0].decode("latin-1"))
        elif self._is_stopping:
            self._stopped.set_result(None)
        else:
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the server closed the connection: {error}")

    def close(self) -> None:
        """Close the connection."""
        self._transport.abort()

    def _fail(self, failure: str) -> None:
        self.failure = failure
        if not self._stopped.done():
            self._stopped.set_result(None)

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self._request)
