"""A store that is stopped under load: who waits, for how long, and when all is well again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import signal
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import load, load_server, servers
from .cases import SERVERS, Stores
from .contenders import Contender

TIMEOUT = 5.0  # seconds: the storages' own
BEFORE = 3.0  # seconds of load before the store is stopped
AFTER = 12.0  # and after it goes on
_MOST_WAITING = 14_000  # requests; beyond it they are not sent, so that the client stays alive
_LENGTH = re.compile(rb"(?i)content-length: *(\d+)")


@dataclass
class Sample:
    """One request: seconds since the start of the load."""

    sent: float
    status: int
    took: float


@dataclass
class Outage:
    """What was seen of one outage."""

    contender: str
    storage: str
    rate: float  # requests per second that were offered
    stopped: float  # seconds
    samples: list[Sample] = field(default_factory=list)
    most_waiting: int = 0
    not_sent: int = 0
    unanswered: int = 0
    memory: tuple[float, float, float] = (0, 0, 0)  # MiB: before, at the most, after
    begun: float = 0.0
    resumed: float = 0.0

    @property
    def waited(self) -> list[float]:
        """Seconds that each took of those that were sent while the store was stopped."""
        return [s.took for s in self.samples if self.begun <= s.sent < self.resumed]

    @property
    def statuses(self) -> dict[int, int]:
        """How many were answered with each status."""
        found: dict[int, int] = {}
        for sample in self.samples:
            found[sample.status] = found.get(sample.status, 0) + 1
        return dict(sorted(found.items()))

    @property
    def quick(self) -> float:
        """Median seconds of the failing ones that were sent after the first time limit."""
        since = self.begun + TIMEOUT + 0.5
        return statistics.median(
            [s.took for s in self.samples if since <= s.sent < self.resumed and s.status != 200]
            or [float("nan")]
        )

    @property
    def recovery(self) -> float:
        """Seconds from the store's going on to the sending of the last request that failed."""
        failed = [s.sent for s in self.samples if s.status != 200]
        return max(0.0, max(failed, default=0.0) - self.resumed)


def measure(
    contender_name: str, storage: str, rate: float, seconds: float, *, uvloop: bool
) -> Outage:
    """Run a contender's server on a store of its own, and stop the store for some seconds."""
    outage = Outage(contender_name, storage, rate, seconds)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with (
            getattr(servers, SERVERS[storage])() as server,
            _contender(contender_name, storage, server, uvloop=uvloop) as contender,
        ):
            asyncio.run(_Client(contender, outage).run(server))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return outage


@contextlib.contextmanager
def _contender(
    name: str, storage: str, server: servers.Server, *, uvloop: bool
) -> Iterator[Contender]:
    address = f"{servers.HOST}:{server.port}"
    stores = (
        Stores(f"redis://{address}") if SERVERS[storage] == "redis" else Stores(memcached=address)
    )
    setting = {"stores": stores, "core": None, "uvloop": uvloop, "storage": storage}
    contender = Contender(name, setting, "load_server")
    try:
        yield contender
    finally:
        contender.close()


class _Client:
    """Sends requests at a steady rate, however many are not answered."""

    def __init__(self, contender: Contender, outage: Outage) -> None:
        self._contender = contender
        self._outage = outage
        self._port: int = contender.ask("port")
        self._free: deque[_Connection] = deque()
        self._requests: list[bytes] = []
        self.waiting: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, server: servers.Server) -> None:
        self._loop = loop = asyncio.get_running_loop()
        cookies = await load.log_in(load_server.HOST, self._port)
        self._requests = [_request(cookie) for cookie in cookies]
        outage = self._outage
        self._start = loop.time()
        outage.begun = BEFORE
        outage.resumed = BEFORE + outage.stopped
        end = outage.resumed + AFTER
        sending = asyncio.ensure_future(self._send_all(end))
        await asyncio.sleep(BEFORE)
        before = most = self._memory()
        os.kill(server.process.pid, signal.SIGSTOP)
        outage.begun = self.now
        try:
            while self.now < outage.begun + outage.stopped:
                await asyncio.sleep(0.25)
                most = max(most, self._memory())
        finally:
            outage.resumed = self.now
            os.kill(server.process.pid, signal.SIGCONT)
        await sending
        while (self.waiting or self._tasks) and self.now < end + 2 * TIMEOUT:
            await asyncio.sleep(0.01)
        waiting, self.waiting = self.waiting, set()
        outage.unanswered = len(waiting)
        for connection in (*waiting, *self._free):
            connection.close()
        await asyncio.sleep(1)
        outage.memory = (before, most, self._memory())

    @property
    def now(self) -> float:
        return self._loop.time() - self._start

    async def _send_all(self, end: float) -> None:
        sent = 0
        while (now := self.now) < end:
            due = int(now * self._outage.rate) - sent
            for _ in range(due):
                self._send(self._requests[sent % len(self._requests)])
                sent += 1
            await asyncio.sleep(0.005)

    def _send(self, request: bytes) -> None:
        while self._free:
            connection = self._free.popleft()
            if connection.is_open:
                connection.send(request, self.now)
                return
        if len(self.waiting) + len(self._tasks) >= _MOST_WAITING:
            self._outage.not_sent += 1
            return
        task = self._loop.create_task(self._send_on_new(request, self.now))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_on_new(self, request: bytes, now: float) -> None:
        try:
            connection = await self._connect()
        except OSError:
            self._outage.not_sent += 1
            return
        connection.send(request, now)

    async def _connect(self) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(self), load_server.HOST, self._port
        )
        return connection

    def note(self, connection: _Connection, status: int) -> None:
        """Take down an answer; status 0 is a connection closed without one."""
        now = self.now
        self._outage.samples.append(Sample(connection.since, status, now - connection.since))
        if connection.is_open:
            self._free.append(connection)

    def count(self) -> None:
        """Take down how many wait."""
        self._outage.most_waiting = max(self._outage.most_waiting, len(self.waiting))

    def _memory(self) -> float:
        pid = self._contender._process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20


class _Connection(asyncio.Protocol):
    """A keep-alive connection with at most one request under way."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        self._received = b""
        self.is_open = True
        self.since = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def send(self, request: bytes, since: float) -> None:
        self.since = since
        self._client.waiting.add(self)
        self._client.count()
        self._transport.write(request)

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not end or len(body) < int(length[1] if length else 0):
            return
        self._received = b""
        if b"onnection: close" in head:
            self.is_open = False
        self._client.waiting.discard(self)
        self._client.note(self, int(head[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self in self._client.waiting and exc is None:
            self._client.waiting.discard(self)
            self._client.note(self, 0)


def _request(cookie: str) -> bytes:
    return f"GET /read HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\n\r\n".encode()
