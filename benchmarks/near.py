"""How soon another process with a near cache sees a log-out."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .cases import STORAGES, Stores

LOG_OUTS = 2000


class Delays(NamedTuple):
    """Milliseconds from the moment that the process where it happened has its answer.

    Negative: the other one knew before.
    """

    log_outs: int
    median: float
    worst: float


def measure(stores: Stores, step: Callable[[str], None] = lambda text: None) -> Delays:
    """Have a process that keeps a session see, again and again, that another one has ended it.

    The other process has nothing else to do than to look.
    """
    step("log-outs that another process sees")
    code = f"from benchmarks import near; near.watch({json.dumps(stores)!r})"
    watcher = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        delays = asyncio.run(_end_sessions(stores, watcher))
    finally:
        watcher.communicate()
    return Delays(len(delays), statistics.median(delays), max(delays))


async def _end_sessions(stores: Stores, watcher: subprocess.Popen[str]) -> list[float]:
    assert watcher.stdin is not None
    assert watcher.stdout is not None
    storage: Any = STORAGES["redis near"](stores)
    delays = []
    for number in range(LOG_OUTS):
        key = f"log-out_{number}"
        await storage.store.create(key, b"{}", 60)
        print(key, file=watcher.stdin, flush=True)
        watcher.stdout.readline()  # it has it
        await storage.store.delete(key)
        ended = time.monotonic()
        seen = float(watcher.stdout.readline())
        delays.append((seen - ended) * 1e3)
    await storage.finish()
    return delays


def watch(stores: str) -> None:
    """Keep the records whose keys come in, and say when each of them is gone."""
    asyncio.run(_watch(Stores(*json.loads(stores))))


async def _watch(stores: Stores) -> None:
    storage: Any = STORAGES["redis near"](stores)
    for line in sys.stdin:
        key = line.strip()
        hits = storage.near_cache_info().hits
        while storage.near_cache_info().hits == hits:  # until it is kept, and relied upon
            await storage.store.read(key)
        print("kept", flush=True)
        while await storage.store.read(key) is not None:  # noqa: ASYNC110 - it looks, as requests do
            await asyncio.sleep(0)
        print(time.monotonic(), flush=True)
    await storage.finish()
