"""What it costs that sessions are a user's: log-ins, and the end of all sessions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

from aiohttp import web

import aiohttp_session

from .cases import STORAGES, Stores, session_data
from .worker import App

LOG_INS = 200  # in a round
ENDED = (10, 1000)  # sessions of one user


class Owned(NamedTuple):
    """Milliseconds of CPU time, the least of some rounds, in one storage."""

    storage: str
    log_in: float  # without an owner
    owned_log_in: float
    ends: tuple[float, ...]  # of as many sessions as `ENDED` says


def measure(
    storage: str, stores: Stores, rounds: int, step: Callable[[str], None] = lambda text: None
) -> Owned:
    """Measure one storage; each answer is checked."""
    step(f"{storage}: log-ins, and the end of a user's sessions")
    return asyncio.run(_measure(storage, stores, rounds))


async def _measure(name: str, stores: Stores, rounds: int) -> Owned:
    storage = STORAGES[name](stores)
    assert isinstance(storage, aiohttp_session.ServerStorage)
    app = App(storage)
    log_ins, owned, ends = [], [], []
    for number in range(rounds):
        log_ins.append(await _log_in(app, None, LOG_INS) / LOG_INS)
        # Each of these users has one session, as most have.
        owned.append(
            sum([await _log_in(app, f"{number}-{user}", 1) for user in range(LOG_INS)]) / LOG_INS
        )
        taken = []
        for count in ENDED:
            await _log_in(app, "ann", count)
            start = time.process_time()
            ended = await storage.end_sessions("ann")
            taken.append((time.process_time() - start) * 1e3)
            assert ended == count, (ended, count)
        ends.append(taken)
    await storage.finish()
    return Owned(name, min(log_ins), min(owned), tuple(map(min, zip(*ends, strict=True))))


async def _log_in(app: App, owner: str | None, times: int) -> float:
    """Return the milliseconds of CPU time that log-ins take, one after the other."""

    async def log_in(request: web.Request) -> web.Response:
        session = await aiohttp_session.new_session(request)
        session.update(session_data(250))
        session.owner = owner
        return web.Response(text="ok")

    return await app.run(log_in, app.requests([None] * times)) * 1e3
