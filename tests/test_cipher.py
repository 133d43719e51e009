"""Cookies sealed with AES-256-GCM-SIV."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.fernet import Fernet, MultiFernet
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from aiohttp_session import cookie_storage
from aiohttp_session._core import seal_siv
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from tests.conftest import Clock
from tests.contract import Browser

KEY = bytes(range(32))
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def make(key: Any = KEY, **options: Any) -> EncryptedCookieStorage:
    return EncryptedCookieStorage(key, **{"cipher": "aes-256-gcm-siv", **options})


def seal(plain: bytes, version: bytes = b"\1", name: bytes = b"AIOHTTP_SESSION") -> str:
    """Seal as the documented format says, by other means."""
    info = b"aiohttp-session aes-256-gcm-siv"
    key = HKDF(SHA256(), 32, salt=None, info=info).derive(KEY)
    nonce = bytes(12)
    sealed = version + nonce + AESGCMSIV(key).encrypt(nonce, plain, version + name)
    return base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()


def test_the_format_is_as_documented(clock: Clock) -> None:
    sealed = seal((1_600_000_000).to_bytes(8, "big") + b"{}")
    assert make().open(sealed) == (b"{}", 1_600_000_000)
    raw = base64.urlsafe_b64decode(make().seal(b"{}") + "==")
    assert len(raw) == 1 + 12 + 8 + 2 + 16
    assert raw[:1] == b"\1"


def test_a_message_too_short_for_a_time_is_not_opened() -> None:
    assert make().open(seal(bytes(8))) == (b"", 0)
    assert make().open(seal(bytes(7))) is None


@pytest.mark.parametrize("size", [0, 11, 13])
def test_a_nonce_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="nonce"):
        seal_siv(lambda *_: b"", bytes(size), 1, b"{}", "N")


@given(st.binary(max_size=200))
def test_what_was_sealed_can_be_opened(payload: bytes) -> None:
    storage = make()
    cookie = storage.seal(payload)
    opened = storage.open(cookie)
    assert opened is not None
    assert opened[0] == payload
    assert set(cookie) <= set(ALPHABET)


def test_the_same_payload_is_never_sealed_the_same() -> None:
    storage = make()
    assert len({storage.seal(b"{}") for _ in range(500)}) == 500


def test_threads_never_share_a_nonce() -> None:
    storage = make()
    with ThreadPoolExecutor(8) as threads:
        cookies = threads.map(lambda _: [storage.seal(b"{}") for _ in range(300)], range(8))
        assert len({cookie for some in cookies for cookie in some}) == 8 * 300


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_draws_nonces_of_its_own() -> None:
    script = """
import os
from aiohttp_session.cookie_storage import EncryptedCookieStorage

storage = EncryptedCookieStorage(bytes(32), cipher="aes-256-gcm-siv")
storage.seal(b"{}")
is_child = os.fork() == 0
nonces = [storage.seal(b"{}")[1:17] for _ in range(20)]
if not is_child:
    os.wait()
print(*nonces, flush=True)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert len(set(run.stdout.split())) == 40


@pytest.mark.parametrize("size", [5, 6, 7])
def test_no_changed_character_is_accepted(size: int) -> None:
    storage = make()
    cookie = storage.seal(bytes(size))
    for position, letter in enumerate(cookie):
        others = ALPHABET if position > len(cookie) - 3 else ALPHABET[ALPHABET.find(letter) - 1]
        for other in {*others, "+", "/", "=", "~", " ", "ä"} - {letter}:
            assert storage.open(cookie[:position] + other + cookie[position + 1 :]) is None


@pytest.mark.parametrize("size", [5, 6, 7])
def test_nothing_may_be_added_or_missing(size: int) -> None:
    storage = make()
    cookie = storage.seal(bytes(size))
    for position in range(len(cookie) + 1):
        assert position == len(cookie) or storage.open(cookie[:position]) is None
        for extra in ("=", "==", "A", "\n", " ", "====", "AAAA"):
            assert storage.open(cookie[:position] + extra + cookie[position:]) is None


def test_the_standard_alphabet_is_no_other_form_of_a_cookie() -> None:
    storage = make()
    cookies = [storage.seal(bytes(100)) for _ in range(20)]
    altered = {cookie.replace("-", "+").replace("_", "/") for cookie in cookies} - {*cookies}
    assert altered
    assert {storage.open(cookie) for cookie in altered} == {None}


@given(st.text() | st.text(ALPHABET).map("A".__add__) | st.binary().map(repr))
def test_nothing_is_raised_for_any_text(text: str) -> None:
    assert make().open(text) is None
    assert EncryptedCookieStorage(Fernet(base64.urlsafe_b64encode(KEY))).open(text) is None


@given(st.binary(max_size=64).map(lambda rest: b"\1" + rest))
def test_nothing_is_raised_for_any_bytes_of_the_right_version(sealed: bytes) -> None:
    assert make().open(base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()) is None


@pytest.mark.parametrize("version", [b"\0", b"\2", b"\x03", b"\x80"])
def test_other_versions_are_refused(version: bytes) -> None:
    assert make().open(seal(bytes(8) + b"{}", version)) is None


async def test_a_cookie_is_worth_nothing_under_another_name() -> None:
    user, admin = Browser(make(cookie_name="user")), Browser(make(cookie_name="admin"))
    await user.set(a=1)
    admin.cookie = user.cookie
    assert (await admin.load()).new


def test_another_key_opens_nothing() -> None:
    assert make(bytes(32)).open(make().seal(b"{}")) is None


@pytest.mark.parametrize(
    ("age", "is_accepted"), [(100, True), (101, False), (-60, True), (-61, False)]
)
async def test_the_time_of_sealing_is_checked(clock: Clock, age: int, is_accepted: bool) -> None:
    browser = Browser(make(max_age=100))
    # Its own account of itself is younger.
    payload = b'{"created":%d,"session":{"a":1}}' % (clock.now + age)
    browser.cookie = browser.storage.seal(payload)  # type: ignore[attr-defined]
    clock.now += age
    assert (await browser.load() == {"a": 1}) is is_accepted


async def test_without_max_age_the_time_of_sealing_does_not_matter(clock: Clock) -> None:
    browser = Browser(make())
    await browser.set(a=1)
    clock.now += 10**9
    assert await browser.load() == {"a": 1}
    clock.now -= 2 * 10**9
    assert await browser.load() == {"a": 1}


@pytest.mark.parametrize("reader", ["fernet", "aes-256-gcm-siv"])
@pytest.mark.parametrize("writer", ["fernet", "aes-256-gcm-siv"])
@pytest.mark.parametrize("max_age", [None, 100])
async def test_either_setting_reads_both_and_writes_its_own(
    writer: str, reader: str, max_age: int | None
) -> None:
    browser = Browser(make(cipher=writer, max_age=max_age))
    await browser.set(a=1)
    browser.storage = make(cipher=reader, max_age=max_age)
    assert await browser.load() == {"a": 1}
    await browser.set(b=2)
    assert browser.cookie is not None
    assert browser.cookie.strip('"').startswith("gAAA" if reader == "fernet" else "A")
    assert await browser.load() == {"a": 1, "b": 2}


def test_the_last_step_of_a_move_refuses_fernet() -> None:
    fernet, siv = EncryptedCookieStorage(KEY), make()
    last = make(accept_fernet=False)
    assert last.open(fernet.seal(b"{}")) is None
    for storage in (last, siv, fernet):
        opened = storage.open(last.seal(b"{}"))
        assert opened is not None
        assert opened[0] == b"{}"


def test_fernet_that_is_assigned_after_the_last_step_is_used_as_it_is() -> None:
    storage = make(accept_fernet=False)
    storage._fernet = Fernet(base64.urlsafe_b64encode(KEY))
    assert storage.open(storage.seal(b"{}")) is not None


def test_what_would_read_nothing_that_it_seals_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^accept_fernet=False needs cipher='aes-256-gcm-siv'$"):
        EncryptedCookieStorage(KEY, accept_fernet=False)


@pytest.mark.parametrize("kind", ["Fernet", "MultiFernet"])
def test_fernet_objects_do_fernet_alone(kind: str) -> None:
    fernet = Fernet(base64.urlsafe_b64encode(KEY))
    key = fernet if kind == "Fernet" else MultiFernet([fernet])
    with pytest.raises(ValueError, match="needs the secret key, not a Fernet object"):
        make(key)
    assert EncryptedCookieStorage(key).open(make().seal(b"{}")) is None


def test_an_unknown_cipher_is_refused() -> None:
    with pytest.raises(ValueError, match="'fernet' or 'aes-256-gcm-siv', not 'rot13'"):
        make(cipher="rot13")


def test_an_openssl_without_it_is_an_error_at_construction(monkeypatch: Any) -> None:
    def refuse(key: bytes) -> None:
        raise UnsupportedAlgorithm("AES-GCM-SIV is not supported by this version of OpenSSL")

    sealed = make().seal(b"{}")
    monkeypatch.setattr(cookie_storage, "AESGCMSIV", refuse)
    with pytest.raises(ValueError, match=r"needs OpenSSL 3\.2"):
        make()
    storage = EncryptedCookieStorage(KEY)
    assert storage.open(sealed) is None
    assert storage.open(storage.seal(b"{}")) is not None


@settings(settings.get_profile("storages"))
@given(st.dictionaries(st.text(), st.text() | st.integers()))
async def test_sessions_come_back(data: dict[str, Any]) -> None:
    browser = Browser(make())
    await browser.set(x=data)
    assert (await browser.load())["x"] == data
