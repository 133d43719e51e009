"""Sessions over a network that makes trouble: which requests fail, and which writes are lost."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import aiomcache
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from redis.asyncio import Redis

from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.server_storage import ServerStorage

from . import servers

if TYPE_CHECKING:
    from typing_extensions import Self

USERS = 120
SECONDS = 20.0
TIMEOUT = 1.0  # seconds
_THINKING = 0.1  # seconds from a user's request to the next, at the most
_STALL = 2.0  # seconds, at the most
_LATENCY = 0.002  # seconds, for a third of what is passed on
_CHUNK = 2**16  # bytes

OpenStorage: TypeAlias = Callable[[int], "contextlib.AbstractAsyncContextManager[ServerStorage]"]


@dataclass
class Outcome:
    """What became of the requests."""

    requests: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # by step, type and cause
    lost: int = 0  # acknowledged writes that a later request of the same user did not find
    worst: float = 0.0  # seconds that a request took at the most
    faults: Counter[str] = field(default_factory=Counter)


class Network:
    """Passes connections on to a server, and makes trouble: an async context manager.

    A connection that is stalled keeps what was sent on it, in both directions, and delivers it late
    or never. One that is truncated ends in the middle of the next reply.
    """

    def __init__(self, server_port: int, dice: random.Random) -> None:
        self._server_port = server_port
        self._dice = dice
        self._links: dict[asyncio.Task[None], _Link] = {}

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._forward, servers.HOST, 0)
        self.port: int = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for task in self._links:
            task.cancel()
        await asyncio.gather(*self._links)

    def disturb(self) -> str | None:
        """Do something to one of the connections, and return what."""
        links = [link for link in self._links.values() if link.flows.is_set()]
        if not links:
            return None
        link = self._dice.choice(links)
        fault = self._dice.choice(("cut", "stall", "truncate"))
        if fault == "cut":
            link.abort()
        elif fault == "stall":
            link.flows.clear()
            delay = self._dice.uniform(0, _STALL)
            asyncio.get_running_loop().call_later(delay, link.flows.set)
        else:
            link.is_truncated = True
        return fault

    async def _forward(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        server, to_server = await asyncio.open_connection(servers.HOST, self._server_port)
        link = self._links[task] = _Link(to_client, to_server)
        with contextlib.suppress(asyncio.CancelledError):  # at the end
            await asyncio.gather(
                self._pass(client, to_server, link), self._pass(server, to_client, link)
            )
        link.abort()
        del self._links[task]

    async def _pass(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, link: _Link
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK):
                if self._dice.random() < 1 / 3:
                    await asyncio.sleep(self._dice.uniform(0, _LATENCY))
                await link.flows.wait()
                if link.is_truncated and target is link.to_client:
                    target.write(data[: len(data) // 2])
                    break
                target.write(data)
        target.close()


class _Link:
    """One connection of a client's, and that to the server."""

    def __init__(self, to_client: asyncio.StreamWriter, to_server: asyncio.StreamWriter) -> None:
        self.to_client = to_client
        self._to_server = to_server
        self.flows = asyncio.Event()
        self.flows.set()
        self.is_truncated = False

    def abort(self) -> None:
        self.to_client.transport.abort()
        self._to_server.close()


class _User:
    """Sends one request after the other, and knows what its session must hold."""

    def __init__(self, storage: ServerStorage, dice: random.Random, outcome: Outcome) -> None:
        self._storage = storage
        self._dice = dice
        self._outcome = outcome
        self._cookie = ""  # none yet: the next request logs in
        self._counts = {0}  # what the session may hold: acknowledged, or of unknown fate

    async def visit(self, end: float) -> None:
        """Send requests until a time of `time.monotonic`."""
        while (begun := time.monotonic()) < end:
            self._outcome.requests += 1
            try:
                await (self._request() if self._cookie else self._log_in())
            except Exception as error:  # noqa: BLE001 - it is counted
                self._outcome.errors[_describe(error)] += 1
            self._outcome.worst = max(self._outcome.worst, time.monotonic() - begun)
            await asyncio.sleep(self._dice.uniform(0, _THINKING))

    async def _log_in(self) -> None:
        session = await self._storage.new_session()
        session["n"] = 0
        response = await self._save(_request(""), session)
        self._cookie, self._counts = response.cookies["AIOHTTP_SESSION"].value, {0}

    async def _request(self) -> None:
        request = _request(self._cookie)
        session = await self._storage.load_session(request)
        count = session.get("n", -1)
        if count not in self._counts:
            self._outcome.lost += 1
            self._cookie = ""
            return
        self._counts.add(count + 1)
        choice = self._dice.random()
        if choice < 0.05:
            self._cookie = ""
            session.invalidate()
            await self._save(request, session)
            session = await self._storage.load_session(request)
            self._outcome.lost += not session.new
        elif choice < 0.5:
            session["n"] = count + 1
            await self._save(request, session)
            self._counts = {count + 1}

    async def _save(self, request: web.Request, session: Any) -> web.Response:
        response = web.Response()
        await self._storage.save_session(request, response, session)
        return response


@functools.lru_cache(maxsize=2 * USERS)  # a mocked request takes longer than what it asks for
def _request(cookie: str) -> web.Request:
    return make_mocked_request("GET", "/", headers={"Cookie": f"AIOHTTP_SESSION={cookie}"})


def _describe(error: BaseException) -> str:
    """Name an error and its causes, and which operation it was."""
    trace, step = error.__traceback__, "?"
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename.endswith(("server_storage.py", "settling.py")):
            step = code.co_name.strip("_")
        trace = trace.tb_next
    names = []
    cause: BaseException | None = error
    while cause is not None:
        names.append(f"{type(cause).__name__}: {str(cause)[:60]}")
        cause = cause.__cause__
    return f"{step}: {' <- '.join(names)}"


async def measure(
    open_storage: OpenStorage, server_port: int, *, seconds: float, faults: float, seed: int = 1
) -> Outcome:
    """Have users send requests while their network is disturbed.

    :param faults: how many there are in a second, on average.
    """
    dice, outcome = random.Random(seed), Outcome()
    async with (
        Network(server_port, random.Random(seed)) as network,
        open_storage(network.port) as storage,
    ):
        end = time.monotonic() + seconds
        users = [_User(storage, dice, outcome) for _ in range(USERS)]
        visits = asyncio.gather(*(user.visit(end) for user in users))
        while not visits.done():
            await asyncio.wait({visits}, timeout=dice.expovariate(faults))
            if fault := network.disturb():
                outcome.faults[fault] += 1
        await visits
    return outcome


@contextlib.asynccontextmanager
async def redis_storage(port: int) -> AsyncIterator[ServerStorage]:
    """Give a storage on Redis."""
    client: Any = Redis(host=servers.HOST, port=port)
    storage = RedisStorage(client, timeout=TIMEOUT)
    yield storage
    await storage.finish()
    await client.aclose()


@contextlib.asynccontextmanager
async def memcached_storage(port: int) -> AsyncIterator[ServerStorage]:
    """Give a storage on memcached."""
    client = aiomcache.Client(servers.HOST, port)
    storage = MemcachedStorage(client, timeout=TIMEOUT)
    yield storage
    await storage.finish()
    await client.close()


STORAGES: dict[str, OpenStorage] = {"redis": redis_storage, "memcached": memcached_storage}


def run(storage: str, seconds: float, faults: float) -> Outcome:
    """Measure a storage on a server of its own; see `measure`."""
    with getattr(servers, storage)() as server:
        return asyncio.run(measure(STORAGES[storage], server.port, seconds=seconds, faults=faults))
