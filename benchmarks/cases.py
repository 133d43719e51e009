"""What is measured: a storage, an operation and a step more are a few lines here.

This module runs in every contender's process, with whichever package is imported there.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiomcache
from aiohttp import web
from redis import asyncio as redis

import aiohttp_session
from aiohttp_session import AbstractStorage, SimpleCookieStorage, get_session, new_session
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from aiohttp_session.redis_storage import RedisStorage

IS_REFERENCE = not hasattr(aiohttp_session, "IMPLEMENTATION")
if not IS_REFERENCE:
    from opentelemetry.metrics import NoOpMeterProvider
    from opentelemetry.trace import NoOpTracerProvider

    from aiohttp_session import _core
    from aiohttp_session.memory_storage import MemoryStorage
    from aiohttp_session.telemetry import instrument

KEY = bytes(range(32))


@dataclass(frozen=True)
class Case:
    """One kind of request, or one step of it."""

    storage: str  # one of STORAGES; or "step"
    operation: str  # one of OPERATIONS; or of STEPS
    size: int = 250  # bytes of the session, as JSON
    at_once: int = 1  # requests in progress at a time
    cookies: int = 4  # in the request, the session's included
    stored: int = 0  # other sessions in the store, if it is in memory

    @property
    def is_one_session(self) -> bool:
        """Whether the requests that are in progress at a time belong to one visitor."""
        return self.operation == "one session"

    @property
    def name(self) -> str:
        """What ``--cases`` selects by: ``redis/read``, ``redis/read/64 at once``."""
        parts = [self.storage, self.operation]
        if self.size != Case.size:
            parts.append(f"{self.size} bytes")
        if self.at_once != Case.at_once:
            parts.append(f"{self.at_once} at once")
        if self.cookies != Case.cookies:
            parts.append(f"{self.cookies} cookies")
        if self.stored:
            parts.append(f"{self.stored} stored")
        return "/".join(parts)


def session_data(size: int, user: int = 0) -> dict[str, Any]:
    """Return what a shop keeps of a visitor, in about so many bytes of JSON."""
    data: dict[str, Any] = {"login": f"user{user}", "n": 1}
    if size < 200:
        return data
    data |= {"id": 814_723, "roles": ["customer", "reviewer"], "csrf": "9f86d081884c7d659a2feaa0"}
    data["cart"] = [
        {"sku": "HX-20449", "n": 1, "price": 1999, "gift": False},
        {"sku": "AC-10071", "n": 3, "price": 450, "note": "für Jürgen"},
    ]
    item = {"sku": "ZZ-20005", "n": 2, "price": 1250}
    missing = size - _json_size(data)
    data["cart"] += [dict(item) for _ in range(missing // (_json_size(item) + len(",")))]
    return data


def _json_size(data: object) -> int:
    return len(json.dumps(data, separators=(",", ":")))


def cookie_header(session: str | None, cookies: int) -> str:
    """Return a Cookie header as a browser sends it, with the session's cookie in the middle."""
    others = ["_ga=GA1.1.1804289383.1711000000", "theme=dark"]
    others += [f"_c{i}=3f2504e0-4f89-41d3-9a0c-0305e82c33{i:02d}" for i in range(cookies)]
    others = others[: cookies - 1]
    middle = (len(others) + 1) // 2
    return "; ".join([*others[:middle], *([session] if session else []), *others[middle:]])


# Storages


class Stores(NamedTuple):
    """Where the servers are; None is a server that can't be had."""

    redis: str | None = None  # URL
    memcached: str | None = None  # HOST:PORT
    valkey: str | None = None  # URL


def _siv(stores: Stores) -> AbstractStorage:
    if IS_REFERENCE:  # has Fernet to offer
        return EncryptedCookieStorage(KEY)
    return EncryptedCookieStorage(KEY, cipher="aes-256-gcm-siv")


def _redis(url: str | None, **options: Any) -> AbstractStorage:
    assert url is not None
    # The default, 100 connections, is too few for the reference package at 256 requests at once.
    return RedisStorage(redis.from_url(url, max_connections=1000), **_supported(options))


def _memcached(address: str | None, **options: Any) -> AbstractStorage:
    assert address is not None
    host, _, port = address.rpartition(":")
    return MemcachedStorage(aiomcache.Client(host, int(port)), **_supported(options))


def _supported(options: dict[str, Any]) -> dict[str, Any]:
    return {} if IS_REFERENCE else options  # the reference package has no such option


def _traced(stores: Stores) -> AbstractStorage:
    """Return a storage in memory that reports to nobody, as where no SDK is configured."""
    storage = MemoryStorage(max_sessions=10**7)
    instrument(storage, tracer_provider=NoOpTracerProvider(), meter_provider=NoOpMeterProvider())
    return storage


STORAGES: dict[str, Callable[[Stores], AbstractStorage]] = {
    "simple": lambda stores: SimpleCookieStorage(),
    "fernet": lambda stores: EncryptedCookieStorage(KEY),
    "siv": _siv,
    "nacl": lambda stores: NaClCookieStorage(KEY),
    "memory": lambda stores: MemoryStorage(max_sessions=10**7, max_bytes=10**10),
    "traced": _traced,
    "redis": lambda stores: _redis(stores.redis),
    "redis merge": lambda stores: _redis(stores.redis, on_conflict="merge"),
    "redis near": lambda stores: _redis(stores.redis, near_cache=10**7),
    "valkey": lambda stores: _redis(stores.valkey),
    "valkey merge": lambda stores: _redis(stores.valkey, on_conflict="merge"),
    "memcached": lambda stores: _memcached(stores.memcached),
    "memcached merge": lambda stores: _memcached(stores.memcached, on_conflict="merge"),
}
SERVERS = {name: name.split()[0] for name in STORAGES if name.split()[0] in Stores._fields}
"""What runs on a server, and on which."""
MERGING = ("redis merge", "valkey merge", "memcached merge")
"""Storages that merge the changes of requests; the reference package overwrites."""
VARIANTS = ("valkey", *MERGING)
"""Storages that differ from another one only in how they write."""
MAIN = tuple(name for name in STORAGES if name not in VARIANTS)
ONLY_HERE = ("memory", "traced")  # the reference package has no such storage


# Operations: the handler, and what it does to a session with the data that it found.


async def bare(request: web.Request) -> web.Response:
    """Answer, without a thought of sessions."""
    return web.Response(text="ok")


async def _read(request: web.Request) -> web.Response:
    session = await get_session(request)
    return web.Response(text=session["login"])


async def _write(request: web.Request) -> web.Response:
    session = await get_session(request)
    session["n"] = 2
    return web.Response(text="ok")


async def _nested_write(request: web.Request) -> web.Response:
    session = await get_session(request)
    session["cart"][0]["n"] += 1
    if IS_REFERENCE:
        session.changed()
    return web.Response(text="ok")


async def _log_in(request: web.Request) -> web.Response:
    session = await new_session(request)
    session.update(_NEWCOMER)
    return web.Response(text="ok")


async def _log_out(request: web.Request) -> web.Response:
    session = await get_session(request)
    session.invalidate()
    return web.Response(text="ok")


_NEWCOMER = session_data(Case.size)


class Meeting:
    """Where the requests of one visitor wait until all of them have arrived."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._loop = asyncio.get_running_loop()
        self._begin()

    def _begin(self) -> None:
        self._arrived = 0
        self._complete = self._loop.create_future()

    async def join(self) -> int:
        """Wait for the other requests, and return how many of them arrived earlier."""
        earlier = self._arrived
        self._arrived += 1
        if self._arrived < self._size:
            await self._complete
        else:
            self._complete.set_result(None)
            self._begin()
            await asyncio.sleep(0)  # The last request goes on in the same tick as the others.
        return earlier


async def _write_own_item(request: web.Request) -> web.Response:
    meeting: Meeting = request["meeting"]
    await meeting.join()  # Now the visitor's earlier requests are answered.
    session = await get_session(request)
    number = await meeting.join()  # Now all requests have loaded the same record.
    session[f"item{number}"] = next(_VALUES)
    return web.Response(text="ok")


async def meet(request: web.Request) -> web.Response:
    """Answer, after two meetings, without a thought of sessions."""
    meeting: Meeting = request["meeting"]
    await meeting.join()
    await meeting.join()
    return web.Response(text="ok")


_VALUES = itertools.cycle(range(100, 1000))  # No write leaves a record as it was.


class Operation(NamedTuple):
    """A handler, and what it does to the session's data, for the check."""

    handler: Callable[[web.Request], Awaitable[web.Response]]
    effect: Callable[[dict[str, Any]], object] = lambda data: None
    answer: Callable[[dict[str, Any]], str] = lambda data: "ok"


OPERATIONS = {
    "untouched": Operation(bare),
    "read": Operation(_read, answer=lambda data: str(data["login"])),
    "write": Operation(_write, lambda data: data.update(n=2)),
    "nested write": Operation(_nested_write, lambda data: data["cart"][0].update(n=2)),
    "new session": Operation(_log_in, lambda data: data.update(_NEWCOMER)),
    "logout": Operation(_log_out, lambda data: data.clear()),
    "one session": Operation(_write_own_item),
}


# Steps: a statement for timeit, what must hold after it, and what of its cost isn't its own.


class Step(NamedTuple):
    """A statement, with the names that `step_names` gives."""

    statement: str
    holds: str
    bare: str = "pass"


def _find(cookies: int) -> Step:
    return Step(
        f"found = load_cookie(next(requests[{cookies}]))",
        "found == 'c3d4'",
        f"found = next(requests[{cookies}])",
    )


STEPS = {
    "find among 1": _find(1),
    "find among 4": _find(4),
    "find among 20": _find(20),
    "render": Step(
        "response = Response(); save_cookie(response, 'c3d4'); "
        "line = response.cookies['AIOHTTP_SESSION'].output(header='')",
        "line == ' AIOHTTP_SESSION=c3d4; HttpOnly; Path=/'",
        "response = Response(); response.cookies",
    ),
    "encode": Step("text = encode(data)", "loads(text) == data"),
    "decode": Step("result = decode(payload)", "result == data"),
    "make a Session": Step(
        "session = Session('c3d4', data=data, new=False)", "session == data['session']"
    ),
    "get": Step("value = session['login']", "value == 'user0'"),
    "set": Step("session['n'] = 2", "session['n'] == 2"),
    "change check": Step("result = is_changed(unchanged)", "result is False"),
}


def step_names() -> dict[str, Any]:
    """Return the names that steps use, but for ``requests``."""
    storage = SimpleCookieStorage()
    data = {"created": 1_700_000_000, "session": session_data(Case.size)}
    names: dict[str, Any] = {
        "data": data,
        "loads": json.loads,
        "payload": json.dumps(data).encode(),
        "load_cookie": storage.load_cookie,
        "save_cookie": storage.save_cookie,
        "Response": web.Response,
        "Session": aiohttp_session.Session,
        "session": aiohttp_session.Session("c3d4", data=data, new=False),
        "unchanged": aiohttp_session.Session("c3d4", data=data, new=False),
    }
    if IS_REFERENCE:
        names["encode"] = lambda data: json.dumps(data).encode("utf-8")
        names["decode"] = lambda payload: json.loads(payload.decode("utf-8"))
        names["is_changed"] = lambda session: session._changed
    else:
        names["encode"] = _core.encode
        names["decode"] = _core.decode
        names["is_changed"] = lambda session: session._needs_save()
    return names


def _all() -> list[Case]:
    operations = [name for name in OPERATIONS if not Case("", name).is_one_session]
    cases = [Case(storage, operation) for storage in MAIN for operation in operations]
    cases += [
        Case(storage, operation, at_once=at_once)
        for at_once in (8, 64)
        for storage in SERVERS
        for operation in operations
        if storage in MAIN or operation == "write"
    ]
    cases += [Case(storage, "one session", at_once=8) for storage in SERVERS]
    cases += [
        Case(storage, operation, size=size)
        for size in (20, 2900)  # the larger just fits into an encrypted cookie
        for storage in MAIN
        for operation in ("read", "write")
    ]
    return cases + [Case("step", name) for name in STEPS]


CASES = _all()
SERVER_CASES = [
    Case(storage, operation, at_once=at_once)
    for at_once in (8, 64)
    for storage in SERVERS
    for operation in ("read", "write")
    if storage != "redis near" and (storage not in MERGING or operation == "write")
]
"""The cases of which the CPU time of the server is measured."""
