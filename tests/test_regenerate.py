"""`Session.regenerate_id`: the data stays, the id goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from aiohttp_session import AbstractStorage, Session, SimpleCookieStorage, get_session
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from tests.contract import KEY, Browser
from tests.stores import MakeStorage, has_mark, make_storage

__all__ = ("make_storage",)


async def test_the_data_move_to_a_new_id_and_a_mark_stays_under_the_old_one(
    make_storage: MakeStorage,
) -> None:
    storage = make_storage()
    browser = Browser(storage)
    await browser.set(cart=["tea"])
    before = browser.cookie
    await browser.do(Session.regenerate_id)
    assert browser.cookie not in {None, before}
    assert await browser.load() == {"cart": ["tea"]}
    assert before is not None
    assert await has_mark(storage, before)


async def test_what_is_set_around_it_is_kept(make_storage: MakeStorage) -> None:
    def log_in(session: Session) -> None:
        session["before"] = 1
        session.regenerate_id()
        session["after"] = 2

    browser = Browser(make_storage())
    await browser.set(a=0)
    before = browser.cookie
    await browser.do(log_in)
    assert browser.cookie != before
    assert await browser.load() == {"a": 0, "before": 1, "after": 2}


async def test_the_session_tells_the_new_id_after_the_save(make_storage: MakeStorage) -> None:
    browser = Browser(make_storage())
    await browser.set(a=1)
    before = browser.cookie

    def regenerate(session: Session) -> Session:
        session.regenerate_id()
        assert session.identity == before
        return session

    session, _ = await browser.do(regenerate)
    assert session.identity == browser.cookie != before


async def test_a_slow_request_with_the_old_id_is_dropped_and_the_user_stays_logged_in(
    make_storage: MakeStorage, caplog: pytest.LogCaptureFixture
) -> None:
    storage = make_storage()
    browser = Browser(storage)
    await browser.set(visits=1)
    before = browser.cookie
    assert before is not None
    loaded, logged_in = asyncio.Event(), asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        (await get_session(request))["visits"] = 2
        loaded.set()
        await logged_in.wait()
        return web.Response()

    def log_in(session: Session) -> None:
        session["user"] = "ann"
        session.regenerate_id()

    visit = asyncio.ensure_future(Browser(storage, before).visit(slow))
    await loaded.wait()
    await browser.do(log_in)
    logged_in.set()
    response = await visit
    assert not response.cookies  # it would replace the new id in the browser
    assert await has_mark(storage, before)
    assert await browser.load() == {"visits": 1, "user": "ann"}
    assert [(r.levelno, before in r.getMessage()) for r in caplog.records] == [
        (logging.WARNING, False)
    ]


async def test_it_brings_back_no_session_that_was_logged_out_meanwhile(
    make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage()
    browser = Browser(storage)
    await browser.set(user="ann")
    other = Browser(storage, browser.cookie)
    created: list[str] = []
    create = storage.store.create

    async def noted(key: str, payload: bytes, ttl: int | None) -> None:
        created.append(key)
        await create(key, payload, ttl)

    monkeypatch.setattr(storage.store, "create", noted)

    async def slow(request: web.Request) -> web.Response:
        (await get_session(request)).regenerate_id()
        await other.do(Session.invalidate)
        return web.Response()

    response = await browser.visit(slow)
    assert not response.cookies
    assert (await browser.load()).new
    assert [await storage.store.read(key) for key in created] == [None]


async def test_the_old_id_never_leads_to_what_was_set_with_it(
    make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage()
    browser = Browser(storage)
    await browser.set(a=1)
    assert browser.cookie is not None
    old_key = storage._keys.get(browser.cookie)
    written: list[bytes] = []
    swap = storage.store.swap

    async def noted(key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        assert key == old_key
        written.append(payload)
        return await swap(key, expected, payload, ttl)

    monkeypatch.setattr(storage.store, "swap", noted)

    def log_in(session: Session) -> None:
        session["user"] = "ann"
        session.regenerate_id()

    await browser.do(log_in)
    assert all(b"ann" not in payload for payload in written)
    assert await browser.load() == {"a": 1, "user": "ann"}


async def test_it_is_harmless_on_a_new_session(make_storage: MakeStorage) -> None:
    browser = Browser(make_storage())
    _, response = await browser.do(Session.regenerate_id)
    assert not response.cookies

    def log_in(session: Session) -> None:
        session.regenerate_id()
        session["user"] = "ann"

    await browser.do(log_in)
    assert await browser.load() == {"user": "ann"}


async def test_an_id_that_somebody_planted_is_never_adopted(make_storage: MakeStorage) -> None:
    browser = Browser(make_storage(), "planted")

    def log_in(session: Session) -> None:
        session["user"] = "ann"
        session.regenerate_id()

    await browser.do(log_in)
    assert browser.cookie != "planted"
    assert await browser.load() == {"user": "ann"}


async def test_a_session_that_was_stored_within_the_request_gets_a_new_id_too(
    make_storage: MakeStorage,
) -> None:
    storage = make_storage()
    ids: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        session["a"] = 1
        await storage.save_session(request, web.Response(), session)
        ids.append(str(session.identity))
        session.regenerate_id()
        return web.Response()

    browser = Browser(storage)
    await browser.visit(handler)
    assert browser.cookie != ids[0]
    assert await has_mark(storage, ids[0])
    assert await browser.load() == {"a": 1}


async def test_a_redirect_after_log_in_carries_the_new_id(make_storage: MakeStorage) -> None:
    browser = Browser(make_storage())
    await browser.set(a=1)
    before = browser.cookie

    async def handler(request: web.Request) -> web.Response:
        (await get_session(request)).regenerate_id()
        raise web.HTTPFound("/")

    with pytest.raises(web.HTTPFound):
        await browser.visit(handler)
    assert browser.cookie != before
    assert await browser.load() == {"a": 1}


async def test_an_error_leaves_the_old_id_in_place(make_storage: MakeStorage) -> None:
    browser = Browser(make_storage())
    await browser.set(a=1)

    async def handler(request: web.Request) -> web.Response:
        (await get_session(request)).regenerate_id()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await browser.visit(handler)
    assert await browser.load() == {"a": 1}


@pytest.mark.parametrize(
    "make",
    [
        SimpleCookieStorage,
        lambda: EncryptedCookieStorage(KEY),
        lambda: EncryptedCookieStorage(KEY, cipher="aes-256-gcm-siv"),
        lambda: NaClCookieStorage(KEY),
    ],
    ids=["simple", "fernet", "siv", "nacl"],
)
async def test_a_cookie_is_sealed_again(make: Callable[[], AbstractStorage]) -> None:
    storage = make()
    browser = Browser(storage)
    await browser.set(a=1)
    before = browser.cookie
    _, response = await browser.do(Session.regenerate_id)
    assert storage.cookie_name in response.cookies
    if not isinstance(storage, SimpleCookieStorage):
        assert browser.cookie != before
    assert await browser.load() == {"a": 1}


async def test_a_lifetime_goes_on_through_a_new_id(make_storage: MakeStorage, clock: Any) -> None:
    browser = Browser(make_storage(lifetime=100))
    await browser.set(a=1)
    clock.now += 60
    await browser.do(Session.regenerate_id)
    assert await browser.load() == {"a": 1}
    clock.now += 60
    assert await browser.load() == {}
