"""Private names of other packages: which are used, and what happens without them."""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import aiomcache
import pytest
from aiohttp import web
from redis.asyncio import Redis
from redis.asyncio.connection import Connection

import aiohttp_session
from aiohttp_session import _set_cookie, middleware
from aiohttp_session.stores._redis_client import Pool, is_pipelined
from aiohttp_session.stores.memcached import MemcachedStore
from aiohttp_session.stores.redis import RedisStore
from benchmarks.servers import HOST

ROOT = Path(__file__).parent.parent

# By module: what is used, and whose it is.
DOORS = {
    "middleware.py": {
        "request._state": "aiohttp",
        "web.BaseRequest._seen_str_keys": "aiohttp",
    },
    "_set_cookie.py": {
        "Morsel._reserved": "http.cookies",
        "Morsel._flags": "http.cookies",
        "morsel._key": "http.cookies",
        "morsel._value": "http.cookies",
        "morsel._coded_value": "http.cookies",
        "written._key": "http.cookies",
        "written._value": "http.cookies",
        "written._coded_value": "http.cookies",
    },
    "stores/_redis_checkout.py": {"connection._writer": "redis-py, valkey"},
    "stores/_redis_client.py": {
        "connection._writer": "redis-py, valkey",
        "connection._reader": "redis-py, valkey",
        "connection._parser": "redis-py, valkey",
    },
    "stores/_redis_pipeline.py": {
        "connection._writer": "redis-py, valkey",
        "connection._reader": "redis-py, valkey",
        "self._connection._parser": "redis-py, valkey",
    },
    "stores/memcached.py": {
        "client._pool": "aiomcache",
        "self._client._pool": "aiomcache",
        "pool._host": "aiomcache",
        "pool._port": "aiomcache",
        "pool._maxsize": "aiomcache",
    },
}
# What names objects of this package, or is public in spite of its underscore (NamedTuple).
OWN = re.compile(
    r"((self|cls|session|storage|newer|previous|one|other|key|super\(\)|type\(self\)|self\._keys)\._\w+"
    r"|AbstractStorage\._\w+|.*\._replace|morsel\._style)"
)


def uses(path: Path) -> set[str]:
    """Return what a module uses of names with an underscore, except by ``self``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"getattr", "hasattr", "setattr"}
            and isinstance(node.args[1], ast.Constant)
        ):
            owner, name = node.args[0], str(node.args[1].value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_inside":
            owner, name = ast.Name("Morsel"), ast.literal_eval(node.args[0])
        else:
            continue
        if name.startswith("_") and not name.startswith("__"):
            found.add(f"{ast.unparse(owner)}.{name}")
    return {use for use in found if not OWN.fullmatch(use)}


def test_the_table_has_every_private_name_that_is_used() -> None:
    package = Path(aiohttp_session.__file__).parent
    found = {
        str(path.relative_to(package).as_posix()): uses(path) for path in package.rglob("*.py")
    }
    assert {name: used for name, used in found.items() if used} == {
        name: set(doors) for name, doors in DOORS.items()
    }


def test_the_extensions_use_none() -> None:
    for path in (ROOT / "src_ext").glob("*.p*"):
        code = re.sub(r"#.*", "", path.read_text("utf-8"))
        used = set(re.findall(r"(?<![\w.])([\w.]+\._[a-z]\w*)", code))
        ours = r"(self|session|key|future)\._|_\w+_py\.(\w+\.)?_"
        assert {use for use in used if not re.match(ours, use)} == set()


# A program, to run where another package is changed before it is imported. It prints what it sees.
PROGRAM = """
import asyncio, logging
from aiohttp import DummyCookieJar, web
from aiohttp.test_utils import TestClient, TestServer

logging.basicConfig(level=logging.INFO, format="LOG %(name)s %(message)s")
{change}
from aiohttp_session import SimpleCookieStorage, get_session, middleware, setup
from aiohttp_session import _set_cookie

async def count(request):
    session = await get_session(request)
    session["n"] = session.get("n", 0) + 1
    return web.json_response(session["n"])

async def leave(request):
    (await get_session(request)).invalidate()
    return web.Response()

async def main():
    for options in ({{}}, {{"max_age": 60, "samesite": "Lax"}}, {{"partitioned": True}}):
        app = web.Application()
        setup(app, SimpleCookieStorage(cookie_name="__Host-n", secure=True, **options))
        app.router.add_get("/", count)
        app.router.add_get("/leave", leave)
        cookies = {{}}
        async with TestClient(TestServer(app), cookie_jar=DummyCookieJar()) as client:
            for path in ("/", "/", "/leave", "/"):
                response = await client.get(path, cookies=cookies)
                cookies = {{name: m.value for name, m in response.cookies.items() if m.value}}
                lines = [line.split("; ") for line in response.headers.getall("Set-Cookie", [])]
                said = [[part for part in line if "expires" not in part] for line in lines]
                print(path, await response.text(), [without_times(line) for line in said])

def without_times(parts):
    return sorted(re.sub("[0-9]{{9,}}", "", part) for part in parts)

import re
print("OPEN", middleware._PlainRequest is not None, _set_cookie._MORSEL_IS_KNOWN)
asyncio.run(main())
"""

RENAMED_MORSEL = """
import http.cookies, inspect, re
text = inspect.getsource(http.cookies)
changed = re.sub(r"{0}", "_of_another_name", text)
assert changed != text
exec(compile(changed, "http/cookies.py", "exec"), http.cookies.__dict__)
for module in (web, __import__("aiohttp.web_response").web_response,
               __import__("aiohttp._cookie_helpers")._cookie_helpers,
               __import__("aiohttp.web_request").web_request,
               __import__("aiohttp.helpers").helpers):
    for name in ("Morsel", "SimpleCookie", "BaseCookie"):
        if hasattr(module, name):
            setattr(module, name, getattr(http.cookies, name))
"""

CLOSED = {
    "no key in _state": 'web.Request.ATTRS = frozenset(web.Request.ATTRS - {"_state"})',
    "_state of another shape": """
        def set_item(self, key, value): self._state.setdefault("keys", {})[key] = value
        def get(self, key, default=None): return self._state.get("keys", {}).get(key, default)
        def get_item(self, key): return self._state["keys"][key]
        web.BaseRequest.__setitem__, web.BaseRequest.get = set_item, get
        web.BaseRequest.__getitem__ = get_item
        web.BaseRequest.__contains__ = lambda self, key: key in self._state.get("keys", {})
    """,
    "_state that is refused": """
        def refuse(self, key, value, old=web.BaseRequest.__setitem__):
            if not hasattr(self, "_message"): raise RuntimeError
            old(self, key, value)
        web.BaseRequest.__setitem__ = refuse
    """,
    "no _seen_str_keys": """
        web.BaseRequest.__setitem__ = lambda self, key, value: self._state.update({key: value})
        del web.BaseRequest._seen_str_keys
    """,
    "_seen_str_keys of another shape": """
        web.BaseRequest.__setitem__ = lambda self, key, value: self._state.update({key: value})
        web.BaseRequest._seen_str_keys = ()
    """,
    "Morsel's _reserved": RENAMED_MORSEL.format(r"\b_reserved\b")
    # aiohttp itself asks what is in it.
    + "http.cookies.Morsel._reserved = frozenset(http.cookies.Morsel._of_another_name)",
    "Morsel's _flags": RENAMED_MORSEL.format(r"\b_flags\b"),
    "Morsel's _key": RENAMED_MORSEL.format(r"\b_key\b"),
    "Morsel's _value": RENAMED_MORSEL.format(r"\b_value\b"),
    "Morsel's _coded_value": RENAMED_MORSEL.format(r"\b_coded_value\b"),
}


def run(change: str) -> tuple[list[str], list[str], str]:
    """Run the program; return what it saw, what the package logged, and which doors were open."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(change=textwrap.dedent(change))],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    logged = [line for line in done.stderr.splitlines() if "known" in line]
    first, *lines = done.stdout.splitlines()
    return lines, logged, first


@pytest.fixture(scope="module")
def usual() -> list[str]:
    lines, logged, first = run("")
    assert (logged, first) == ([], "OPEN True True")
    assert len(lines) == 12
    return lines


@pytest.mark.once
@pytest.mark.parametrize("door", CLOSED)
def test_behind_a_closed_door_all_is_as_usual(door: str, usual: list[str]) -> None:
    lines, logged, first = run(CLOSED[door])
    assert lines == usual
    if "_seen" in door:
        assert (logged, first) == ([], "OPEN True True")
    else:
        assert len(logged) == 1
        assert first == ("OPEN True False" if "Morsel" in door else "OPEN False True")


class Other:
    """Stands where something else was."""


async def use(store: Any, key: str) -> None:
    await store.create(key, b"1", 60)
    assert await store.read(key) == b"1"
    assert await store.swap(key, b"1", b"2", 60)
    assert await store.swap(key, b"2", b"3", 60)
    assert not await store.swap(key, b"2", b"4", 60)
    assert await store.read(key) == b"3"
    await store.delete(key)
    assert await store.read(key) is None


@pytest.mark.parametrize("shape", ["missing", "other"])
@pytest.mark.parametrize("name", ["_pool", "_host", "_port", "_maxsize", "conn_args"])
async def test_aiomcache_is_used_by_its_calls(
    name: str,
    shape: str,
    memcached_server: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "aiohttp_session")
    client = aiomcache.Client(HOST, memcached_server.port)
    holder = client if name == "_pool" else client._pool
    value = getattr(holder, name)
    if shape == "missing":
        delattr(holder, name)
    else:
        setattr(holder, name, Other())
    store = MemcachedStore(client)
    setattr(holder, name, value)  # which its own calls need
    assert store._is_plain is False
    await use(store, f"door-{name}-{shape}")
    assert len([r for r in caplog.records if "not known" in r.getMessage()]) == 1
    await store.finish()
    await client.close()


@pytest.mark.parametrize("shape", ["missing", "other"])
@pytest.mark.parametrize("name", ["_writer", "_reader", "_parser"])
async def test_redis_is_used_by_its_connections_methods(
    name: str,
    shape: str,
    redis_server: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from aiohttp_session.stores import _redis_client, _redis_pipeline
    from aiohttp_session.stores._redis_checkout import Checkout

    caplog.set_level("INFO", "aiohttp_session")
    monkeypatch.setattr(_redis_client, "told", set())

    class Closed:
        """A connection, seen from outside."""

        def __init__(self, connection: Connection) -> None:
            self.connection = connection

        def __getattr__(self, attribute: str) -> Any:
            if attribute != name:
                return getattr(self.connection, attribute)
            if shape == "missing":
                raise AttributeError(attribute)
            return Other()

    is_pipelined = _redis_client.is_pipelined
    seen = []

    def look(connection: Connection) -> bool:
        kind = type("Connection", (Closed,), {})
        kind.send_packed_command = Connection.send_packed_command  # type: ignore[attr-defined]
        kind.read_response = Connection.read_response  # type: ignore[attr-defined]
        seen.append(is_pipelined(kind(connection)))
        return seen[-1]

    monkeypatch.setattr("aiohttp_session.stores._redis_server.is_pipelined", look)
    prepare = Checkout._prepare

    async def prepare_closed(self: Checkout, connection: Any) -> None:
        await prepare(self, Closed(connection))

    monkeypatch.setattr(Checkout, "_prepare", prepare_closed)
    monkeypatch.setattr(_redis_pipeline, "PipelinedConnection", None)
    client = Redis(host=HOST, port=redis_server.port)
    store = RedisStore(client)
    await use(store, f"door-{name}-{shape}")
    assert seen
    assert not any(seen)
    assert len([r for r in caplog.records if "own methods" in r.getMessage()]) == 1
    await store.finish()
    await client.aclose()


async def test_a_connection_that_somebody_else_listens_to_is_not_pipelined(
    redis_server: Any,
) -> None:
    client: Any = Redis(host=HOST, port=redis_server.port)
    pool = Pool(client.connection_pool, is_copied=False)
    connection = await pool.acquire()
    assert is_pipelined(connection)
    transport = connection._writer.transport
    stream = transport.get_protocol()
    transport.set_protocol(asyncio.Protocol())
    assert not is_pipelined(connection)
    transport.set_protocol(stream)
    await pool.release(connection)
    await client.aclose()


def test_what_requests_keep_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert middleware._find_plain_request() is web.Request
    with monkeypatch.context() as patch:
        patch.setattr(web.Request, "ATTRS", frozenset(web.Request.ATTRS - {"_state"}))
        assert middleware._find_plain_request() is None

    def refuse(self: web.Request, key: str, value: object) -> None:
        raise RuntimeError

    def ignore(self: web.Request, key: str, value: object) -> None:
        """Keep it elsewhere."""

    for change in (refuse, ignore):
        with monkeypatch.context() as patch:
            patch.setattr(web.BaseRequest, "__setitem__", change)
            assert middleware._find_plain_request() is None


def test_what_a_morsel_is_inside_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _set_cookie._is_morsel_known()
    monkeypatch.setattr(_set_cookie._WrittenMorsel, "_reserved", {})
    assert not _set_cookie._is_morsel_known()
    monkeypatch.delattr(_set_cookie._WrittenMorsel, "_key")
    assert not _set_cookie._is_morsel_known()
