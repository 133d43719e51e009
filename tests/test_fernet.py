"""Fernet tokens: what storages with keys make and take, held against cryptography's own Fernet."""

from __future__ import annotations

import base64
import itertools
import json
import os
import pickle
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import cryptography_vectors
import pytest
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC, ECB
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiohttp_session.cookie_storage import EncryptedCookieStorage
from tests.conftest import Clock

# The second has the signing half of the first, and so passes its MACs; the third is of its own.
KEYS = [bytes(range(32)), bytes(range(16)) + bytes(range(50, 66)), bytes(range(100, 132))]
FERNETS = [Fernet(base64.urlsafe_b64encode(key)) for key in KEYS]
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
TEXTS = settings(settings.get_profile("texts"))


# The published vectors


def vectors(name: str) -> list[dict[str, Any]]:
    folder = Path(cryptography_vectors.__file__).parent / "fernet"
    found: list[dict[str, Any]] = json.loads((folder / name).read_text(encoding="ascii"))
    assert found
    return found


def seconds(vector: dict[str, Any]) -> int:
    return int(datetime.fromisoformat(vector["now"]).timestamp())


@pytest.mark.parametrize("vector", vectors("generate.json"))
def test_generate(vector: dict[str, Any], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = EncryptedCookieStorage(vector["secret"])
    # What comes out for the random block is the IV: so the block is what gives the vector's.
    aes = AES(base64.urlsafe_b64decode(vector["secret"])[16:])
    block = Cipher(aes, ECB()).decryptor().update(bytes(vector["iv"]))
    monkeypatch.setattr(os, "urandom", {16: block}.__getitem__)
    clock.now = seconds(vector)
    assert storage.seal(vector["src"].encode()) == vector["token"]


@pytest.mark.parametrize("vector", vectors("verify.json"))
def test_verify(vector: dict[str, Any]) -> None:
    opened = EncryptedCookieStorage(vector["secret"]).open(vector["token"])
    assert opened is not None
    assert opened[0] == vector["src"].encode()
    assert 0 <= seconds(vector) - opened[1] <= vector["ttl_sec"]


@pytest.mark.parametrize("vector", vectors("invalid.json"), ids=lambda vector: vector["desc"])
def test_invalid(vector: dict[str, Any]) -> None:
    opened = EncryptedCookieStorage(vector["secret"]).open(vector["token"])
    # The time of a token is judged where the session is made of it.
    if opened is not None:
        assert not -60 <= seconds(vector) - opened[1] <= vector["ttl_sec"]


# Against cryptography's own


def expected(keys: list[Fernet], token: str) -> tuple[bytes, int] | None:
    """Tell what cryptography makes of a token."""
    try:
        payload = MultiFernet(keys).decrypt(token.encode("ascii"))
    except (InvalidToken, ValueError):
        return None
    return payload, int.from_bytes(base64.urlsafe_b64decode(token)[1:9], "big")


def check(token: str) -> None:
    for count in (1, 3):
        storage = EncryptedCookieStorage(KEYS[:count])
        # Twice: the contexts have seen something by then.
        for _ in range(2):
            assert storage.open(token) == expected(FERNETS[:count], token)


SEALED = st.builds(
    lambda fernet, data, now: fernet.encrypt_at_time(data, now).decode(),
    st.sampled_from(FERNETS),
    st.binary(max_size=50),
    st.integers(0, 2**40) | st.integers(0, 2**64 - 1),
)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "cut", "extend"]),
        st.integers(0, 300) | st.integers(-5, -1),
        st.text(DIGITS + "+/= \n\0.é", min_size=1, max_size=4),
    ),
    max_size=3,
)


def edit(token: str, edits: list[tuple[str, int, str]]) -> str:
    for kind, position, text in edits:
        before, after = token[:position], token[position:]
        token = {
            "replace": before + text + after[len(text) :],
            "insert": before + text + after,
            "delete": before + after[len(text) :],
            "cut": before,
            "extend": token + text,
        }[kind]
    return token


@TEXTS
@given(SEALED, EDITS)
def test_tokens_are_taken_as_cryptography_takes_them(
    token: str, edits: list[tuple[str, int, str]]
) -> None:
    check(edit(token, edits))


@TEXTS
@given(SEALED, st.integers(0, 200), st.sampled_from(["\n", "=", "==", "é", "AAAA", "%", " ~ "]))
def test_what_is_no_digit_is_skipped_as_ever(token: str, position: int, text: str) -> None:
    check(token[:position] + text + token[position:])
    check(token.rstrip("=") + text)


@given(st.text() | st.text(DIGITS + "+/=").map("gAAA".__add__) | st.binary().map(repr))
def test_nothing_is_raised_for_any_text(text: str) -> None:
    check(text)


def sign(body: bytes, key: bytes = KEYS[0]) -> str:
    mac = HMAC(key[:16], SHA256())
    mac.update(body)
    return base64.urlsafe_b64encode(body + mac.finalize()).decode()


@given(st.binary(max_size=80) | st.binary(max_size=80).map(b"\x80".__add__))
@example(b"\x80" + bytes(8 + 16))  # nothing encrypted
@example(b"\x80" + bytes(8 + 15))
@example(b"\x80" + bytes(8 + 16 + 15))
@example(b"\x80" + bytes(8 + 16 + 17))
@example(b"\x80")
def test_what_is_signed_and_is_no_token_is_refused(body: bytes) -> None:
    token = sign(body)
    storage = EncryptedCookieStorage(KEYS)
    # With a short IV cryptography's own raises another error; decoded, that is no token either.
    assert storage.open(token) == expected(FERNETS, token)


def test_every_padding_is_checked_to_its_end() -> None:
    def encrypt(padded: bytes) -> str:
        context = Cipher(AES(KEYS[0][16:]), CBC(bytes(16))).encryptor()
        return sign(b"\x80" + bytes(8 + 16) + context.update(padded))

    storage = EncryptedCookieStorage(KEYS[0])
    for size in range(256):
        for blocks in (bytes(16), b""):
            last = bytes([size] * 16)
            assert storage.open(encrypt(blocks + last)) == (
                (blocks + last[:-size], 0) if 0 < size <= 16 else None
            )
    for size, wrong in itertools.combinations(range(1, 17), 2):
        block = bytearray([wrong] * 16)
        block[-size] = 0
        assert storage.open(encrypt(bytes(block))) is None


@given(st.lists(st.tuples(st.binary(max_size=70), st.booleans()), max_size=8))
def test_what_is_sealed_is_what_cryptography_opens(steps: list[tuple[bytes, bool]]) -> None:
    storage = EncryptedCookieStorage(KEYS[:1])
    for payload, reads in steps:
        before = int(time.time())
        token = storage.seal(payload)
        assert FERNETS[0].decrypt(token) == payload
        assert before <= FERNETS[0].extract_timestamp(token.encode()) <= time.time()
        assert len(token) == len(FERNETS[0].encrypt(payload))
        if reads:
            opened = storage.open(token)
            assert opened is not None
            assert opened[0] == payload


@pytest.mark.parametrize("kind", ["key", "Fernet"])
def test_both_alphabets_are_read_in_the_head_of_a_token_too(kind: str) -> None:
    storage = EncryptedCookieStorage(KEYS[0] if kind == "key" else FERNETS[0])
    token = FERNETS[0].encrypt_at_time(b"{}", 0xFBEFBEFFFFFF).decode()
    assert token[4:12] == "----____"
    standard = token.replace("-", "+").replace("_", "/")
    for text in (token, standard, "\n" + token, token[:4] + "." + token[4:], token + "\n"):
        assert storage.open(text) == (b"{}", 0xFBEFBEFFFFFF)


# Objects that are brought


class Loud(Fernet):
    """A Fernet that notes its use."""

    def __init__(self, key: bytes) -> None:
        super().__init__(base64.urlsafe_b64encode(key))
        self.calls: list[str] = []

    def encrypt(self, data: bytes) -> bytes:
        self.calls.append("encrypt")
        return super().encrypt(data)

    def decrypt(self, token: bytes | str, ttl: int | None = None) -> bytes:
        self.calls.append("decrypt")
        return super().decrypt(token, ttl)


@pytest.mark.parametrize("is_assigned", [False, True])
def test_an_object_is_used_as_it_is(is_assigned: bool) -> None:
    loud = Loud(KEYS[0])
    storage = EncryptedCookieStorage(KEYS[0] if is_assigned else loud)
    storage._fernet = loud
    opened = storage.open(storage.seal(b"{}"))
    assert opened is not None
    assert opened[0] == b"{}"
    assert loud.calls == ["encrypt", "decrypt"]


def test_an_assignment_can_be_taken_back() -> None:
    storage = EncryptedCookieStorage(KEYS[0])
    own, token = storage._fernet, storage.seal(b"{}")
    storage._fernet = Loud(KEYS[2])
    assert storage.open(token) is None
    storage._fernet = own
    assert storage.open(token) is not None


def test_an_object_may_have_tokens_of_another_form() -> None:
    class Plain:
        def encrypt(self, data: bytes) -> bytes:
            return data

        decrypt = encrypt

    storage: Any = EncryptedCookieStorage(KEYS[0])
    storage._fernet = Plain()
    assert storage.seal(b"{}") == "{}"
    assert storage.open("{}") is None  # when it was sealed can't be told
    assert storage.open("AAAA") == (b"AAAA", 0)


# What is refused, and what does not show


@pytest.mark.parametrize("payload", ["{}", None, bytearray(2)])
def test_a_payload_is_bytes(payload: Any) -> None:
    with pytest.raises(TypeError, match=f"must be bytes, not {type(payload).__name__}$"):
        EncryptedCookieStorage(KEYS[0]).seal(payload)


def test_a_payload_may_be_a_kind_of_bytes() -> None:
    class Payload(bytes):
        pass

    storage = EncryptedCookieStorage(KEYS[0])
    opened = storage.open(storage.seal(Payload(b"{}")))
    assert opened is not None
    assert (type(opened[0]), opened[0]) == (bytes, b"{}")


def test_a_token_may_be_a_kind_of_str() -> None:
    class Token(str):
        __slots__ = ()

    token = FERNETS[0].encrypt_at_time(b"{}", 7).decode()
    assert EncryptedCookieStorage(KEYS[0]).open(Token(token)) == (b"{}", 7)


def test_no_key_shows() -> None:
    secret = b"a key that is as plain as it gets"[:32]
    storage = EncryptedCookieStorage([secret, KEYS[0]])
    storage.open(storage.seal(b"{}"))
    shown = repr(vars(storage)) + repr(storage._keys[0])
    for part in (secret[:16], secret[16:]):
        assert part.decode() not in shown
        assert part.hex() not in shown
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(storage._keys[0])
