"""EncryptedCookieStorage with Fernet: the contract, and what is its own."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.fernet import Fernet, InvalidToken

from aiohttp_session.cookie_storage import EncryptedCookieStorage
from tests.conftest import Clock
from tests.contract import KEY, NAME, Browser, Encrypted, EncryptedSiv, StorageContract

OTHER_KEY = bytes(range(1, 33))
TEXT_KEY = base64.urlsafe_b64encode(KEY).decode()


class TestEncryptedCookieStorage(Encrypted, StorageContract):
    pass


class TestEncryptedCookieStorageWithGcmSiv(EncryptedSiv, StorageContract):
    pass


async def test_the_cookie_is_a_fernet_token_of_the_payload(clock: Clock) -> None:
    response = await Browser(EncryptedCookieStorage(KEY)).set(a="\xe4")
    token = response.cookies[NAME].value
    fernet = Fernet(base64.urlsafe_b64encode(KEY))
    payload = fernet.decrypt(token)
    assert json.loads(payload) == {"created": 1_700_000_000, "session": {"a": "\xe4"}}
    assert fernet.extract_timestamp(token) == 1_700_000_000


async def test_tokens_of_others_are_read() -> None:
    payload = json.dumps({"created": 1_600_000_000, "session": {"a": "\xe4"}, "more": 1})
    token = Fernet(TEXT_KEY).encrypt(payload.encode()).decode()
    for cookie in (token, f'"{token}"'):
        session = await Browser(EncryptedCookieStorage(KEY), cookie).load()
        assert session == {"a": "\xe4"}
        assert (session.created, session.new, session.identity) == (1_600_000_000, False, None)


@pytest.mark.parametrize("key", [KEY, bytearray(KEY), TEXT_KEY, Fernet(TEXT_KEY), [KEY]])
async def test_kinds_of_keys(key: Any) -> None:
    browser = Browser(EncryptedCookieStorage(secret_key=key))
    await browser.set(a=1)
    browser.storage = EncryptedCookieStorage(KEY)
    assert await browser.load() == {"a": 1}


def test_a_fernet_object_is_taken_as_it_is() -> None:
    fernet = Fernet(TEXT_KEY)
    assert EncryptedCookieStorage(fernet)._fernet is fernet


async def test_two_cookies_of_one_session_differ() -> None:
    storage = EncryptedCookieStorage(KEY)
    assert storage.seal(b"{}") != storage.seal(b"{}")


async def test_the_content_does_not_show() -> None:
    response = await Browser(EncryptedCookieStorage(KEY)).set(a="swordfish")
    token = response.cookies[NAME].value
    assert b"swordfish" not in base64.urlsafe_b64decode(token)
    with pytest.raises(InvalidToken):
        Fernet(base64.urlsafe_b64encode(OTHER_KEY)).decrypt(token)


async def test_a_new_fernet_on_a_live_storage_logs_everybody_out() -> None:
    storage = EncryptedCookieStorage(KEY)
    browser = Browser(storage)
    await browser.set(a=1)
    storage._fernet = Fernet(Fernet.generate_key())
    assert await browser.load() == {}
    await browser.set(a=2)
    assert await browser.load() == {"a": 2}


@pytest.mark.parametrize(
    ("seconds", "valid"), [(0, True), (10, True), (11, False), (-60, True), (-61, False)]
)
async def test_the_age_of_the_token_counts(seconds: int, valid: bool, clock: Clock) -> None:
    storage = EncryptedCookieStorage(KEY, max_age=10)
    cookie = storage.seal(b'{"created": 1700000000, "session": {"a": 1}}')
    clock.now += seconds
    assert bool(await Browser(storage, cookie).load()) is valid


async def test_without_max_age_the_age_of_the_token_does_not_count(clock: Clock) -> None:
    storage = EncryptedCookieStorage(KEY)
    cookie = storage.seal(b'{"session": {"a": 1}}')
    for clock.now in (0, 3e9):
        assert await Browser(storage, cookie).load() == {"a": 1}
