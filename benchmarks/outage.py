"""A store that is stopped under load: who waits, for how long, and when all is well again."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import resource
import select
import signal
import socket
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from . import load, load_server, servers
from .cases import SERVERS, Stores
from .contenders import Contender

TIMEOUT = 5.0  # seconds: the storages' own
BEFORE = 3.0  # seconds of load before the store is stopped
AFTER = 12.0  # and after it goes on
_PATIENCE = 2 * TIMEOUT  # for the answers after that
_TICK = 0.005  # seconds from one look at the time to the next
_MOST_WAITING = 14_000  # requests; beyond it they are not sent, so that the client stays alive
_LENGTH = re.compile(rb"(?i)content-length: *(\d+)")


class Sample(NamedTuple):
    """One request."""

    sent: float  # seconds from the start of the load until it was due
    status: int  # 0 if its connection was closed instead
    took: float  # seconds since then; so a client that is late makes it longer


@dataclass
class Outage:
    """What was seen of one outage."""

    contender: str
    storage: str
    rate: float  # requests per second that were offered
    stopped: float  # seconds
    samples: list[Sample] = field(default_factory=list)
    most_waiting: int = 0
    latest: float = 0.0  # seconds after its time that a request was sent
    not_sent: int = 0
    unanswered: int = 0
    memory: tuple[float, float, float] = (0, 0, 0)  # MiB: before, at the most, after
    objects: tuple[int, int] = (0, 0)  # blocks of memory that Python uses: before, after
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
            cookies = asyncio.run(load.log_in(load_server.HOST, contender.ask("port")))
            _Client(contender, outage, cookies).run(server)
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
    """Sends requests at a steady rate, however many are not answered.

    Below asyncio, since on a machine with two cores it must take less than one of them.
    """

    def __init__(self, contender: Contender, outage: Outage, cookies: list[str]) -> None:
        self._contender = contender
        self._outage = outage
        self._address = (load_server.HOST, contender.ask("port"))
        self._requests = [_request(cookie) for cookie in cookies]
        self._sent = 0
        self._free: list[_Connection] = []
        self._connections: dict[int, _Connection] = {}
        self._waiting = 0
        self._epoll = select.epoll()

    def run(self, server: servers.Server) -> None:
        outage = self._outage
        self._start = time.monotonic()
        self._send_until(BEFORE)
        objects = self._contender.ask("objects")
        before = most = self._memory()
        os.kill(server.process.pid, signal.SIGSTOP)
        outage.begun = self._now
        try:
            while self._now < outage.begun + outage.stopped:
                self._send_until(min(self._now + 0.25, outage.begun + outage.stopped))
                most = max(most, self._memory())
        finally:
            outage.resumed = self._now
            os.kill(server.process.pid, signal.SIGCONT)
        self._send_until(outage.resumed + AFTER)
        end = self._now + _PATIENCE
        while self._waiting and self._now < end:
            self._receive()
        outage.unanswered = self._waiting
        self._free.clear()
        for connection in [*self._connections.values()]:
            self._close(connection)
        self._epoll.close()
        outage.objects = (objects, self._settled())
        outage.memory = (before, most, self._memory())

    @property
    def _now(self) -> float:
        return time.monotonic() - self._start

    def _send_until(self, end: float) -> None:
        while (now := self._now) < end:
            while (due := self._sent / self._outage.rate) <= now:
                self._outage.latest = max(self._outage.latest, now - due)
                self._send(self._requests[self._sent % len(self._requests)], due)
                self._sent += 1
            self._receive()

    def _send(self, request: bytes, due: float) -> None:
        if self._free:
            connection = self._free.pop()
        elif self._waiting < _MOST_WAITING:
            connection = self._connect()
        else:
            self._outage.not_sent += 1
            return
        connection.due = due
        self._waiting += 1
        self._outage.most_waiting = max(self._outage.most_waiting, self._waiting)
        try:
            connection.socket.send(request)
        except BlockingIOError:  # it is not open yet
            connection.unsent = request
            self._epoll.modify(connection.socket, select.EPOLLOUT)
        except OSError:
            self._end(connection, 0, is_open=False)

    def _connect(self) -> _Connection:
        connection = _Connection(socket.socket())
        connection.socket.setblocking(False)
        connection.socket.connect_ex(self._address)
        self._connections[connection.socket.fileno()] = connection
        self._epoll.register(connection.socket, select.EPOLLIN)
        return connection

    def _receive(self) -> None:
        for number, _ in self._epoll.poll(_TICK):
            connection = self._connections[number]
            try:
                self._go_on(connection)
            except OSError:
                self._end(connection, 0, is_open=False)

    def _go_on(self, connection: _Connection) -> None:
        if connection.unsent:
            connection.socket.send(connection.unsent)
            connection.unsent = b""
            self._epoll.modify(connection.socket, select.EPOLLIN)
            return
        data = connection.socket.recv(2**16)
        connection.received += data
        head, end, body = connection.received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not data:
            self._end(connection, 0, is_open=False)
        elif end and len(body) >= int(length[1] if length else 0):
            connection.received = b""
            self._end(connection, int(head[9:12]), is_open=b"onnection: close" not in head)

    def _end(self, connection: _Connection, status: int, *, is_open: bool) -> None:
        """Take down an answer, or that a connection was closed without one."""
        if connection.due is not None:
            sample = Sample(connection.due, status, self._now - connection.due)
            self._outage.samples.append(sample)
            self._waiting -= 1
            connection.due = None
        if is_open:
            self._free.append(connection)
        else:
            self._close(connection)

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection.socket.fileno()]
        if connection in self._free:
            self._free.remove(connection)
        connection.socket.close()

    def _settled(self) -> int:
        """Return the number of objects when the server has seen that its clients are gone."""
        before, objects = math.inf, self._contender.ask("objects")
        while objects < before:
            time.sleep(0.5)
            before, objects = objects, self._contender.ask("objects")
        return int(before)

    def _memory(self) -> float:
        pid = self._contender._process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20


@dataclass(eq=False, slots=True)
class _Connection:
    """A keep-alive connection with at most one request under way."""

    socket: socket.socket
    due: float | None = None  # when its request was, if one is under way
    unsent: bytes = b""
    received: bytes = b""


def _request(cookie: str) -> bytes:
    return f"GET /read HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\n\r\n".encode()
