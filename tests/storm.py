"""Many requests at once, some of which are cancelled while they wait for the store."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from tests.proxy import Proxy
from tests.waiting import turns, until

REQUESTS = 6000
CANCELLED = REQUESTS // 4
AT_A_TIME = 64


async def storm(proxy: Proxy, request: Callable[[], Coroutine[Any, Any, str]]) -> list[str]:
    """Run requests through a proxy, and return what became of those that were not cancelled.

    Again and again replies are held back, somewhere in their midst. Only then, while requests wait
    for them, one in four is cancelled, until `CANCELLED` have been; so it is always as many.
    """
    dice = random.Random(7)
    proxy.fragment = 100
    running: list[asyncio.Task[str]] = []
    doomed: list[asyncio.Task[str]] = []
    outcomes: list[str] = []
    begun = 0
    while begun < REQUESTS or running:
        while begun < REQUESTS and len(running) < AT_A_TIME:
            running.append(asyncio.ensure_future(request()))
            begun += 1
        proxy.hold()
        await until(partial(_is_held, proxy, running))
        waiting = [task for task in running if not task.done()]
        for task in dice.sample(waiting, begun // 4 - len(doomed)):
            task.cancel()
            doomed.append(task)
            running.remove(task)
        proxy.resume()
        await turns(dice.randrange(30))
        outcomes += [task.result() for task in running if task.done()]
        running[:] = [task for task in running if not task.done()]
    await asyncio.gather(*doomed, return_exceptions=True)
    assert [task.cancelled() for task in doomed] == [True] * CANCELLED
    return outcomes


def _is_held(proxy: Proxy, running: list[asyncio.Task[str]]) -> bool:
    return bool(proxy.held_replies) or all(task.done() for task in running)
