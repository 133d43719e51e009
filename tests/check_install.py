"""Check an installation, away from its source tree: ``python check_install.py [IMPLEMENTATION]``.

The implementation that must be in use is "cython" unless given. The environment has the package
and what it depends on, and none of its extras.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

import aiohttp_session
from aiohttp_session import SimpleCookieStorage
from aiohttp_session.memory_storage import MemoryStorage

EXPECTED = sys.argv[1] if len(sys.argv) > 1 else "cython"
EXTRAS = {
    "cookie_storage": "secure",
    "nacl_storage": "pynacl",
    "redis_storage": "aioredis",
    "memcached_storage": "aiomcache",
}


async def count(request: web.Request) -> web.Response:
    session = await aiohttp_session.get_session(request)
    session.setdefault("visits", []).append("visit")
    return web.json_response(len(session["visits"]))


async def check_round_trip(storage: aiohttp_session.AbstractStorage) -> None:
    app = web.Application()
    aiohttp_session.setup(app, storage)
    app.router.add_get("/", count)
    async with TestClient(TestServer(app)) as client:
        for visits in (1, 2, 3):
            async with client.get("/") as response:
                assert await response.json() == visits, type(storage)


def check_missing_extra(module: str, extra: str) -> None:
    try:
        # Redis is missed at construction, the others at import; as in the reference package.
        importlib.import_module(f"aiohttp_session.{module}").RedisStorage(None)
    except (ImportError, RuntimeError) as error:
        message = str(error)
    else:
        message = "no error"
    assert f"[{extra}]" in message, (module, message)


def main() -> None:
    folder = Path(aiohttp_session.__file__).parent
    assert folder.parent.name in {"site-packages", "dist-packages"}, folder
    assert (folder / "py.typed").exists()
    assert aiohttp_session.IMPLEMENTATION == EXPECTED, aiohttp_session.IMPLEMENTATION
    asyncio.run(check_round_trip(SimpleCookieStorage()))
    asyncio.run(check_round_trip(MemoryStorage()))
    for module, extra in EXTRAS.items():
        check_missing_extra(module, extra)
    print(f"aiohttp-session {aiohttp_session.__version__} works, in {EXPECTED}")


if __name__ == "__main__":
    main()
