"""Redis and memcached servers of our own, on free ports, for benchmarks and tests."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

HOST = "127.0.0.1"


class MissingServerError(RuntimeError):
    """A server program is not installed."""


class Server(NamedTuple):
    """A server process that listens on `HOST`."""

    port: int
    process: subprocess.Popen[bytes]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def redis(*options: str, port: int | None = None) -> Iterator[Server]:
    """Run a Redis server that keeps nothing on disk."""
    with tempfile.TemporaryDirectory() as folder:
        port = port or free_port()
        command = ["--bind", HOST, "--port", str(port), "--save", "", "--dir", folder, *options]
        with _run("redis-server", "redis-server", command, port) as server:
            yield server


@contextlib.contextmanager
def memcached(*options: str, port: int | None = None) -> Iterator[Server]:
    """Run a memcached server."""
    port = port or free_port()
    command = ["-l", HOST, "-p", str(port), "-U", "0", "-u", "root", *options]
    with _run("memcached", "memcached", command, port) as server:
        yield server


@contextlib.contextmanager
def _run(program: str, package: str, arguments: list[str], port: int) -> Iterator[Server]:
    path = shutil.which(program)
    if path is None:
        raise MissingServerError(f"{program} is not installed: apt-get install {package}")
    process = subprocess.Popen([path, *arguments], stdout=subprocess.DEVNULL)
    try:
        _wait_for(process, port, program)
        yield Server(port, process)
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(process: subprocess.Popen[bytes], port: int, program: str) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1):
            return
        time.sleep(0.01)
    raise RuntimeError(f"{program} did not start on port {port}")
