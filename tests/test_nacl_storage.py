"""NaClCookieStorage: the contract, and what is its own."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from nacl.secret import SecretBox

from aiohttp_session import Session
from aiohttp_session.nacl_storage import NaClCookieStorage
from tests.conftest import Clock
from tests.contract import KEY, NAME, Browser, NaCl, StorageContract


class TestNaClCookieStorage(NaCl, StorageContract):
    pass


async def test_the_cookie_is_a_secret_box_of_the_payload_in_base64(clock: Clock) -> None:
    response = await Browser(NaClCookieStorage(KEY)).set(a="\xe4")
    sealed = base64.b64decode(response.cookies[NAME].value, validate=True)
    payload = SecretBox(KEY).decrypt(sealed)
    assert json.loads(payload) == {"created": 1_700_000_000, "session": {"a": "\xe4"}}


async def test_cookies_of_others_are_read() -> None:
    payload = json.dumps({"created": 1_600_000_000, "session": {"a": "\xe4"}, "more": 1})
    cookie = base64.b64encode(SecretBox(KEY).encrypt(payload.encode())).decode()
    for value in (cookie, f'"{cookie}"'):
        session = await Browser(NaClCookieStorage(KEY), value).load()
        assert session == {"a": "\xe4"}
        assert (session.created, session.new, session.identity) == (1_600_000_000, False, None)


@pytest.mark.parametrize("key", [KEY, bytearray(KEY), [KEY]])
async def test_kinds_of_keys(key: Any) -> None:
    browser = Browser(NaClCookieStorage(secret_key=key))
    await browser.set(a=1)
    browser.storage = NaClCookieStorage(KEY)
    assert await browser.load() == {"a": 1}


def test_two_cookies_of_one_session_differ() -> None:
    storage = NaClCookieStorage(KEY)
    assert storage.seal(b"{}") != storage.seal(b"{}")


async def test_a_new_secret_box_on_a_live_storage_logs_everybody_out() -> None:
    storage = NaClCookieStorage(KEY)
    browser = Browser(storage)
    await browser.set(a=1)
    storage._secretbox = SecretBox(bytes(32))
    assert await browser.load() == {}
    await browser.set(a=2)
    assert await browser.load() == {"a": 2}


def test_a_cookie_has_one_form() -> None:
    storage = NaClCookieStorage(KEY)
    cookie = storage.seal(b"123")
    assert cookie.endswith("==")
    assert storage.open(cookie) == (b"123", None)
    others = [cookie.rstrip("="), cookie + "=", cookie + "\n", " " + cookie, cookie + "AAAA"]
    others += [cookie[:9] + "." + cookie[9:], cookie.replace("=", "", 1) + "A"]
    for other in others:
        assert storage.open(other) is None


def test_an_empty_session() -> None:
    session = NaClCookieStorage(KEY, max_age=5).empty_session()
    assert isinstance(session, Session)
    assert (session, session.new, session.max_age) == (Session(None, data=None, new=True), True, 5)
