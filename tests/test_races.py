"""Requests of several processes on one store, in every order of their operations.

Each operation on the store waits until hypothesis lets it go on; now and then it is done and its
answer lost, or it is lost itself, or the process dies there. What must hold then is checked
against what was acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from aiohttp_session import Session, UnsettledError, get_session, new_session
from aiohttp_session.server_storage import ServerStorage
from aiohttp_session.stores.memory import MemoryStore
from tests.contract import Browser

OWNER = "ann"


class Gates(MemoryStore):
    """A store whose operations wait for their turn while it is contended."""

    def __init__(self) -> None:
        super().__init__(max_records=100_000)
        self.waiting: list[tuple[str, asyncio.Future[str]]] = []
        self.is_contended = False

    async def read(self, key: str) -> bytes | None:
        record: bytes | None = await self._pass("read", lambda: MemoryStore.read(self, key))
        return record

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        await self._pass("write", lambda: MemoryStore.create(self, key, payload, ttl))

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        done: bool = await self._pass(
            "write", lambda: MemoryStore.swap(self, key, expected, payload, ttl)
        )
        return done

    async def delete(self, key: str) -> None:
        await self._pass("delete", lambda: MemoryStore.delete(self, key))

    async def _pass(self, kind: str, operate: Callable[[], Awaitable[Any]]) -> Any:
        if not self.is_contended:
            return await operate()
        gate: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.waiting.append((kind, gate))
        fate = await gate
        if fate == "lost":
            raise UnsettledError
        result = await operate()
        if fate == "unanswered":
            raise UnsettledError
        return result

    async def contend(self, draw: Callable[[Any], Any], *tasks: asyncio.Task[Any]) -> None:
        """Let the operations of tasks go on in any order, until the tasks are done."""
        faults = 2
        while not all(task.done() for task in tasks):
            for _ in range(20):  # more turns than lie between two operations
                await asyncio.sleep(0)
            self.waiting = [(kind, gate) for kind, gate in self.waiting if not gate.done()]
            if not self.waiting:
                continue
            kind, gate = self.waiting.pop(draw(st.integers(0, len(self.waiting) - 1)))
            fate = "done"
            if faults:
                fates = ["lost", "unanswered"] if kind == "write" else []
                fate = draw(st.sampled_from(["done", "done", "done", *fates, "dies"]))
                faults -= fate != "done"
            if fate == "dies":
                gate.cancel()
            else:
                gate.set_result(fate)


@contextlib.contextmanager
def contended(store: Gates) -> Iterator[None]:
    store.is_contended = True
    try:
        yield
    finally:
        store.is_contended = False


async def attempt(action: Awaitable[Any]) -> Any:
    """Return the result, or None if it was not acknowledged."""
    try:
        return await action
    except (UnsettledError, asyncio.CancelledError):
        return None


def become(owner: str) -> Callable[[Session], None]:
    def log_in(session: Session) -> None:
        session["user"] = owner
        session.owner = owner

    return log_in


def add(key: str) -> Callable[[Session], None]:
    return lambda session: session.update({key: 1})


def nest(session: Session) -> None:
    session.setdefault("list", []).append(1)


def move(session: Session) -> None:
    session.regenerate_id()


def leave(session: Session) -> None:
    session.invalidate()


async def replace(browser: Browser) -> object:
    async def handler(request: web.Request) -> web.Response:
        (await new_session(request))["y"] = 1
        return web.Response()

    return await browser.visit(handler)


async def end_others(browser: Browser) -> object:
    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        if session.owner is not None:
            await storage_of(browser).end_sessions(session.owner, keep=session)
        return web.Response()

    return await browser.visit(handler)


async def end_latest(browser: Browser) -> object:
    for info in (await storage_of(browser).sessions_of(OWNER))[:1]:
        await storage_of(browser).end_session(OWNER, info.handle)
    return True


def storage_of(browser: Browser) -> ServerStorage:
    assert isinstance(browser.storage, ServerStorage)
    return browser.storage


ACTIONS: dict[str, Callable[[Browser], Awaitable[object]]] = {
    "add": lambda browser: browser.do(add("x")),
    "nest": lambda browser: browser.do(nest),
    "move": lambda browser: browser.do(move),
    "leave": lambda browser: browser.do(leave),
    "read": lambda browser: browser.do(lambda session: None),
    "replace": replace,
    "end others": end_others,
    "end latest": end_latest,
}


async def is_alive(store: Gates, cookie: str | None) -> bool:
    """Tell whether a cookie leads to a session in which somebody is logged in."""
    session, _ = await Browser(ServerStorage(store), cookie).do(lambda session: session)
    return "user" in session


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: 0)


MODES = st.sampled_from(["overwrite", "merge"])


@settings(settings.get_profile("orders"))
@given(data=st.data(), mode=MODES)
async def test_no_session_survives_the_end_of_all(data: st.DataObject, mode: Any) -> None:
    """Neither one that is used, moved or left meanwhile, nor by a log-in that is under way."""
    store = Gates()

    def process() -> ServerStorage:
        return ServerStorage(store, on_conflict=mode, max_age=1000)

    before: list[Browser] = []
    cookies = []
    for _ in range(data.draw(st.integers(1, 3))):
        browser = Browser(process())
        await browser.do(become(OWNER))
        before.append(browser)
        cookies.append(browser.cookie)
    tasks = []
    fresh = [Browser(process()) for _ in range(data.draw(st.integers(0, 2)))]
    with contended(store):
        for cookie in cookies.copy():
            for name in data.draw(st.lists(st.sampled_from([*ACTIONS]), max_size=2)):
                before.append(Browser(process(), cookie))
                tasks.append(asyncio.ensure_future(attempt(ACTIONS[name](before[-1]))))
        tasks += [asyncio.ensure_future(attempt(browser.do(become(OWNER)))) for browser in fresh]
        end = asyncio.ensure_future(attempt(process().end_sessions(OWNER)))
        await store.contend(data.draw, end, *tasks)
    if end.result() is not None:
        for cookie in (*cookies, *(browser.cookie for browser in before)):
            assert not await is_alive(store, cookie)
    # Whatever is left can be ended next time.
    await process().end_sessions(OWNER)
    for browser in fresh:
        assert not await is_alive(store, browser.cookie)


@settings(settings.get_profile("orders"))
@given(data=st.data(), mode=MODES)
async def test_deleted_stays_deleted(data: st.DataObject, mode: Any) -> None:
    """After a log-out was acknowledged, the session is gone under each id that it ever had."""
    store = Gates()
    browser = Browser(ServerStorage(store, on_conflict=mode))
    await browser.set(user=OWNER)
    cookie = browser.cookie
    names = data.draw(st.lists(st.sampled_from([*ACTIONS]), min_size=1, max_size=3))
    requests = [Browser(ServerStorage(store, on_conflict=mode), cookie) for _ in names]
    with contended(store):
        tasks = [
            asyncio.ensure_future(attempt(ACTIONS[name](request)))
            for request, name in zip(requests, names, strict=True)
        ]
        out = asyncio.ensure_future(attempt(browser.do(leave)))
        await store.contend(data.draw, out, *tasks)
    if out.result() is not None:
        for one in (cookie, *(request.cookie for request in requests)):
            assert not await is_alive(store, one)


@settings(settings.get_profile("orders"))
@given(data=st.data())
async def test_merging_loses_nothing_that_was_acknowledged(data: st.DataObject) -> None:
    store = Gates()
    browser = Browser(ServerStorage(store, on_conflict="merge"))
    await browser.set(a=1)
    keys = ["b", "c", "d"][: data.draw(st.integers(1, 3))]
    moves = data.draw(st.booleans())
    requests = [Browser(ServerStorage(store, on_conflict="merge"), browser.cookie) for _ in keys]
    mover = Browser(ServerStorage(store, on_conflict="merge"), browser.cookie)
    with contended(store):
        tasks = [
            asyncio.ensure_future(attempt(request.do(add(key))))
            for request, key in zip(requests, keys, strict=True)
        ]
        moving = asyncio.ensure_future(attempt(mover.do(move if moves else add("e"))))
        await store.contend(data.draw, moving, *tasks)
    session, _ = await Browser(browser.storage, mover.cookie).do(dict)
    if moves and moving.result() is None:
        return  # the mark may be there, and nobody know the new id: an error was the answer
    assert session.get("a") == 1
    for key, request, task in zip(keys, requests, tasks, strict=True):
        # One that comes after the move gets no cookie, or that of a session of its own.
        saved = task.result() is not None and task.result()[1].cookies
        if saved and request.cookie == browser.cookie:
            assert key in session


@settings(settings.get_profile("orders"))
@given(data=st.data(), most=st.integers(1, 3))
async def test_no_more_sessions_than_allowed(data: st.DataObject, most: int) -> None:
    store = Gates()
    browsers = [
        Browser(ServerStorage(store, max_per_owner=most))
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    with contended(store):
        tasks = [asyncio.ensure_future(attempt(browser.do(become(OWNER)))) for browser in browsers]
        await store.contend(data.draw, *tasks)
    storage = ServerStorage(store, max_per_owner=most)
    alive = [browser for browser in browsers if await is_alive(store, browser.cookie)]
    listed = await storage.sessions_of(OWNER)
    assert len(alive) <= len(listed)
    await Browser(storage).do(become(OWNER))
    assert len(await storage.sessions_of(OWNER)) <= most
