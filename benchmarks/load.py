"""Real servers under HTTP load: what sessions leave of the bare handler's throughput."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp

from . import load_server, wrk
from .cases import ONLY_HERE, Stores, cookie_header
from .contenders import Contender, ContenderError
from .load_client import Client


@dataclass(frozen=True)
class Load:
    """What was measured of one handler: the median of all rounds, each; alone, the least."""

    contender: str
    storage: str  # or one of WITHOUT
    operation: str
    per_second: float
    cpu: float  # microseconds of the server process per request
    busy: float  # the part of the time that the server process had the processor
    p50: float  # milliseconds
    p99: float
    alone: float  # microseconds of the server process per request while the client rests
    share: float = 1.0  # of the throughput that the bare handler had a moment before
    share_of_hooks: float = 1.0  # and of that with hooks, which a package like this can't exceed
    share_alone: float = 1.0  # the same two, while the client rests
    share_of_hooks_alone: float = 1.0


OPERATIONS = ("read", "write")
WITHOUT = ("bare", "hooks")  # the bare handler; and with a middleware and a signal, both idle
SECONDS = 2.5  # for each measurement, in all, if nothing else is said
SLICE = 1.0 if wrk.program() else 0.1  # seconds
_WARM_UP = 0.2  # seconds
_TURNS = 40  # of a client that rests while it is answered


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
        """Measure each storage, and what aiohttp does without.

        A shared machine has fast and slow moments, so all take turns, in short slices.

        :param step: called with a description before each of `count_steps` steps.
        :raises ContenderError: if a contender fails, or a request does.
        """
        measured: dict[tuple[str, str, str], list[Load]] = {}
        for name in contenders:
            with (
                self._server(name, "bare", stores) as bare_server,
                self._server(name, "hooks", stores) as hooks_server,
            ):
                for storage in storages:
                    if name == "reference" and storage in ONLY_HERE:
                        continue
                    with self._server(name, storage, stores) as server:
                        for number in range(rounds(self._seconds)):
                            step(f"{name}: {storage}, round {number + 1}")
                            bare, hooks = bare_server.measure("bare"), hooks_server.measure("bare")
                            for load in (
                                bare,
                                hooks,
                                *(server.measure(operation) for operation in OPERATIONS),
                            ):
                                key = (load.storage, name, load.operation)
                                measured.setdefault(key, []).append(_shared(load, bare, hooks))
        order = [*WITHOUT, *storages]
        medians = sorted(
            map(_median, measured.values()), key=lambda each: order.index(each.storage)
        )
        return _shared_alone(medians)

    @contextlib.contextmanager
    def _server(self, name: str, storage: str, stores: Stores) -> Iterator[_Server]:
        setting = {"stores": stores, "core": self._core, "uvloop": self._uvloop}
        contender = Contender(name, {**setting, "storage": storage}, "load_server")
        self.loaded[name] = contender.describe()
        server = _Server(contender, storage, self._connections)
        try:
            server.warm_up()
            yield server
        finally:
            server.close()
            contender.close()


class _Server:
    """A server that is put under load."""

    def __init__(self, contender: Contender, storage: str, connections: int) -> None:
        self._contender = contender
        self._storage = storage
        self._address = load_server.HOST, contender.ask("port")
        self._connections = connections
        self._client = Client(*self._address, connections)
        self._loop = asyncio.new_event_loop()
        self._cookies = [cookie_header(None, 4)]

    def warm_up(self) -> None:
        """Have users log in, and the first requests answered."""
        if self._storage in WITHOUT:
            self._load("bare", _WARM_UP)
            return
        self._cookies = self._loop.run_until_complete(log_in(*self._address))
        for operation in OPERATIONS:
            self._load(operation, _WARM_UP)

    def measure(self, operation: str) -> Load:
        cookies = [self._cookies[n % len(self._cookies)] for n in range(self._connections)]
        alone = self._contender.ask("turns", path=f"/{operation}", cookies=cookies, times=_TURNS)
        before = self._contender.ask("cpu")
        seen = self._load(operation, SLICE)
        cpu = self._contender.ask("cpu") - before
        return Load(
            contender=self._contender.name,
            storage=self._storage,
            operation=operation,
            per_second=seen["requests"] / seen["seconds"],
            cpu=cpu / seen["requests"] * 1e6,
            busy=cpu / seen["seconds"],
            p50=seen["p50"] * 1e3,
            p99=seen["p99"] * 1e3,
            alone=alone * 1e6,
        )

    def close(self) -> None:
        self._client.close()
        self._loop.run_until_complete(asyncio.sleep(0))  # in which the connections close
        self._loop.close()

    def _load(self, operation: str, seconds: float) -> dict[str, Any]:
        path = f"/{operation}"
        if wrk.program():
            seen = wrk.load(*self._address, path, self._cookies, self._connections, seconds)
        else:
            load = self._client.load(path, self._cookies, seconds)
            seen = self._loop.run_until_complete(load)
        if "failure" in seen:
            name = self._contender.name
            raise ContenderError(f"{name}: {self._storage}{path}: {seen['failure']}")
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


def rounds(seconds: float) -> int:
    """Return how many slices a measurement has that takes so long in all."""
    return max(1, round(seconds / SLICE))


def count_steps(contenders: list[str], storages: list[str], seconds: float) -> int:
    """Return how often `Loader.measure` calls its `step`, at the most."""
    return rounds(seconds) * len(contenders) * len(storages)


def _shared(load: Load, bare: Load, hooks: Load) -> Load:
    """Give a measurement its shares of those made beside it."""
    rate = load.per_second
    return dataclasses.replace(
        load,
        share=rate / bare.per_second,
        share_of_hooks=rate / hooks.per_second,
    )


def _median(loads: list[Load]) -> Load:
    figures = [field.name for field in dataclasses.fields(Load) if field.type == "float"]
    medians = {name: statistics.median(getattr(load, name) for load in loads) for name in figures}
    # No client disturbs these, but others of the machine may.
    medians["alone"] = min(load.alone for load in loads)
    return dataclasses.replace(loads[0], **medians)


def _shared_alone(loads: list[Load]) -> list[Load]:
    """Give measurements their shares of what the same contender does without sessions."""
    alone = {(load.contender, load.storage): load.alone for load in loads}
    return [
        dataclasses.replace(
            load,
            share_alone=alone[load.contender, "bare"] / load.alone,
            share_of_hooks_alone=alone[load.contender, "hooks"] / load.alone,
        )
        for load in loads
    ]


async def log_in(host: str, port: int) -> list[str]:
    """Store a session for each user, and return the Cookie headers of their browsers."""
    headers = []
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as client:
        for user in range(load_server.USERS):
            url = f"http://{host}:{port}/login/{user}"
            async with client.get(url, raise_for_status=True) as response:
                cookie = response.headers["Set-Cookie"].partition("; ")[0]
            headers.append(cookie_header(cookie, 4))
    return headers
