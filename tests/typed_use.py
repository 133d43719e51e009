"""Uses of the package that type checkers accept, and uses that they refuse.

Each line with an ignore comment is refused: mypy and pyright (`make lint`) complain of one that
nothing needs. Nobody runs this.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient
from redis.asyncio import Redis
from typing_extensions import assert_type

from aiohttp_session import (
    AbstractStorage,
    CookieStorage,
    Handler,
    ServerStorage,
    Session,
    SessionInfo,
    SimpleCookieStorage,
    Store,
    get_session,
    new_session,
    recommended,
    session_middleware,
    setup,
)
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.telemetry import instrument
from aiohttp_session.test_utils import read_session, session_cookies, set_session

KEY = b"k" * 32


async def sessions(request: web.Request) -> None:
    session = await get_session(request)
    assert_type(session, Session)
    assert_type(await get_session(request, "admin"), Session)
    assert_type(await new_session(request), Session)
    await get_session(request, 1)  # type: ignore[arg-type]
    await get_session()  # type: ignore[call-arg]

    assert_type(session["name"], Any)
    assert_type(session.new, bool)
    assert_type(session.owner, str | None)
    assert_type(session.max_age, int | None)
    session["cart"] = {"tea": [1, 2]}
    session.owner = "ann"
    session.owner = None
    session.max_age = 60
    session.changed()
    session.regenerate_id()
    session.invalidate()
    session[1] = "a"  # type: ignore[index]
    session.owner = 1  # type: ignore[assignment]
    session.max_age = "60"  # type: ignore[assignment]
    session.new = True  # type: ignore[misc]
    session.renew()  # type: ignore[attr-defined]


def storages(redis: Redis) -> Sequence[AbstractStorage]:
    SimpleCookieStorage(samesite=1)  # type: ignore[arg-type]
    SimpleCookieStorage(lifetime="1 h")  # type: ignore[arg-type]
    SimpleCookieStorage("name")  # type: ignore[call-arg]
    SimpleCookieStorage(hash_ids=True)  # type: ignore[call-arg]
    MemoryStorage(on_conflict="ignore")  # type: ignore[arg-type]
    MemoryStorage(max_per_owner="3")  # type: ignore[arg-type]
    EncryptedCookieStorage()  # type: ignore[call-arg]
    EncryptedCookieStorage(KEY, cipher="rot13")  # type: ignore[arg-type]
    RedisStorage("redis://host")  # type: ignore[arg-type]
    RedisStorage(redis, timeout="5")  # type: ignore[arg-type]
    RedisStorage(redis, near_cache=True, circuit_breaker="no")  # type: ignore[arg-type]
    return [
        SimpleCookieStorage(cookie_name="a", domain=None, max_age=60, partitioned=False),
        EncryptedCookieStorage(KEY, cipher="aes-256-gcm-siv", lifetime=3600, touch_after=60),
        EncryptedCookieStorage([KEY, KEY.hex()], secure=True, samesite="Strict"),
        NaClCookieStorage(KEY, encoder=str, decoder=json.loads),
        MemoryStorage(max_per_owner=3, hash_ids=True, on_conflict="merge"),
        MemoryStorage(**recommended()),
        RedisStorage(redis, timeout=2.5, circuit_breaker=False, key_factory=lambda: "id"),
        RedisStorage(redis, near_cache=1000, **recommended()),
    ]


async def owners(storage: ServerStorage, session: Session, simple: SimpleCookieStorage) -> None:
    infos = await storage.sessions_of("ann")
    assert_type(infos, list[SessionInfo])
    assert_type(infos[0].data, dict[str, Any])
    assert_type(await storage.end_session("ann", infos[0].handle), bool)
    assert_type(await storage.end_sessions("ann", keep=session), int)
    await storage.end_sessions("ann", session)  # type: ignore[call-arg]
    await storage.sessions_of(session)  # type: ignore[arg-type]
    await simple.sessions_of("ann")  # type: ignore[attr-defined]


def reports(storage: RedisStorage, simple: SimpleCookieStorage) -> None:
    instrument(storage)
    instrument(simple, tracer_provider=None)
    instrument(storage.store)  # type: ignore[arg-type]
    info = storage.near_cache_info()
    assert info is not None
    assert_type(info.hits, int)


async def tests(client: TestClient[Any, Any], app: web.Application) -> None:
    await set_session(client, {"user": "ann"}, max_age=60)
    await set_session(client, ["user"])  # type: ignore[arg-type]
    assert_type(await session_cookies(app, {"user": "ann"}), dict[str, str])
    assert_type(await read_session(app, client), Session)
    await read_session(client, app)  # type: ignore[arg-type]


def applications(app: web.Application, storage: AbstractStorage) -> None:
    setup(app, storage)
    setup(app, storage, name="admin")
    app.middlewares.append(session_middleware(storage))
    setup(storage, app)  # type: ignore[arg-type]
    setup(app, SimpleCookieStorage)  # type: ignore[arg-type]
    setup(app, storage, names=["admin"])  # type: ignore[call-arg]


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    assert_type(handler, Callable[[web.Request], Awaitable[web.StreamResponse]])
    return await handler(request)


class OwnStore(Store):
    async def read(self, key: str) -> bytes | None:
        return None

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None: ...

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        return True

    async def delete(self, key: str) -> None: ...


class HalfAStore(Store):
    async def read(self, key: str) -> str:  # type: ignore[override]
        return key


class OwnStorage(AbstractStorage):
    async def load_session(self, request: web.Request) -> Session:
        assert_type(self.load_cookie(request), str | None)
        return await self.new_session()

    async def save_session(
        self, request: web.Request, response: web.StreamResponse, session: Session
    ) -> None:
        self.save_cookie(response, "text", max_age=session.max_age)
        self.save_cookie(response, b"bytes")  # type: ignore[arg-type]


def own() -> None:
    ServerStorage(OwnStore(), cookie_name="own")
    OwnStorage(max_age=60, httponly=True)
    HalfAStore()  # type: ignore[abstract]
    CookieStorage()  # type: ignore[abstract]
    AbstractStorage()  # type: ignore[abstract]
    ServerStorage()  # type: ignore[call-arg]
    ServerStorage(dict)  # type: ignore[arg-type]
