"""Keys that rotate."""

from __future__ import annotations

import base64
import os
from typing import Any, TypeAlias

import pytest
from cryptography.fernet import Fernet, MultiFernet
from nacl.secret import Aead, SecretBox

from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from tests.contract import Browser

OLD, NEW, OTHER = (bytes([number]) * 32 for number in (1, 2, 3))

Maker: TypeAlias = Any


def make_fernet(key: Any) -> EncryptedCookieStorage:
    return EncryptedCookieStorage(key)


def make_siv(key: Any) -> EncryptedCookieStorage:
    return EncryptedCookieStorage(key, cipher="aes-256-gcm-siv")


MAKERS = pytest.mark.parametrize("make", [make_fernet, make_siv, NaClCookieStorage])


@MAKERS
@pytest.mark.parametrize("kind", [list, tuple])
async def test_every_key_opens_and_the_first_seals(make: Maker, kind: Any) -> None:
    browser = Browser(make(OLD))
    await browser.set(a=1)
    rotating = browser.storage = make(kind([NEW, OTHER, OLD]))
    assert await browser.load() == {"a": 1}
    await browser.set(b=2)
    browser.storage = make(NEW)
    assert await browser.load() == {"a": 1, "b": 2}
    assert make(OLD).open(rotating.seal(b"{}")) is None


@MAKERS
async def test_a_key_that_was_dropped_opens_nothing(make: Maker) -> None:
    browser = Browser(make(OLD))
    await browser.set(a=1)
    browser.storage = make([NEW, OTHER])
    assert (await browser.load()).new


@MAKERS
@pytest.mark.parametrize("key", [[], ()])
def test_an_empty_sequence_is_refused(make: Maker, key: Any) -> None:
    with pytest.raises(ValueError, match="empty sequence"):
        make(key)


@MAKERS
@pytest.mark.parametrize("key", [[NEW, b"short"], b"short", b"", [b"x" * 33]])
def test_every_key_must_have_32_bytes(make: Maker, key: Any) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        make(key)


@MAKERS
@pytest.mark.parametrize("key", [[32], [None], [[NEW]]])
def test_a_key_of_another_type_is_refused(make: Maker, key: Any) -> None:
    with pytest.raises(TypeError, match="key must be"):
        make(key)


@pytest.mark.parametrize("make", [make_fernet, make_siv])
def test_one_key_may_be_written_in_three_ways(make: Maker) -> None:
    sealed = make(NEW).seal(b"{}")
    text = base64.urlsafe_b64encode(NEW).decode()
    for key in (NEW, bytearray(NEW), text, [text], (bytearray(NEW),)):
        opened = make(key).open(sealed)
        assert opened is not None
        assert opened[0] == b"{}"


@pytest.mark.parametrize("key", ["", "x", "ä" * 32, "=" * 44, NEW.hex(), "A" * 43])
def test_text_that_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="32 bytes in urlsafe base64"):
        EncryptedCookieStorage(key)


async def test_a_multifernet_is_taken_as_it_is() -> None:
    fernets = [Fernet(base64.urlsafe_b64encode(key)) for key in (NEW, OLD)]
    multi = MultiFernet(fernets)
    storage = EncryptedCookieStorage(multi)
    used: object = storage._fernet  # typed as in the reference package
    assert used is multi
    assert storage.open(make_fernet(OLD).seal(b"{}")) is not None
    assert make_fernet(NEW).open(storage.seal(b"{}")) is not None


@MAKERS
@pytest.mark.parametrize("keys", [OLD, [OLD, OTHER]])
async def test_a_new_key_assigned_on_a_live_storage_logs_everybody_out(
    make: Maker, keys: Any
) -> None:
    browsers = [Browser(make(keys)), Browser(make_fernet(OTHER))]
    if make is NaClCookieStorage:
        browsers[1].storage = make(OTHER)
    for browser in browsers:
        await browser.set(a=1)
    storage = browsers[0].storage
    if isinstance(storage, NaClCookieStorage):
        storage._secretbox = SecretBox(NEW)
    else:
        storage._fernet = Fernet(base64.urlsafe_b64encode(NEW))  # type: ignore[attr-defined]
    for browser in browsers:
        browser.storage = storage
        assert (await browser.load()).new
        await browser.set(b=2)
        assert await browser.load() == {"b": 2}


async def test_an_assigned_box_of_another_kind_is_used_as_it_is() -> None:
    browser = Browser(NaClCookieStorage(OLD))
    browser.storage._secretbox = Aead(NEW)  # type: ignore[attr-defined]
    await browser.set(a=1)
    assert browser.cookie is not None
    assert Aead(NEW).decrypt(base64.b64decode(browser.cookie.strip('"')))
    assert await browser.load() == {"a": 1}


@pytest.mark.parametrize("size", [0, 1, 23, 24, 39, 40, 100])
def test_a_nacl_cookie_of_any_size_is_only_refused(size: int) -> None:
    storage = NaClCookieStorage([NEW, OLD])
    assert storage.open(base64.b64encode(os.urandom(size)).decode()) is None


def test_nacl_cookies_are_what_a_secret_box_makes() -> None:
    storage = NaClCookieStorage(NEW)
    assert SecretBox(NEW).decrypt(base64.b64decode(storage.seal(b"{}"))) == b"{}"
    sealed = base64.b64encode(SecretBox(NEW).encrypt(b"{}")).decode()
    assert storage.open(sealed) == (b"{}", None)
