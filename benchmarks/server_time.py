"""The CPU time of the servers: how much a request costs the server that stores its session."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import redis

from .cases import SERVERS, Stores
from .measuring import Clock

BATCH = 0.1  # seconds of a contender's CPU time: each question costs the server some 50 µs


@contextlib.contextmanager
def clock(stores: Stores) -> Iterator[Clock]:
    """Return a function that asks the servers for the CPU time that they have used."""
    with contextlib.ExitStack() as stack:
        ask: dict[str, Callable[[], float]] = {}
        if stores.redis:
            ask["redis"] = stack.enter_context(_redis(stores.redis))
        if stores.valkey:
            ask["valkey"] = stack.enter_context(_redis(stores.valkey))
        if stores.memcached:
            ask["memcached"] = stack.enter_context(_memcached(stores.memcached))
        yield lambda case: ask[SERVERS[case.storage]]()


@contextlib.contextmanager
def _redis(url: str) -> Iterator[Callable[[], float]]:
    def ask() -> float:
        used = client.info("cpu")
        return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])

    with redis.Redis.from_url(url) as client:
        yield ask


@contextlib.contextmanager
def _memcached(address: str) -> Iterator[Callable[[], float]]:
    def ask() -> float:
        connection.sendall(b"stats\r\n")
        lines = iter(replies.readline, b"END\r\n")
        used = dict(line.split()[1:] for line in lines)
        return float(used[b"rusage_user"]) + float(used[b"rusage_system"])

    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port))) as connection,
        connection.makefile("rb") as replies,
    ):
        yield ask
