"""`Session.invalidate` and `new_session`: the old session is over, here and in the browser."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from aiohttp_session import (
    AbstractStorage,
    Session,
    SimpleCookieStorage,
    get_session,
    new_session,
)
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from tests.contract import KEY, Browser, is_deletion
from tests.stores import MakeStorage, make_storage, stored

__all__ = ("make_storage",)

Step = Callable[[web.Request], Awaitable[None]]


async def invalidate(request: web.Request) -> None:
    (await get_session(request)).invalidate()


async def invalidate_twice(request: web.Request) -> None:
    await invalidate(request)
    await invalidate(request)


async def change_and_invalidate(request: web.Request) -> None:
    (await get_session(request))["last"] = "words"
    await invalidate(request)


async def renew(request: web.Request) -> None:
    await new_session(request)


async def renew_twice(request: web.Request) -> None:
    (await new_session(request))["first"] = 1
    await new_session(request)


async def get_and_renew(request: web.Request) -> None:
    (await get_session(request))["lost"] = 1
    await new_session(request)


async def invalidate_and_renew(request: web.Request) -> None:
    await invalidate(request)
    await renew(request)


async def renew_and_invalidate(request: web.Request) -> None:
    (await new_session(request))["lost"] = 1
    await invalidate(request)


async def regenerate_and_invalidate(request: web.Request) -> None:
    (await get_session(request)).regenerate_id()
    await invalidate(request)


ENDINGS = [
    invalidate,
    invalidate_twice,
    change_and_invalidate,
    renew,
    renew_twice,
    get_and_renew,
    invalidate_and_renew,
    renew_and_invalidate,
    regenerate_and_invalidate,
]


@pytest.fixture(params=ENDINGS, ids=lambda step: step.__name__)
def end(request: pytest.FixtureRequest) -> Step:
    step: Step = request.param
    return step


def as_handler(step: Step, response: web.Response | None = None) -> Any:
    async def handler(request: web.Request) -> web.Response:
        await step(request)
        if isinstance(response, web.HTTPException):
            raise response
        return response or web.Response()

    return handler


async def test_the_record_and_the_cookie_are_deleted(make_storage: MakeStorage, end: Step) -> None:
    storage = make_storage()
    browser = Browser(storage)
    await browser.set(a=1)
    before = str(browser.cookie)
    response = await browser.visit(as_handler(end))
    assert is_deletion(response)
    assert await stored(storage, before) is None
    assert (await Browser(storage, before).load()).new


async def test_so_they_are_with_a_redirect(make_storage: MakeStorage, end: Step) -> None:
    storage = make_storage()
    browser = Browser(storage)
    await browser.set(a=1)
    before = str(browser.cookie)
    with pytest.raises(web.HTTPFound) as raised:
        await browser.visit(as_handler(end, web.HTTPFound("/")))
    assert is_deletion(raised.value)
    assert await stored(storage, before) is None


async def test_an_error_keeps_the_session(make_storage: MakeStorage, end: Step) -> None:
    async def handler(request: web.Request) -> web.Response:
        await end(request)
        raise ZeroDivisionError

    browser = Browser(make_storage())
    await browser.set(a=1)
    with pytest.raises(ZeroDivisionError):
        await browser.visit(handler)
    assert await browser.load() == {"a": 1}


async def test_what_is_written_after_has_a_new_id_and_nothing_of_the_old(
    make_storage: MakeStorage, end: Step
) -> None:
    async def handler(request: web.Request) -> web.Response:
        await end(request)
        (await get_session(request))["b"] = 2
        return web.Response()

    storage = make_storage()
    browser = Browser(storage)
    await browser.set(a=1)
    before = str(browser.cookie)
    await browser.visit(handler)
    assert browser.cookie not in {None, before}
    assert await stored(storage, before) is None
    assert await browser.load() == {"b": 2}


async def test_without_a_session_there_is_nothing_to_end(
    make_storage: MakeStorage, end: Step
) -> None:
    response = await Browser(make_storage()).visit(as_handler(end))
    assert not response.cookies


@pytest.mark.parametrize("cookie", ["unknown", "", "x" * 300, "a b", '"\\303\\244"', "../../etc"])
async def test_a_cookie_that_leads_nowhere_is_deleted(
    make_storage: MakeStorage, end: Step, cookie: str
) -> None:
    response = await Browser(make_storage(hash_ids=True), cookie).visit(as_handler(end))
    assert is_deletion(response)


async def test_other_sessions_stay(make_storage: MakeStorage, end: Step) -> None:
    storage = make_storage()
    browser, other = Browser(storage), Browser(storage)
    await browser.set(a=1)
    await other.set(b=2)
    await browser.visit(as_handler(end))
    assert await other.load() == {"b": 2}


async def test_a_session_stored_within_the_request_is_deleted(make_storage: MakeStorage) -> None:
    storage = make_storage()
    ids: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        session["a"] = 1
        response = web.Response()
        await storage.save_session(request, response, session)
        ids.append(str(session.identity))
        session.invalidate()
        return response

    browser = Browser(storage)
    response = await browser.visit(handler)
    assert is_deletion(response)
    assert await stored(storage, ids[0]) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: EncryptedCookieStorage(KEY),
        lambda: EncryptedCookieStorage(KEY, cipher="aes-256-gcm-siv"),
        lambda: NaClCookieStorage(KEY),
    ],
    ids=["fernet", "siv", "nacl"],
)
async def test_a_sealed_cookie_is_deleted_or_replaced(
    make: Callable[[], AbstractStorage], end: Step
) -> None:
    storage = make()

    async def write_after(request: web.Request) -> None:
        await end(request)
        (await get_session(request))["b"] = 2

    browser = Browser(storage)
    await browser.set(a=1)
    assert is_deletion(await browser.visit(as_handler(end)))
    await browser.set(a=1)
    await browser.visit(as_handler(write_after))
    assert await browser.load() == {"b": 2}
    assert is_deletion(await Browser(storage, "garbage").visit(as_handler(end)))
    assert not (await Browser(storage).visit(as_handler(end))).cookies


async def test_a_plain_cookie_is_emptied(end: Step) -> None:
    browser = Browser(SimpleCookieStorage())
    await browser.set(a=1)
    response = await browser.visit(as_handler(end))
    assert response.cookies["AIOHTTP_SESSION"].value == "{}"


@pytest.mark.parametrize(
    ("options", "attributes"),
    [
        ({}, ["HttpOnly", "Path=/"]),
        ({"httponly": False, "path": "/app"}, ["Path=/app"]),
        ({"domain": "example.com"}, ["Domain=example.com", "HttpOnly", "Path=/"]),
        ({"max_age": 600, "samesite": "Lax"}, ["HttpOnly", "Path=/", "SameSite=Lax"]),
        (
            {"cookie_name": "__Host-sid", "secure": True, "partitioned": True, "samesite": "None"},
            ["HttpOnly", "Partitioned", "Path=/", "SameSite=None", "Secure"],
        ),
    ],
)
async def test_a_deletion_has_the_attributes_of_the_cookie(
    options: dict[str, Any], attributes: list[str], end: Step
) -> None:
    storage = MemoryStorage(**options)
    browser = Browser(storage)
    await browser.set(a=1)
    response = await browser.visit(as_handler(end))
    name, *rest = response.cookies[storage.cookie_name].OutputString().split("; ")
    assert name == f'{storage.cookie_name}=""'
    assert sorted(rest) == sorted(
        [*attributes, "Max-Age=0", "expires=Thu, 01 Jan 1970 00:00:00 GMT"]
    )


async def test_a_new_lifetime_begins(make_storage: MakeStorage, clock: Any) -> None:
    def start_over(session: Session) -> None:
        session.invalidate()
        session["b"] = 2

    browser = Browser(make_storage(lifetime=100))
    await browser.set(a=1)
    clock.now += 60
    await browser.do(start_over)
    clock.now += 60
    assert await browser.load() == {"b": 2}
