"""``on_conflict="merge"``: concurrent requests of one session lose nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from operator import methodcaller
from typing import Any

import pytest
from aiohttp import web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_session import ConflictError, Session, get_session, saving, setup
from aiohttp_session.server_storage import ServerStorage
from tests.contract import NAME, Browser, spy
from tests.stores import MakeStorage, YieldingStorage, make_storage, stored
from tests.waiting import turns

__all__ = ("make_storage",)

Change = Callable[[Session], object]


async def race(store: ServerStorage, start: dict[str, Any], *changes: Change) -> Session:
    """Load one session for each of these changes, save them one after the other; load it again."""
    browser = Browser(store)
    await browser.set(**start)

    def nest(changes: tuple[Change, ...]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handler(request: web.Request) -> web.Response:
            session = await get_session(request)
            if len(changes) > 1:
                await Browser(store, browser.cookie).visit(nest(changes[1:]))
            changes[0](session)
            return web.Response()

        return handler

    first = browser.cookie
    await browser.visit(nest(changes))
    return await Browser(store, browser.cookie or first).load()


def put(**items: Any) -> Change:
    return lambda session: session.update(items)


def drop(*keys: str) -> Change:
    return lambda session: [session.pop(key) for key in keys]


def nested(session: Session) -> None:
    session["cart"].append("tea")


@pytest.mark.parametrize(
    ("start", "changes", "result"),
    [
        ({}, [put(a=1)], {"a": 1}),
        ({"x": 0}, [put(a=1), put(b=2), put(c=3)], {"x": 0, "a": 1, "b": 2, "c": 3}),
        ({"x": 0}, [put(x=1), put(x=2)], {"x": 1}),
        ({"x": 1}, [put(x=True), put(b=2)], {"x": True, "b": 2}),
        ({"x": 0, "y": 0}, [drop("x"), put(a=1)], {"y": 0, "a": 1}),
        ({"x": 0, "y": 0}, [put(a=1), drop("x")], {"y": 0, "a": 1}),
        ({"x": 0, "y": 0}, [drop("x"), put(x=1)], {"y": 0}),
        ({"x": 0, "y": 0}, [put(x=1), drop("x")], {"x": 1, "y": 0}),
        ({"cart": []}, [nested, put(a=1)], {"cart": ["tea"], "a": 1}),
        ({"cart": []}, [put(a=1), nested], {"cart": ["tea"], "a": 1}),
        ({"x": 0}, [drop("x"), put(a=1)], {"a": 1}),
        ({"x": 0}, [put(a=1), drop("x")], {"a": 1}),
        ({"x": 0, "y": 0}, [drop("x"), drop("y")], {}),
        ({"x": 0}, [methodcaller("changed"), put(a=1)], {"x": 0, "a": 1}),
        ({"x": 0}, [methodcaller("regenerate_id"), put(a=1)], {"x": 0, "a": 1}),
        (
            {"x": 0},
            [put(a=1), methodcaller("regenerate_id")],
            {},
        ),
        ({"x": 0}, [methodcaller("invalidate"), put(a=1)], {}),
        ({"x": 0}, [put(a=1), methodcaller("invalidate")], {}),
    ],
)
async def test_merging(
    make_storage: MakeStorage, start: dict[str, Any], changes: list[Change], result: dict[str, Any]
) -> None:
    session = await race(make_storage(on_conflict="merge"), {"_": 0, **start}, *changes)
    kept = dict(session)
    assert kept.pop("_", 0) == 0
    assert kept == result
    assert {key: type(value) for key, value in kept.items()} == {
        key: type(value) for key, value in result.items()
    }


async def test_by_default_the_last_save_overwrites(make_storage: MakeStorage) -> None:
    session = await race(make_storage(), {"x": 0}, put(a=1), put(b=2))
    assert session == {"x": 0, "a": 1}


async def test_the_request_itself_sees_what_was_merged(make_storage: MakeStorage) -> None:
    store = make_storage(on_conflict="merge")
    browser = Browser(store)
    await browser.set(x=0)
    other = Browser(store, browser.cookie)
    kept: list[Session] = []

    async def handler(request: web.Request) -> web.Response:
        kept.append(await get_session(request))
        await other.set(b=2)
        kept[0]["a"] = 1
        return web.Response()

    await browser.visit(handler)
    assert kept == [{"x": 0, "a": 1, "b": 2}]


async def test_a_max_age_that_another_request_set_is_kept(make_storage: MakeStorage) -> None:
    def remember(session: Session) -> None:
        session["remember"] = True
        session.max_age = 5000

    session = await race(
        make_storage(on_conflict="merge", max_age=100), {"x": 0}, put(a=1), remember
    )
    assert session == {"x": 0, "a": 1, "remember": True}
    assert session.max_age == 5000


async def test_emptying_leaves_no_record_for_long(
    make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_storage(on_conflict="merge")
    browser = Browser(store)
    await browser.set(x=0)
    before = str(browser.cookie)
    _, response = await browser.do(Session.clear)
    assert response.cookies[NAME]["max-age"] == "0"
    record = await stored(store, before)
    assert record is not None
    assert record.startswith(b'{"emptied":')
    session = await Browser(store, before).load()
    assert (session.new, session.identity) == (True, None)


@pytest.mark.parametrize("on_conflict", ["merge", "overwrite"])
async def test_without_a_conflict_a_save_is_one_operation(
    make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch, on_conflict: str
) -> None:
    store = make_storage(on_conflict=on_conflict)
    browser = Browser(store)
    await browser.set(x=0)
    calls = spy(monkeypatch, store)
    await browser.set(x=1)
    assert calls == ["read", "swap"]


async def test_a_conflict_costs_one_more_read_and_one_more_swap(
    make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_storage(on_conflict="merge")
    calls = spy(monkeypatch, store, "swap", "delete")
    await race(store, {"x": 0}, put(a=1), put(b=2))
    assert calls == ["swap", "swap", "swap"]


async def test_a_record_that_always_changes_is_an_error_in_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def sleep(seconds: float) -> None:
        assert 0 <= seconds <= 0.02

    async def swap(*args: object) -> bool:
        return False

    monkeypatch.setattr(saving, "sleep", sleep)
    store = YieldingStorage(on_conflict="merge")
    browser = Browser(store)
    await browser.set(x="secret")
    monkeypatch.setattr(store.store, "swap", swap)
    with pytest.raises(ConflictError, match="could not be changed in 100 attempts") as raised:
        await browser.set(y="secret")
    assert "secret" not in str(raised.value)
    assert await browser.load() == {"x": "secret"}


async def test_a_record_that_became_garbage_is_replaced(make_storage: MakeStorage) -> None:
    store = make_storage(on_conflict="merge")
    browser = Browser(store)
    await browser.set(x=0)
    key = store._keys.get(str(browser.cookie))

    async def handler(request: web.Request) -> web.Response:
        (await get_session(request))["a"] = 1
        await store.store.create(key, b"[garbage", None)
        return web.Response()

    await browser.visit(handler)
    assert await browser.load() == {"a": 1}


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="'overwrite' or 'merge', not 'ask'"):
        YieldingStorage(on_conflict="ask")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"hash_ids": True}, {"encoder": json.dumps}])
async def test_fifty_requests_at_once_each_add_a_key(
    make_storage: MakeStorage, aiohttp_client: AiohttpClient, options: dict[str, Any]
) -> None:
    loaded = 0
    everybody = asyncio.Event()

    async def add(request: web.Request) -> web.Response:
        nonlocal loaded
        session = await get_session(request)
        key = request.match_info["key"]
        session[f"key{key}"] = int(key)
        loaded += 1
        if loaded == 50:
            everybody.set()
        await everybody.wait()
        return web.Response()

    async def begin(request: web.Request) -> web.Response:
        (await get_session(request))["begun"] = True
        return web.Response()

    async def show(request: web.Request) -> web.Response:
        return web.json_response(dict(await get_session(request)))

    app = web.Application()
    setup(app, make_storage(on_conflict="merge", **options))
    app.router.add_get("/begin", begin)
    app.router.add_get("/add/{key}", add)
    app.router.add_get("/show", show)
    client = await aiohttp_client(app)
    await client.get("/begin")
    responses = await asyncio.gather(*(client.get(f"/add/{key}") for key in range(50)))
    assert {response.status for response in responses} == {200}
    session = await (await client.get("/show")).json()
    assert session == {"begun": True, **{f"key{key}": key for key in range(50)}}


async def test_five_hundred_requests_at_once_each_add_a_key(make_storage: MakeStorage) -> None:
    store = make_storage(on_conflict="merge")
    browser = Browser(store)
    await browser.set(begun=True)
    loaded = 0
    everybody = asyncio.Event()

    async def add(number: int) -> None:
        async def handler(request: web.Request) -> web.Response:
            nonlocal loaded
            session = await get_session(request)
            session[f"key{number}"] = number
            loaded += 1
            if loaded == 500:
                everybody.set()
            await everybody.wait()
            return web.Response()

        await Browser(store, browser.cookie).visit(handler)

    await asyncio.gather(*(add(number) for number in range(500)))
    session = await browser.load()
    assert session == {"begun": True, **{f"key{number}": number for number in range(500)}}


async def test_a_merge_that_is_cancelled_lets_the_next_one_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = YieldingStorage(on_conflict="merge")
    browser = Browser(store)
    await browser.set(x=0)
    swap, held = store.store.swap, asyncio.Event()

    async def slow(*args: Any) -> bool:
        held.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(store.store, "swap", slow)
    first = asyncio.ensure_future(Browser(store, browser.cookie).set(a=1))
    await held.wait()
    second = asyncio.ensure_future(Browser(store, browser.cookie).set(b=1))
    await turns()
    monkeypatch.setattr(store.store, "swap", swap)
    first.cancel()
    await second
    assert await browser.load() == {"x": 0, "b": 1}
