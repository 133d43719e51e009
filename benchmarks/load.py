"""Real servers under HTTP load: what sessions leave of the bare handler's throughput."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from . import load_client, load_server, wrk
from .cases import ONLY_HERE, Stores, cookie_header
from .contenders import Contender, ContenderError


@dataclass(frozen=True)
class Load:
    """What was measured of one handler."""

    contender: str
    storage: str  # or "bare"
    operation: str
    per_second: float
    cpu: float  # microseconds of the server process per request
    busy: float  # the part of the time that the server process had the processor
    p50: float  # milliseconds
    p99: float
    share: float = 1.0  # of the bare handler's throughput


OPERATIONS = ("read", "write")
ROUNDS = 3  # the neighbours on a shared machine are not always quiet
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
        """Measure bare, read and write for each, in rounds, of which the best one counts.

        :param step: called with a description before each of `count_steps` steps.
        :raises ContenderError: if a contender fails, or a request does.
        """
        wanted = [
            (storage, name, operation)
            for storage in ["bare", *storages]
            for name in contenders
            if not (name == "reference" and storage in ONLY_HERE)
            for operation in (OPERATIONS if storage != "bare" else ("bare",))
        ]
        best: dict[tuple[str, str, str], Load] = {}
        for number in range(ROUNDS):
            for storage, name, operation in wanted:
                step(f"round {number + 1}: {storage}/{operation}, {name}")
                load = self._measure(name, storage, operation, stores)
                known = best.setdefault((storage, name, operation), load)
                if load.per_second > known.per_second:
                    best[storage, name, operation] = load
        return [
            dataclasses.replace(load, share=load.per_second / best["bare", name, "bare"].per_second)
            for (_, name, _), load in best.items()
        ]

    def _measure(self, name: str, storage: str, operation: str, stores: Stores) -> Load:
        setting = {"stores": stores, "core": self._core, "uvloop": self._uvloop}
        server = Contender(name, {**setting, "storage": storage}, "load_server")
        self.loaded[name] = server.describe()
        try:
            port = server.ask("port")
            cookies = [cookie_header(None, 4)] if storage == "bare" else asyncio.run(_log_in(port))
            self._run_client(port, operation, cookies, _WARM_UP)
            before = server.ask("cpu")
            seen = self._run_client(port, operation, cookies, self._seconds / ROUNDS)
            cpu = server.ask("cpu") - before
        finally:
            server.close()
        if "failure" in seen:
            raise ContenderError(f"{name}: {storage}/{operation}: {seen['failure']}")
        return Load(
            contender=name,
            storage=storage,
            operation=operation,
            per_second=seen["requests"] / seen["seconds"],
            cpu=cpu / seen["requests"] * 1e6,
            busy=cpu / seen["seconds"],
            p50=seen["p50"] * 1e3,
            p99=seen["p99"] * 1e3,
        )

    def _run_client(
        self, port: int, operation: str, cookies: list[str], seconds: float
    ) -> dict[str, Any]:
        load: dict[str, Any] = {"cookies": cookies, "seconds": seconds, "path": f"/{operation}"}
        load |= {"host": load_server.HOST, "port": port, "connections": self._connections}
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
    return ROUNDS * len(contenders) * (1 + len(storages) * len(OPERATIONS))


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
