"""Serve one package's sessions over HTTP: all five storages, in two applications.

    python serve.py '{"key": ..., "redis": ..., "memcached": ...}'

It runs on either package, on ports that it chooses and prints, until its input is closed.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import aiomcache
from aiohttp import web
from redis.asyncio import Redis

import aiohttp_session
from aiohttp_session import AbstractStorage, SimpleCookieStorage, get_session, setup
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from aiohttp_session.redis_storage import RedisStorage

HOST = "127.0.0.1"
EXAMPLES = Path(__file__).parents[2] / "examples"

routes = web.RouteTableDef()


@routes.get("/")
async def read(request: web.Request) -> web.Response:
    return _show(await get_session(request))


@routes.put("/")
async def write(request: web.Request) -> web.Response:
    session = await get_session(request)
    options = await request.json()
    session.update(options["items"])
    if "max_age" in options:
        session.max_age = options["max_age"]
    return _show(session)


@routes.post("/nested")
async def change_inside(request: web.Request) -> web.Response:
    session = await get_session(request)
    session["nested"]["list"].append("more")
    session.changed()
    return _show(session)


@routes.delete("/")
async def invalidate(request: web.Request) -> web.Response:
    session = await get_session(request)
    session.invalidate()
    return _show(session)


def _show(session: aiohttp_session.Session) -> web.Response:
    return web.json_response(
        {
            "items": dict(session),
            "new": session.new,
            "identity": session.identity,
            "created": session.created,
        }
    )


def make_storage(kind: str, config: dict[str, str], max_age: int | None) -> AbstractStorage:
    options: Any = {"cookie_name": f"{kind.upper()}_{max_age}", "max_age": max_age}
    secret = base64.urlsafe_b64decode(config["key"])
    if kind == "simple":
        return SimpleCookieStorage(**options)
    if kind == "fernet":
        return EncryptedCookieStorage(secret, samesite="Lax", secure=True, **options)
    if kind == "nacl":
        return NaClCookieStorage(secret, httponly=False, **options)
    if kind == "redis":
        return RedisStorage(Redis.from_url(config["redis"]), samesite="Strict", **options)
    host, _, port = config["memcached"].removeprefix("memcached://").partition(":")
    return MemcachedStorage(aiomcache.Client(host, int(port)), domain="example.com", **options)


async def serve(config: dict[str, str]) -> None:
    spec = importlib.util.spec_from_file_location("shop", EXAMPLES / "shop.py")
    assert spec is not None
    assert spec.loader is not None
    shop = importlib.util.module_from_spec(spec)
    sys.modules["shop"] = shop
    spec.loader.exec_module(shop)
    main = web.Application()
    shops = {}
    for kind in ("simple", "fernet", "nacl", "redis", "memcached"):
        for max_age in (None, 100):
            app = web.Application()
            setup(app, make_storage(kind, config, max_age))
            app.add_routes(routes)
            main.add_subapp(f"/{kind}/{max_age}", app)
        where = {"fernet": "cookie"}.get(kind, config.get(kind, kind))
        shops[kind] = await _listen(shop.make_app(where, config["key"]))
    port = await _listen(main)
    about = {
        "version": aiohttp_session.__version__,
        "implementation": getattr(aiohttp_session, "IMPLEMENTATION", None),
        "port": port,
        "shops": shops,
    }
    print(json.dumps(about), flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def _listen(app: web.Application) -> int:
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    return int(runner.addresses[0][1])


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
