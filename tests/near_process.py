"""A process that keeps sessions in Redis with a near cache, and does what it is asked.

Commands come as JSON, a line each: a name and its arguments. So do the answers: what came of it, or
the name of an error.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.sentinel import Sentinel

from aiohttp_session import Session
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.stores import _redis_tracking
from aiohttp_session.stores.kept_records import KeptRecords
from benchmarks.servers import HOST
from tests.contract import Browser
from tests.waiting import PATIENCE


class Process:
    """One of the processes of a service."""

    def __init__(self, kind: str, port: int) -> None:
        client: Any
        if kind == "cluster":
            client = RedisCluster(host=HOST, port=port)
        elif kind == "sentinel":
            client = Sentinel([(HOST, port)]).master_for("sessions")  # type: ignore[no-untyped-call]
        else:
            client = Redis(host=HOST, port=port)
        self._client = client
        self._storage = RedisStorage(
            client, near_cache=1000, timeout=PATIENCE, circuit_breaker=False
        )
        self._near: Any = self._storage.store
        self._reading: dict[str, asyncio.Task[Any]] = {}
        self._ahead = 0.0
        for name in (KeptRecords.__module__, _redis_tracking.__name__):
            sys.modules[name].monotonic = lambda: time.monotonic() + self._ahead  # type: ignore[attr-defined]

    async def log_in(self, user: str) -> str | None:
        """Begin a session, and return its id."""
        browser = Browser(self._storage)
        await browser.set(user=user, n=0)
        return browser.cookie

    async def load(self, identity: str) -> Any:
        """Return what a session holds; None if there is none of that id."""

        def copy(session: Session) -> Any:
            return None if session.new else dict(session)

        found, _ = await Browser(self._storage, identity).do(copy)
        return found

    async def write(self, identity: str, n: int) -> bool:
        """Set an item of a session, and return whether there was one when it was loaded."""

        def change(session: Session) -> bool:
            if not session.new:
                session["n"] = n
            return not session.new

        found, _ = await Browser(self._storage, identity).do(change)
        return found

    async def move(self, identity: str) -> str | None:
        """Give a session another id, and return it; None if there was none."""
        browser = Browser(self._storage, identity)
        found, _ = await browser.do(
            lambda session: session.new or session.regenerate_id()  # type: ignore[func-returns-value]
        )
        return None if found or browser.cookie == identity else browser.cookie

    async def log_out(self, identity: str) -> None:
        """End a session."""
        await Browser(self._storage, identity).do(lambda session: session.invalidate())

    async def begin_load(self, identity: str) -> None:
        """Begin to load a session, which may take until something else has happened."""
        self._reading[identity] = asyncio.ensure_future(self.load(identity))
        await asyncio.sleep(0)

    async def end_load(self, identity: str) -> Any:
        """Return what `begin_load` finds."""
        return await self._reading.pop(identity)

    async def storm(self, identities: list[str]) -> None:
        """Load and write sessions in requests that are cancelled in the middle."""
        tasks = [
            asyncio.ensure_future(self.write(identity, -1 - turn))
            for turn in range(3)
            for identity in identities
        ]
        for turn, task in enumerate(tasks):
            for _ in range(turn % 4):
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def settle(self, near: str = "nothing") -> None:
        """Hear all that the server has announced by now; begin to be told again, if need be.

        :param near: a key on the same server.
        """
        for _ in range(3):
            await self._near.read_latest(near)

    async def read(self, key: str) -> str | None:
        """Return a record as it is."""
        record = await self._near.read(key)
        return None if record is None else record.decode()

    async def create(self, key: str, text: str) -> None:
        """Store a record as it is."""
        await self._near.create(key, text.encode(), 600)

    async def swap(self, key: str, expected: str, text: str) -> bool:
        """Replace a record if it is the expected one."""
        return bool(await self._near.swap(key, expected.encode(), text.encode(), 600))

    async def delete(self, key: str) -> None:
        """Delete a record."""
        await self._near.delete(key)

    async def advance(self, seconds: float) -> None:
        """Put the clock forward by which a connection is trusted."""
        self._ahead += seconds

    async def info(self) -> dict[str, int]:
        """Say what the near cache holds."""
        return dict(self._near.near_cache_info()._asdict())

    async def close(self) -> None:
        """Let go of everything."""
        await self._storage.finish()
        await self._client.aclose()


async def main() -> None:
    """Do what standard input says until it ends."""
    process = Process(sys.argv[1], int(sys.argv[2]))
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        command, *arguments = json.loads(line)
        do: Callable[..., Any] = getattr(process, command)
        try:
            answer = {"result": await do(*arguments)}
        except Exception as error:  # noqa: BLE001 - the test knows what may be
            answer = {"error": type(error).__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
