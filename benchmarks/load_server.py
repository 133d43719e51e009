"""A contender's process: an aiohttp server with sessions, to be put under load."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

import aiohttp_session

from .cases import OPERATIONS, STORAGES, Case, Stores, bare, session_data
from .turns import take_turns
from .worker import describe

HOST = "127.0.0.1"
USERS = 64


def main() -> None:
    """Serve HTTP, and commands from standard input until it ends."""
    setting = json.loads(sys.argv[-1])
    warnings.simplefilter("ignore")  # aiohttp's advice about keys of requests
    # What an outage has to say is written, as in a service, but to nowhere.
    logging.basicConfig(filename=os.devnull)
    if setting["core"] is not None:
        os.sched_setaffinity(0, {setting["core"]})
    if setting["uvloop"]:
        import uvloop  # noqa: PLC0415

        uvloop.install()
    asyncio.run(_serve(setting))


async def _serve(setting: dict[str, Any]) -> None:
    app = web.Application()
    app.router.add_get("/bare", bare)
    if setting["storage"] == "hooks":
        app.middlewares.append(_pass_on)
        app.on_response_prepare.append(_do_nothing)
    elif setting["storage"] != "bare":
        storage = STORAGES[setting["storage"]](Stores(*setting["stores"]))
        aiohttp_session.setup(app, storage)
        for operation in ("read", "write"):
            app.router.add_get(f"/{operation}", OPERATIONS[operation].handler)
        app.router.add_get("/login/{user}", _log_in)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, HOST, 0, backlog=4096)  # a client whose turn is lost waits a second
    await site.start()
    port = runner.addresses[0][1]
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def take_turns_here(**arguments: Any) -> float:
        turns = take_turns((HOST, port), **arguments)
        return asyncio.run_coroutine_threadsafe(turns, loop).result()

    def obey() -> None:
        for line in sys.stdin:
            command, arguments = json.loads(line)
            answers: dict[str, Callable[..., Any]] = {
                "describe": describe,
                "port": lambda: port,
                "cpu": time.process_time,
                "objects": _count_objects,
                "turns": take_turns_here,
            }
            try:
                answer = {"result": answers[command](**arguments)}
            except Exception as error:  # noqa: BLE001 - it goes to who gave the command
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
        loop.call_soon_threadsafe(done.set)

    threading.Thread(target=obey, daemon=True).start()
    await done.wait()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(runner.cleanup(), 2)


def _count_objects() -> int:
    gc.collect()
    return sys.getallocatedblocks()


@web.middleware
async def _pass_on(request: web.Request, handler: Handler) -> web.StreamResponse:
    return await handler(request)


async def _do_nothing(request: web.Request, response: web.StreamResponse) -> None:
    pass


async def _log_in(request: web.Request) -> web.Response:
    session = await aiohttp_session.new_session(request)
    session.update(session_data(Case.size, int(request.match_info["user"])))
    return web.Response()
