"""Real servers under HTTP load: what sessions leave of the bare handler's throughput."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp

from . import load_client, load_server, wrk
from .cases import ONLY_HERE, Stores, cookie_header
from .contenders import Contender, ContenderError


@dataclass(frozen=True)
class Load:
    """What was measured of one handler: the median of all rounds, each."""

    contender: str
    storage: str  # or "bare"
    operation: str
    per_second: float
    cpu: float  # microseconds of the server process per request
    busy: float  # the part of the time that the server process had the processor
    p50: float  # milliseconds
    p99: float
    share: float  # of the throughput that the bare handler had a moment before


OPERATIONS = ("read", "write")
ROUNDS = 5
_WARM_UP = 0.2  # seconds


class Loader:
    """Puts one server after the other under load."""

    def __init__(self, connections: int, seconds: float, *, uvloop: bool) -> None:
        self._connections = connections
        self._seconds = seconds
        self._uvloop = uvloop
        self._core = _leave_a_core()
        self.loaded: dict[str, str] = {}
        """Which package each contender really was."""

    def describe(self) -> str:
        """Say how the load is made."""
        client = "wrk" if wrk.program() else "the built-in client (wrk is not installed)"
        loop = "uvloop" if self._uvloop else "asyncio"
        pinned = "not pinned to a core" if self._core is None else "on a core of its own"
        return f"{self._connections} connections by {client}; server with {loop}, {pinned}"

    def measure(
        self,
        contenders: list[str],
        storages: list[str],
        stores: Stores,
        step: Callable[[str], None],
    ) -> list[Load]:
        """Measure bare, read and write for each.

        A shared machine has fast and slow moments, so bare and session take turns, in short slices.

        :param step: called with a description before each of `count_steps` steps.
        :raises ContenderError: if a contender fails, or a request does.
        """
        measured: dict[tuple[str, str, str], list[Load]] = {}
        for name in contenders:
            with self._server(name, "bare", stores) as bare_server:
                for storage in storages:
                    if name == "reference" and storage in ONLY_HERE:
                        continue
                    with self._server(name, storage, stores) as server:
                        for number in range(ROUNDS):
                            step(f"{name}: {storage}, round {number + 1}")
                            bare = bare_server.measure("bare")
                            loads = [bare, *(server.measure(operation) for operation in OPERATIONS)]
                            for load in loads:
                                share = load.per_second / bare.per_second
                                measured.setdefault(
                                    (load.storage, name, load.operation), []
                                ).append(dataclasses.replace(load, share=share))
        order = ["bare", *storages]
        return sorted(map(_median, measured.values()), key=lambda load: order.index(load.storage))

    @contextlib.contextmanager
    def _server(self, name: str, storage: str, stores: Stores) -> Iterator[_Server]:
        setting = {"stores": stores, "core": self._core, "uvloop": self._uvloop}
        contender = Contender(name, {**setting, "storage": storage}, "load_server")
        self.loaded[name] = contender.describe()
        try:
            yield _Server(contender, storage, self._connections, self._seconds / ROUNDS)
        finally:
            contender.close()


class _Server:
    """A server that is put under load.

    :param seconds: how long it is, each time.
    """

    def __init__(
        self, contender: Contender, storage: str, connections: int, seconds: float
    ) -> None:
        self._contender = contender
        self._storage = storage
        self._connections = connections
        self._seconds = seconds
        self._port = contender.ask("port")
        is_bare = storage == "bare"
        self._cookies = [cookie_header(None, 4)] if is_bare else asyncio.run(_log_in(self._port))
        for operation in ("bare",) if is_bare else OPERATIONS:
            self._run_client(operation, _WARM_UP)

    def measure(self, operation: str) -> Load:
        before = self._contender.ask("cpu")
        seen = self._run_client(operation, self._seconds)
        cpu = self._contender.ask("cpu") - before
        if "failure" in seen:
            name = self._contender.name
            raise ContenderError(f"{name}: {self._storage}/{operation}: {seen['failure']}")
        return Load(
            contender=self._contender.name,
            storage=self._storage,
            operation=operation,
            per_second=seen["requests"] / seen["seconds"],
            cpu=cpu / seen["requests"] * 1e6,
            busy=cpu / seen["seconds"],
            p50=seen["p50"] * 1e3,
            p99=seen["p99"] * 1e3,
            share=1.0,
        )

    def _run_client(self, operation: str, seconds: float) -> dict[str, Any]:
        load: dict[str, Any] = {"cookies": self._cookies, "seconds": seconds}
        load |= {"host": load_server.HOST, "port": self._port, "path": f"/{operation}"}
        load["connections"] = self._connections
        if wrk.program():
            return wrk.load(**load)
        done = subprocess.run(
            [sys.executable, "-I", load_client.__file__],
            input=json.dumps(load),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seen: dict[str, Any] = json.loads(done.stdout)
        return seen


def _leave_a_core() -> int | None:
    """Move this process, and those that it starts, off one core, and return that core."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        return None
    core = min(cores)
    os.sched_setaffinity(0, cores - {core})
    return core


def count_steps(contenders: list[str], storages: list[str]) -> int:
    """Return how often `Loader.measure` calls its `step`, at the most."""
    return ROUNDS * len(contenders) * len(storages)


def _median(loads: list[Load]) -> Load:
    figures = [field.name for field in dataclasses.fields(Load) if field.type == "float"]
    medians = {name: statistics.median(getattr(load, name) for load in loads) for name in figures}
    return dataclasses.replace(loads[0], **medians)


async def _log_in(port: int) -> list[str]:
    """Store a session for each user, and return the Cookie headers of their browsers."""
    headers = []
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as client:
        for user in range(load_server.USERS):
            url = f"http://{load_server.HOST}:{port}/login/{user}"
            async with client.get(url, raise_for_status=True) as response:
                cookie = response.headers["Set-Cookie"].partition("; ")[0]
            headers.append(cookie_header(cookie, 4))
    return headers
