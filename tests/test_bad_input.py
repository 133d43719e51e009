"""Bad input, and what it gets: over every storage, a fresh session and never an error."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.exceptions import ResponseError

from aiohttp_session import Session, get_session, setup
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from aiohttp_session.sealed_storage import CookieStorage
from tests import contract
from tests.conftest import Clock
from tests.contract import KEY, NAME, Browser, spy

OTHER_KEY = bytes(range(1, 33))
_URLSAFE = str.maketrans("+/", "-_")

# Text as aiohttp gives it to a handler: bytes that are no UTF-8 have become surrogates.
GARBAGE = {
    "random bytes": bytes(range(1, 255)).decode("utf-8", "surrogateescape"),
    "random bytes without semicolons": "\udc9f\x13\udce2q\udcff\udc80\x7f\x01Z\udcbb=",
    "invalid UTF-8": "swordfish\udcff\udcc3",
    "quotes": '"' * 8000,
    "backslashes": '"' + "\\" * 8000 + '"',
    "a NUL": "a\x00b",
    "a bare name": "",
    "spaces": "   ",
    "not base64": "!!!!",
    "base64 of nothing": "====",
    "one letter": "A",
    "letters": "A" * 100,
    "Fernet's first letters": "gAAAAA",
    "a lot of letters": "gAAA" * 1000,
    "non-ASCII letters": "swordfish\u20ac\xe4",
    "digits": "1" * 5000,
    "a float": "1e400",
    "a JSON list": "[1,2]",
    "a JSON text": '"swordfish"',
    "a number": "1",
    "null": "null",
    "an unfinished object": '{"created":1,"session":{"swordfish":',
    "brackets": "[" * 4000,
    "a session that is no object": '{"created":1,"session":["swordfish"]}',
    "a session that is a number": '{"created":1,"session":7}',
    "created that is no number": '{"created":"swordfish","session":{"a":1}}',
    "created that is a list": '{"created":[1],"session":{"a":1}}',
    "created that is huge": '{"created":1e308,"session":{"a":1}}',
    "created that is an endless integer": '{"created":%s,"session":{"a":1}}' % ("9" * 400),
    "created that is infinite": '{"created":Infinity,"session":{"a":1}}',
    "created that is NaN": '{"created":NaN,"session":{"a":1}}',
    "max_age that is no number": '{"created":1,"session":{"a":1},"max_age":"swordfish"}',
    "max_age that is huge": '{"created":1,"session":{"a":1},"max_age":1e300}',
    "issued that is no number": '{"created":1,"session":{"a":1},"issued":{}}',
    "a path": "../../etc/passwd",
    "300 characters": "x" * 300,
}
"""Cookie values of attackers and accidents, as they stand in a header."""


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def is_seen(storage: Any, cookie: str) -> bool:
    return storage.load_cookie(contract.make_request(f"{NAME}={cookie}")) is not None


class BadInput:
    """Tests that hold for every storage."""

    def make(self, cls: type[Any] | None = None, **options: Any) -> Any:
        raise NotImplementedError

    @pytest.mark.parametrize("cookie", GARBAGE.values(), ids=GARBAGE)
    @pytest.mark.parametrize("max_age", [None, 100])
    async def test_garbage_is_a_fresh_session_and_one_warning_without_the_content(
        self, cookie: str, max_age: int | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        storage = self.make(max_age=max_age, lifetime=max_age, touch_after=max_age)
        browser = Browser(storage, cookie)
        session = await browser.load()
        assert session == {}
        assert (session.new, session.identity) == (True, None)
        # An unknown id is nothing odd, and aiohttp before 3.13 hides some cookies.
        odd = isinstance(storage, CookieStorage) and is_seen(storage, cookie)
        assert len(messages(caplog)) == int(odd)
        assert "swordfish" not in caplog.text
        assert len(cookie) < 4 or cookie not in caplog.text
        await browser.set(a=1)
        assert await browser.load() == {"a": 1}

    @settings(settings.get_profile("storages"))
    @given(
        cookie=st.binary(max_size=40).map(lambda text: text.decode("utf-8", "surrogateescape"))
        | st.text(max_size=40)
        | st.binary(max_size=80).map(lambda text: base64.urlsafe_b64encode(text).decode())
        | st.text('gA{}[]":0,1 \\created=session', max_size=60)
    )
    async def test_any_cookie_is_read_without_an_error(self, cookie: str) -> None:
        session = await Browser(self.make(max_age=100), cookie).load()
        assert isinstance(session, Session)

    async def test_garbage_over_the_wire_is_never_an_error_500(self) -> None:
        async def handler(request: web.Request) -> web.Response:
            session = await get_session(request)
            session["count"] = session.get("count", 0) + 1
            return web.json_response(session["count"])

        app = web.Application()
        setup(app, self.make())
        app.router.add_get("/", handler)
        async with TestServer(app) as server:
            for cookie in GARBAGE.values():
                raw = cookie.encode("utf-8", "surrogateescape")
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(b"GET / HTTP/1.0\r\nCookie: %s=%s\r\n\r\n" % (NAME.encode(), raw))
                answer = await reader.read()
                writer.close()
                await writer.wait_closed()
                # 400 is aiohttp's own, for a header that is none.
                assert answer.split(b" ")[1] in {b"200", b"400"}, cookie
                assert answer.startswith(b"HTTP/1.0 400") or answer.endswith(b"\r\n\r\n1"), cookie


class BadIds(BadInput):
    """Tests that hold for storages on a server."""

    @pytest.mark.parametrize(
        "identity",
        [
            "",
            '"a b"',
            '"\\001"',
            '"a\\012b"',
            '"a\\177"',
            "x" * 300,
            "x" * (250 - len(NAME)),
            "../secret",
            '"..\\057"',
            "\xe4",
            "\udcff",
            "\u2028",
        ],
    )
    async def test_the_store_is_not_asked_for_an_impossible_id(
        self, identity: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        storage = self.make()
        browser = Browser(storage, identity)
        calls = spy(monkeypatch, storage)
        session = await browser.load()
        assert session == {}
        assert (session.new, session.identity) == (True, None)
        await browser.do(lambda session: session.invalidate())
        assert calls == []
        assert browser.cookie is None or not is_seen(storage, identity)
        assert messages(caplog) == []

    async def test_the_store_is_asked_for_a_possible_id(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage = self.make()
        calls = spy(monkeypatch, storage)
        await Browser(storage, '"a,b;(c)"').load()
        await Browser(storage, "x" * (249 - len(NAME))).load()
        assert calls == ["read", "read"]

    @pytest.mark.parametrize(
        "record",
        [text for text in GARBAGE.values() if text not in {"", "   "}] + ["", "\x00", "{}x"],
    )
    async def test_a_damaged_record_is_an_empty_session_under_its_id(
        self, record: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        storage = self.make(max_age=100)
        raw = record.encode("utf-8", "surrogateescape")
        await storage.store.create(f"{NAME}_some-id", raw, None)
        browser = Browser(storage, "some-id")
        session = await browser.load()
        assert session == {}
        assert (session.new, session.identity) == (False, "some-id")
        assert "swordfish" not in caplog.text
        await browser.set(a=1)
        assert browser.cookie == "some-id"
        assert await browser.load() == {"a": 1}


class Sealed(BadInput):
    """Tests that hold for storages that encrypt."""

    def seal(self, storage: Any, payload: bytes) -> str:
        cookie = storage.seal(payload)
        assert isinstance(cookie, str)
        return cookie

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"[1,2]",
            b'"swordfish"',
            b"\xff\xfe",
            b"7",
            b"null",
            b'{"session":[1]}',
            b"[" * 5000,
        ],
    )
    async def test_a_valid_token_of_something_else_is_a_fresh_session(
        self, payload: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        storage = self.make()
        session = await Browser(storage, self.seal(storage, payload)).load()
        assert session == {}
        assert session.new
        assert len(messages(caplog)) == 1
        assert "swordfish" not in caplog.text

    @pytest.mark.parametrize(
        "damage",
        [
            lambda value: value[:-1],
            lambda value: value[1:],
            lambda value: value[: len(value) // 2],
            lambda value: value[:16],
            lambda value: "x" + value,
            lambda value: value[:-4] + "AAAA",
            lambda value: value.swapcase(),
            lambda value: value[:10] + value,
            lambda value: f" {value[::-1]}",
            lambda value: value[:20] + "\udcff" + value[20:],
        ],
    )
    async def test_a_damaged_cookie_is_a_fresh_session(
        self, damage: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        storage = self.make()
        browser = Browser(storage)
        await browser.set(a="swordfish")
        assert browser.cookie is not None
        browser.cookie = damage(browser.cookie.strip('"'))
        session = await browser.load()
        assert session == {}
        assert session.new
        assert len(messages(caplog)) == is_seen(storage, browser.cookie)
        assert "swordfish" not in caplog.text

    async def test_a_cookie_of_another_key_is_a_fresh_session(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        payload = json.dumps({"created": int(time.time()), "session": {"a": 1}}).encode()
        cookie = self.seal(self.make(secret_key=OTHER_KEY), payload)
        session = await Browser(self.make(), cookie).load()
        assert session == {}
        assert session.new
        assert messages(caplog) == [
            "The session cookie could not be read; starting with a fresh session"
        ]

    @given(position=st.integers(0, 10_000), character=st.characters(max_codepoint=127))
    async def test_one_character_replaced(self, position: int, character: str) -> None:
        storage = self.make()
        cookie = self.seal(storage, b'{"session":{"a":1}}')
        position %= len(cookie)
        changed = cookie[:position] + character + cookie[position + 1 :]
        session = await storage.load_session(contract.make_request(f"{NAME}={changed}"))
        # Fernet reads "+" and "/" for the "-" and "_" of a token, and one character of random
        # tokens in 32 is one of these; the last characters hold bits that don't matter.
        is_same = changed.translate(_URLSAFE) == cookie.translate(_URLSAFE)
        assert session == {} or is_same or position >= len(cookie) - 4


class TestSimpleCookieStorage(contract.Simple, BadInput):
    pass


class TestEncryptedCookieStorage(contract.Encrypted, Sealed):
    async def test_a_token_that_is_older_than_max_age_is_a_fresh_session(
        self, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        storage = self.make(max_age=10)
        cookie = storage.seal(b'{"created": 1800000000, "session": {"a": 1}}')
        clock.now += 11
        assert await Browser(storage, cookie).load() == {}
        assert len(messages(caplog)) == 1


class TestEncryptedCookieStorageWithGcmSiv(contract.EncryptedSiv, Sealed):
    pass


class TestNaClCookieStorage(contract.NaCl, Sealed):
    pass


class TestMemoryStorage(contract.Memory, BadIds):
    pass


class TestRedisStorage(contract.OnRedis, BadIds):
    async def test_a_record_of_another_kind_raises_the_client_s_error(self) -> None:
        await self.client.lpush(f"{NAME}_a-list", "x")
        with pytest.raises(ResponseError):
            await Browser(self.make(), "a-list").load()


class TestMemcachedStorage(contract.OnMemcached, BadIds):
    pass


# Keys


@pytest.mark.parametrize(
    "key",
    [
        *(b"", b"x" * 31, b"x" * 33, bytearray(31), "", "x", "x" * 44, "\xe4" * 32, "!" * 44),
        *("A" * 42 + "=", base64.urlsafe_b64encode(b"x" * 31).decode(), KEY.hex(), " "),
        *([KEY, b"short"], (b"x" * 31,)),
    ],
)
def test_a_fernet_key_of_the_wrong_length_or_alphabet(key: Any) -> None:
    with pytest.raises(ValueError) as caught:
        EncryptedCookieStorage(key)
    assert str(caught.value) == (
        "A secret key must be 32 bytes, or 32 bytes in urlsafe base64 as a str. "
        "Fernet.generate_key().decode() makes one"
    )


@pytest.mark.parametrize("key", [b"", b"x" * 31, b"x" * 33, bytearray(31), [KEY, b"short"]])
def test_a_nacl_key_of_the_wrong_length(key: Any) -> None:
    with pytest.raises(
        ValueError, match=r"A secret key must be 32 bytes, not \d+. os.urandom\(32\)"
    ):
        NaClCookieStorage(key)


@pytest.mark.parametrize("key", ["x" * 32, 7, None, ["x" * 32], object()])
def test_a_nacl_key_that_is_no_bytes(key: Any) -> None:
    with pytest.raises(TypeError):
        NaClCookieStorage(key)


@pytest.mark.parametrize("cls", [EncryptedCookieStorage, NaClCookieStorage])
def test_no_key_at_all(cls: Any) -> None:
    with pytest.raises(ValueError, match="at least one key"):
        cls([])
    with pytest.raises(TypeError):
        cls()


def test_no_key_shows_in_an_error() -> None:
    for cls in (EncryptedCookieStorage, NaClCookieStorage):
        for key in (b"swordfish", "swordfish"):
            with pytest.raises((ValueError, TypeError)) as caught:
                cls(key)  # type: ignore[arg-type]
            assert "swordfish" not in str(caught.value)
