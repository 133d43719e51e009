"""What other people's code does with the package's names, public and protected.

It is written as such code is, and runs unchanged on either package: each scenario returns what it
saw. As a script it prints all of that:

    python third_party.py '{"redis": PORT, "memcached": PORT}'
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiomcache
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request
from redis.asyncio import Redis

import aiohttp_session
from aiohttp_session import AbstractStorage, SimpleCookieStorage
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from aiohttp_session.redis_storage import RedisStorage

Ports = dict[str, int]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HOST = "127.0.0.1"
KEY = bytes(range(32))
BUILT_IN = ("simple", "fernet", "nacl", "redis", "memcached")


class DictStorage(AbstractStorage):
    """A server storage of somebody's own, in a dict, by way of the protected names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.records: dict[str, str] = {}
        self.saves = 0

    def load_cookie(self, request: web.Request) -> str | None:
        value = request.cookies.get(self._cookie_name)
        return value.removeprefix("v1-") if value else None

    def save_cookie(
        self, response: web.StreamResponse, cookie_data: str, *, max_age: int | None = None
    ) -> None:
        params: Any = self._cookie_params.copy()
        if max_age is not None:
            params["max_age"] = max_age
        if cookie_data:
            response.set_cookie(self._cookie_name, f"v1-{cookie_data}", **params)
        else:
            response.del_cookie(self._cookie_name, path=params["path"])

    async def load_session(self, request: web.Request) -> aiohttp_session.Session:
        key = self.load_cookie(request)
        record = None if key is None else self.records.get(key)
        if record is None:
            return aiohttp_session.Session(None, data=None, new=True, max_age=self._max_age)
        try:
            data = self._decoder(record)
        except ValueError:
            data = None
        return aiohttp_session.Session(key, data=data, new=False, max_age=self._max_age)

    async def save_session(
        self,
        request: web.Request,
        response: web.StreamResponse,
        session: aiohttp_session.Session,
    ) -> None:
        self.saves += 1
        key = session.identity or secrets.token_hex(8)
        if session.empty:
            self.records.pop(key, None)
            self.save_cookie(response, "", max_age=session.max_age)
            return
        assert session._mapping == dict(session)
        self.records[key] = self._encoder(self._get_session_data(session))
        self.save_cookie(response, key, max_age=session.max_age)


def make_storage(kind: str, ports: Ports, overrides: type[Any] | None = None) -> AbstractStorage:
    """Make a built-in storage, some of whose methods a mix-in overrides."""
    makers: dict[str, tuple[type[AbstractStorage], Callable[[], tuple[Any, ...]]]] = {
        "simple": (SimpleCookieStorage, tuple),
        "fernet": (EncryptedCookieStorage, lambda: (KEY,)),
        "nacl": (NaClCookieStorage, lambda: (KEY,)),
        "redis": (RedisStorage, lambda: (Redis(host=HOST, port=ports["redis"]),)),
        "memcached": (MemcachedStorage, lambda: (aiomcache.Client(HOST, ports["memcached"]),)),
    }
    kind_of_storage, arguments = makers[kind]
    if overrides is None:
        return kind_of_storage(*arguments())
    storage: AbstractStorage = type("Overriding", (overrides, kind_of_storage), {})(*arguments())
    return storage


async def close(storage: Any) -> None:
    if hasattr(storage, "_redis"):
        await storage._redis.aclose()
    if hasattr(storage, "conn"):
        await storage.conn.close()


@contextlib.asynccontextmanager
async def serve(
    storage: AbstractStorage, *middlewares: Any, **handlers: Handler
) -> AsyncIterator[TestClient[Any, Any]]:
    """Serve handlers under their names."""
    app = web.Application()
    aiohttp_session.setup(app, storage)
    app.middlewares.extend(middlewares)
    for name, handler in handlers.items():
        app.router.add_get(f"/{name}", handler)
    async with TestClient(TestServer(app, host=HOST)) as client:
        yield client
    await close(storage)


async def count(request: web.Request) -> web.Response:
    session = await aiohttp_session.get_session(request)
    session["count"] = session.get("count", 0) + 1
    session.setdefault("nested", {"list": []})["list"].append(session["count"])
    return show(session)


async def read(request: web.Request) -> web.Response:
    return show(await aiohttp_session.get_session(request))


async def invalidate(request: web.Request) -> web.Response:
    session = await aiohttp_session.get_session(request)
    session.invalidate()
    return show(session)


def show(session: Any) -> web.Response:
    return web.json_response({"items": dict(session), "new": session.new})


async def ask(client: TestClient[Any, Any], path: str, **options: Any) -> Any:
    async with client.get(path, **options) as response:
        assert response.status == 200, await response.text()
        return [await response.json(), "Set-Cookie" in response.headers]


async def own_storage(ports: Ports) -> Any:
    storage = DictStorage(cookie_name="OWN", max_age=1000)
    seen = []
    async with serve(storage, count=count, read=read, invalidate=invalidate) as client:
        for path in ("/read", "/count", "/read", "/count", "/read", "/invalidate", "/read"):
            seen.append([path, *await ask(client, path), storage.saves, len(storage.records)])
    return seen


async def own_storage_with_its_own_coder(ports: Ports) -> Any:
    def encode(data: object) -> str:
        return json.dumps(data)[::-1]

    def decode(text: str) -> Any:
        return json.loads(text[::-1])

    storage = DictStorage(encoder=encode, decoder=decode)
    async with serve(storage, count=count, read=read) as client:
        seen = [await ask(client, "/count"), await ask(client, "/read")]
        (record,) = storage.records.values()
        key = next(iter(storage.records))
        storage.records[key] = "damaged"
        seen.append(await ask(client, "/read"))
    return [*seen, decode(record)["session"], sorted(decode(record))]


async def cookie_options_changed_at_run_time(ports: Ports) -> Any:
    seen = []
    for kind in BUILT_IN:
        storage = make_storage(kind, ports)
        async with serve(storage, count=count) as client:
            for change in ({}, {"samesite": "Lax", "path": "/count"}, {"httponly": False}):
                storage.cookie_params.update(change)  # type: ignore[typeddict-item]
                async with client.get("/count") as response:
                    line = response.headers["Set-Cookie"]
                seen.append([kind, line.partition("; ")[2]])
    return seen


class FromHeader:
    """Takes the session's id, or the session, from elsewhere than the cookie."""

    def load_cookie(self, request: web.Request) -> str | None:
        scheme, _, value = request.headers.get("Authorization", "").partition(" ")
        return value if scheme == "Bearer" else request.query.get("session")


class ToHeader:
    """Gives the session's id, or the session, elsewhere than in a cookie."""

    def save_cookie(
        self, response: web.StreamResponse, cookie_data: str, *, max_age: int | None = None
    ) -> None:
        response.headers["X-Session"] = cookie_data or "none"


class ByHeader(FromHeader, ToHeader):
    """Does without cookies altogether."""


async def built_in_storages_without_cookies(ports: Ports) -> Any:
    seen: list[Any] = []
    for kind in BUILT_IN:
        storage = make_storage(kind, ports, ByHeader)
        async with serve(storage, count=count, read=read, invalidate=invalidate) as client:
            async with client.get("/count") as response:
                value = response.headers["X-Session"]
                seen.append([kind, "Set-Cookie" in response.headers])
            bearer = {"Authorization": f"Bearer {value}"}
            seen.append(await ask(client, "/read", headers=bearer))
            seen.append(await ask(client, "/read", params={"session": value}))
            seen.append(await ask(client, "/read", headers={"Authorization": "Basic 123"}))
            async with client.get("/invalidate", headers=bearer) as response:
                value = response.headers["X-Session"]
                seen.append(value if kind != "simple" else "none")
    return seen


async def middleware_that_saves_itself(ports: Ports) -> Any:
    """Somebody's middleware stamps each session, and saves it before a WebSocket handshake."""
    saved = []

    @web.middleware
    async def stamp(request: web.Request, handler: Handler) -> web.StreamResponse:
        storage = request["aiohttp_session_storage"]
        assert isinstance(storage, AbstractStorage)
        assert request.get("aiohttp_session") is None
        session = await aiohttp_session.get_session(request)
        assert request["aiohttp_session"] is session
        session["stamp"] = "✓"
        if request.path == "/socket":
            response = web.WebSocketResponse()
            await storage.save_session(request, response, session)
            saved.append(storage.cookie_name in response.cookies)
            await response.prepare(request)
            await response.send_json(dict(session))
            await response.close()
            return response
        return await handler(request)

    async def socket(request: web.Request) -> web.StreamResponse:
        raise AssertionError

    seen: list[Any] = []
    for kind in BUILT_IN:
        storage = make_storage(kind, ports)
        async with serve(storage, stamp, read=read, socket=socket) as client:
            async with client.ws_connect("/socket") as connection:
                seen.append([kind, await connection.receive_json()])
            lines = connection._response.headers.getall("Set-Cookie")
            seen.append(len(lines))
            seen.append(await ask(client, "/read"))
    return [seen, saved]


async def plain_dict_as_session(ports: Ports) -> Any:
    request = make_mocked_request("GET", "/")
    request["aiohttp_session"] = {"fake": True}
    return await aiohttp_session.get_session(request)


async def session_of_a_subclass(ports: Ports) -> Any:
    class UserSession(aiohttp_session.Session):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.loaded = len(self._mapping)

        def __getitem__(self, key: str) -> Any:
            return self._mapping.get(key, f"no {key}")

        @property
        def user(self) -> Any:
            return self._mapping.get("user")

        @user.setter
        def user(self, name: str) -> None:
            self._mapping["user"] = name
            self._changed = True

    class UserStorage(DictStorage):
        async def load_session(self, request: web.Request) -> aiohttp_session.Session:
            key = self.load_cookie(request)
            record = self.records.get(key) if key else None
            data = None if record is None else self._decoder(record)
            return UserSession(key, data=data, new=record is None, max_age=self.max_age)

    async def log_in(request: web.Request) -> web.Response:
        session = await aiohttp_session.get_session(request)
        assert isinstance(session, UserSession)
        session.user = "Zoë"
        session.note = "an attribute of somebody's own"  # type: ignore[attr-defined]
        return web.json_response(
            [session.loaded, session.user, session["other"], repr(session)[:13]]
        )

    storage = UserStorage()
    async with serve(storage, log_in=log_in, read=read) as client:
        return [await ask(client, "/log_in"), await ask(client, "/read"), storage.saves]


SCENARIOS: dict[str, Callable[[Ports], Awaitable[Any]]] = {
    scenario.__name__: scenario
    for scenario in (
        own_storage,
        own_storage_with_its_own_coder,
        cookie_options_changed_at_run_time,
        built_in_storages_without_cookies,
        middleware_that_saves_itself,
        plain_dict_as_session,
        session_of_a_subclass,
    )
}


async def main(ports: Ports) -> None:
    print(json.dumps({name: await scenario(ports) for name, scenario in SCENARIOS.items()}))


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
