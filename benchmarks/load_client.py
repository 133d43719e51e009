"""HTTP load: so many connections, each with one request after the other."""

from __future__ import annotations

import asyncio
import functools
import json
import statistics
import sys
import time
from typing import Any


def main() -> None:
    """Put the load on a server that standard input describes, and print what was seen."""
    print(json.dumps(asyncio.run(load(**json.load(sys.stdin)))))


async def load(
    host: str, port: int, path: str, cookies: list[str], connections: int, seconds: float
) -> dict[str, Any]:
    """Put load on a server, and return what was seen; times are in seconds."""
    loop = asyncio.get_running_loop()
    clients = []
    for number in range(connections):
        head = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n"
        head += f"Cookie: {cookies[number % len(cookies)]}\r\n\r\n"
        made = functools.partial(_Client, head.encode("ascii"))
        _, client = await loop.create_connection(made, host, port)
        clients.append(client)
    start = time.perf_counter()
    await asyncio.sleep(seconds)
    taken = time.perf_counter() - start
    latencies = [latency for client in clients for latency in client.latencies]
    failures = [client.failure for client in clients if client.failure]
    for client in clients:
        client.close()
    if failures or len(latencies) < 2:
        return {"failure": f"{failures[0] if failures else 'no answers'}"}
    percentiles = statistics.quantiles(latencies, n=100)
    return {
        "requests": len(latencies),
        "seconds": taken,
        "p50": percentiles[49],
        "p99": percentiles[98],
    }


class _Client(asyncio.Protocol):
    """A connection that sends its request again as soon as it is answered."""

    def __init__(self, request: bytes) -> None:
        self.latencies: list[float] = []
        self.failure = ""
        self._request = request
        self._received = b""
        self._sent = 0.0
        self._closed = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self.failure = head.partition(b"\r\n")[0].decode("latin-1")
            return
        self._received = b""
        self.latencies.append(time.perf_counter() - self._sent)
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._closed:
            self.failure = f"the server closed the connection: {error}"

    def close(self) -> None:
        """Close the connection."""
        self._closed = True
        self._transport.abort()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self._request)


if __name__ == "__main__":
    main()
