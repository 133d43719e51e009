"""``hash_ids``: a copy of the store holds no usable session."""

from __future__ import annotations

import hashlib
import json
from operator import methodcaller

import pytest
from aiohttp import web

from aiohttp_session import new_session
from aiohttp_session.memory_storage import MemoryStorage
from tests.contract import NAME, Browser
from tests.stores import MakeStorage, make_storage

__all__ = ("make_storage",)


def key_of(identity: str) -> str:
    return f"{NAME}_{hashlib.sha256(identity.encode()).hexdigest()}"


async def test_a_record_is_kept_under_the_hash_of_its_id(make_storage: MakeStorage) -> None:
    storage = make_storage(hash_ids=True)
    browser = Browser(storage)
    await browser.set(a=1)
    assert browser.cookie is not None
    record = await storage.store.read(key_of(browser.cookie))
    assert record is not None
    assert browser.cookie.encode() not in record
    assert await storage.store.read(f"{NAME}_{browser.cookie}") is None
    assert await browser.load() == {"a": 1}


async def test_nothing_in_the_store_is_worth_anything_as_a_cookie() -> None:
    storage = MemoryStorage(hash_ids=True)
    browser = Browser(storage)
    await browser.set(a=1)
    for key in storage.store._records:
        thief = Browser(storage, key.removeprefix(f"{NAME}_"))
        assert (await thief.load()).new


@pytest.mark.parametrize("action", ["invalidate", "regenerate_id", "clear"])
async def test_a_record_that_is_over_is_deleted(make_storage: MakeStorage, action: str) -> None:
    storage = make_storage(hash_ids=True)
    browser = Browser(storage)
    await browser.set(a=1)
    before = str(browser.cookie)
    await browser.do(methodcaller(action))
    record = await storage.store.read(key_of(before))
    if action == "regenerate_id":
        assert record is not None
        assert json.loads(record) == {"moved": key_of(str(browser.cookie)).removeprefix(f"{NAME}_")}
        assert await browser.load() == {"a": 1}
        assert await storage.store.read(key_of(str(browser.cookie))) is not None
    else:
        assert record is None


async def test_a_new_session_deletes_the_old_record(make_storage: MakeStorage) -> None:
    async def handler(request: web.Request) -> web.Response:
        (await new_session(request))["b"] = 2
        return web.Response()

    storage = make_storage(hash_ids=True)
    browser = Browser(storage)
    await browser.set(a=1)
    before = str(browser.cookie)
    await browser.visit(handler)
    assert await storage.store.read(key_of(before)) is None
    assert await browser.load() == {"b": 2}


async def test_long_ids_make_short_keys(make_storage: MakeStorage) -> None:
    identity = "x" * (249 - len(NAME))
    storage = make_storage(hash_ids=True, key_factory=lambda: identity)
    browser = Browser(storage)
    await browser.set(a=1)
    assert browser.cookie == identity
    assert await browser.load() == {"a": 1}
