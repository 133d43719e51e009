"""Many requests against one store, watching memory: ``python -m benchmarks.soak redis``."""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import random
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from aiohttp_session.server_storage import ServerStorage

from . import servers

_USERS = 500
_AT_ONCE = 64
_MAX_AGE = 24 * 60 * 60  # seconds
_PAGE = 4096  # bytes


async def soak(storage: ServerStorage, requests: int) -> None:
    """Load and save sessions, a tenth of the requests cancelled; print what memory is in use."""
    cookies = [
        make_mocked_request("GET", "/", headers={"Cookie": f"AIOHTTP_SESSION=user{user}"})
        for user in range(_USERS)
    ]
    for user in range(_USERS):
        record = b'{"created":%d,"session":{"user":%d}}' % (time.time(), user)
        await storage.store.create(f"AIOHTTP_SESSION_user{user}", record, _MAX_AGE)
    choose = random.Random(1)
    done = errors = 0
    started = reported = time.monotonic()

    async def request(user: int) -> None:
        session = await storage.load_session(cookies[user])
        assert session["user"] == user
        if choose.random() < 0.3:
            session["n"] = session.get("n", 0) + 1
            session["text"] = "x" * choose.randrange(2000)
            await storage.save_session(cookies[user], web.Response(), session)

    async def visitor() -> None:
        nonlocal done, errors
        while done < requests:
            done += 1
            user = choose.randrange(_USERS)
            if choose.random() < 0.1:
                task = asyncio.ensure_future(request(user))
                await asyncio.sleep(choose.random() * 0.003)
                task.cancel()
                await asyncio.wait([task])
                continue
            try:
                await request(user)
            except Exception as error:  # noqa: BLE001 - it is counted
                errors += 1
                if errors <= 10:
                    print(repr(error))

    visitors = asyncio.gather(*(visitor() for _ in range(_AT_ONCE)))
    while not visitors.done():
        await asyncio.wait([visitors], timeout=10)
        reported = time.monotonic()
        gc.collect()
        print(
            f"{reported - started:5.0f} s  {done:8} requests  {errors} errors  "
            f"{_resident() / 2**20:6.1f} MiB  {len(asyncio.all_tasks())} tasks",
            flush=True,
        )
    await visitors
    await storage.finish()
    print(f"{len(asyncio.all_tasks())} task, {errors} errors")


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


async def _on_redis(requests: int, near_cache: int = 0) -> None:
    from redis.asyncio import Redis  # noqa: PLC0415

    from aiohttp_session.redis_storage import RedisStorage  # noqa: PLC0415

    with servers.redis() as server:
        client: Any = Redis(host=servers.HOST, port=server.port)
        storage = RedisStorage(client, max_age=_MAX_AGE, near_cache=near_cache)
        await soak(storage, requests)
        print(storage.near_cache_info() or "no near cache")
        await client.aclose()


async def _on_memcached(requests: int) -> None:
    import aiomcache  # noqa: PLC0415

    from aiohttp_session.memcached_storage import MemcachedStorage  # noqa: PLC0415

    with servers.memcached() as server:
        client = aiomcache.Client(servers.HOST, server.port)
        await soak(MemcachedStorage(client, max_age=_MAX_AGE), requests)
        await client.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", choices=["redis", "redis-near", "memcached"])
    parser.add_argument("--requests", type=int, default=1_000_000)
    arguments = parser.parse_args()
    stores: dict[str, Callable[[int], Coroutine[Any, Any, None]]] = {
        "redis": _on_redis,
        # Fewer than there are users: some have to go.
        "redis-near": functools.partial(_on_redis, near_cache=_USERS // 2),
        "memcached": _on_memcached,
    }
    asyncio.run(stores[arguments.store](arguments.requests))
