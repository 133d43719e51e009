"""SimpleCookieStorage: the contract, and what is its own."""

from __future__ import annotations

import json
from http.cookies import SimpleCookie
from typing import Any

import pytest

from aiohttp_session import SimpleCookieStorage
from tests.conftest import Clock
from tests.contract import NAME, Browser, Simple, StorageContract


class TestSimpleCookieStorage(Simple, StorageContract):
    empty_is_deleted = False


async def test_the_cookie_is_plain_json_in_ascii(clock: Clock) -> None:
    response = await Browser(SimpleCookieStorage()).set(a="\xe4", b=[1, None])
    value = response.cookies[NAME].value
    assert value == '{"created":1700000000,"session":{"a":"\\u00e4","b":[1,null]}}'


async def test_an_emptied_session_is_written_as_an_empty_object() -> None:
    browser = Browser(SimpleCookieStorage())
    await browser.set(a=1)
    _, response = await browser.do(lambda session: session.clear())
    assert response.cookies[NAME].OutputString() == f'{NAME}="{{}}"; HttpOnly; Path=/'


@pytest.mark.parametrize(
    ("cookie", "items", "new", "created"),
    [
        ('{"created": 1600000000, "session": {"a": 1}}', {"a": 1}, False, 1_600_000_000),
        ('{"session":{"a":[1,{}]},"more":[]}', {"a": [1, {}]}, False, 1_700_000_000),
        ('{"session":null}', {}, False, 1_700_000_000),
        ('{"created":null,"session":{"a":1}}', {"a": 1}, False, 1_700_000_000),
        ("{}", {}, True, 1_700_000_000),
        ('{"session":{"a":"\xe4"}}', {"a": "\xe4"}, False, 1_700_000_000),
        ('{"session":{"a":NaN}}', None, False, 1_700_000_000),
    ],
)
async def test_cookies_of_others_are_read(
    cookie: str, items: Any, new: bool, created: int, clock: Clock
) -> None:
    session = await Browser(SimpleCookieStorage(), SimpleCookie().value_encode(cookie)[1]).load()
    if items is not None:
        assert session == items
    else:
        assert json.dumps(dict(session)) == '{"a": NaN}'
    assert (session.new, session.created, session.identity) == (new, created, None)


async def test_the_encoder_s_text_is_the_cookie() -> None:
    storage = SimpleCookieStorage(encoder=json.dumps)
    response = await Browser(storage).set(a="\xe4")
    assert response.cookies[NAME].value.endswith('"session": {"a": "\\u00e4"}}')
