"""The options that `recommended` gives."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from aiohttp import web
from redis.asyncio import Redis

from aiohttp_session import SimpleCookieStorage, recommended
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from aiohttp_session.redis_storage import RedisStorage
from tests.conftest import Clock
from tests.contract import KEY, Browser


def storages() -> list[Any]:
    # Spelt out, so that mypy sees each.
    return [
        MemoryStorage(**recommended()),
        RedisStorage(Redis(), **recommended(on_conflict="merge")),
        EncryptedCookieStorage(KEY, **recommended(server=False)),
        NaClCookieStorage(KEY, **recommended(server=False, samesite="Strict")),
        SimpleCookieStorage(**recommended(server=False)),
    ]


@pytest.mark.parametrize("number", range(5))
def test_every_storage_takes_them_and_browsers_have_nothing_against_them(number: int) -> None:
    response = web.Response()
    storage = storages()[number]
    storage.save_cookie(response, "x", max_age=storage.max_age)
    words = set(response.cookies["__Host-id"].OutputString().split("; "))
    assert {"__Host-id=x", "HttpOnly", "Secure", "Path=/", "Max-Age=1800"} <= words
    assert words & {"SameSite=Lax", "SameSite=Strict"}


def test_on_localhost_two_are_taken_off() -> None:
    response = web.Response()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        storage = MemoryStorage(**recommended(cookie_name="id", secure=False))
        storage.save_cookie(response, "x")
    text = response.cookies["id"].OutputString()
    assert text == "id=x; HttpOnly; Max-Age=1800; Path=/; SameSite=Lax"


async def test_a_session_in_use_lives_for_eight_hours_and_an_idle_one_for_half_an_hour(
    clock: Clock,
) -> None:
    sealed = NaClCookieStorage(KEY, **recommended(server=False))
    for storage in (MemoryStorage(**recommended()), sealed):
        busy, idle = Browser(storage), Browser(storage)
        await busy.set(a=1)
        await idle.set(a=1)
        for minute in range(0, 8 * 60, 20):
            assert (await busy.do(dict))[0] == {"a": 1}, minute
            clock.now += 20 * 60
        assert (await busy.do(dict))[0] == {}
        await idle.set(a=1)
        clock.now += 30 * 60 + 1
        assert (await idle.do(dict))[0] == {}
