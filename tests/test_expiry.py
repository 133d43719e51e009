"""When a session ends: idle, by its lifetime, or by a max_age of its own."""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

import pytest
from aiohttp import web

from aiohttp_session import AbstractStorage, Session, SimpleCookieStorage, get_session
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from tests.conftest import Clock
from tests.contract import KEY, NAME, Browser, spy
from tests.stores import MakeStorage, make_storage, stored

__all__ = ("make_storage",)


def make(kind: str, **options: Any) -> AbstractStorage:
    makers: dict[str, Any] = {
        "simple": SimpleCookieStorage,
        "fernet": lambda **options: EncryptedCookieStorage(KEY, **options),
        "siv": lambda **options: EncryptedCookieStorage(KEY, cipher="aes-256-gcm-siv", **options),
        "nacl": lambda **options: NaClCookieStorage(KEY, **options),
        "memory": MemoryStorage,
    }
    storage: AbstractStorage = makers[kind](**options)
    return storage


KINDS = pytest.mark.parametrize("kind", ["simple", "fernet", "siv", "nacl", "memory"])


async def read(browser: Browser) -> Any:
    """Return the contents of the session, of a request that only reads, and its response."""
    contents, response = await browser.do(dict)
    return contents, response


@KINDS
async def test_touch_after_keeps_a_session_alive_that_is_only_read(kind: str, clock: Clock) -> None:
    browser = Browser(make(kind, max_age=100, touch_after=30))
    await browser.set(a=1)
    for _ in range(10):
        clock.now += 60
        assert (await read(browser))[0] == {"a": 1}
    clock.now += 101
    assert (await read(browser))[0] == {}


@KINDS
async def test_it_saves_once_in_so_many_seconds(kind: str, clock: Clock) -> None:
    browser = Browser(make(kind, touch_after=30))
    await browser.set(a=1)
    saved = []
    for second in range(1, 100):
        clock.now += 1
        if (await read(browser))[1].cookies:
            saved.append(second)
    assert saved == [31, 62, 93]


@KINDS
async def test_a_request_that_does_not_ask_for_its_session_does_not_touch_it(
    kind: str, clock: Clock
) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response()

    browser = Browser(make(kind, touch_after=30))
    await browser.set(a=1)
    clock.now += 60
    assert not (await browser.visit(handler)).cookies


@KINDS
async def test_without_touch_after_reading_saves_nothing(kind: str, clock: Clock) -> None:
    browser = Browser(make(kind, max_age=100))
    await browser.set(a=1)
    clock.now += 99
    contents, response = await read(browser)
    assert contents == {"a": 1}
    assert not response.cookies


@KINDS
async def test_a_save_without_a_visible_change_keeps_alive_too(kind: str, clock: Clock) -> None:
    browser = Browser(make(kind, max_age=100, touch_after=30))
    await browser.set(a=1)
    clock.now += 90
    await browser.do(Session.changed)
    clock.now += 90
    assert (await read(browser))[0] == {"a": 1}


async def test_touching_overwrites_no_change_of_another_request(
    make_storage: MakeStorage, clock: Clock
) -> None:
    storage = make_storage(touch_after=30)
    browser = Browser(storage)
    await browser.set(n=1)
    other = Browser(storage, browser.cookie)
    clock.now += 60

    async def slow(request: web.Request) -> web.Response:
        assert await get_session(request) == {"n": 1}
        await other.set(n=2)
        return web.Response()

    response = await browser.visit(slow)
    assert not response.cookies
    assert await browser.load() == {"n": 2}


async def test_touching_brings_back_no_session_that_was_deleted(
    make_storage: MakeStorage, clock: Clock
) -> None:
    storage = make_storage(touch_after=30)
    browser = Browser(storage)
    await browser.set(n=1)
    other = Browser(storage, browser.cookie)
    clock.now += 60

    async def slow(request: web.Request) -> web.Response:
        await get_session(request)
        await other.do(Session.invalidate)
        return web.Response()

    assert not (await browser.visit(slow)).cookies
    assert (await browser.load()).new


async def test_of_many_requests_at_once_one_touches(
    make_storage: MakeStorage, clock: Clock
) -> None:
    storage = make_storage(touch_after=30)
    browser = Browser(storage)
    await browser.set(n=1)
    clock.now += 60
    browsers = [Browser(storage, browser.cookie) for _ in range(8)]
    arrived = asyncio.Barrier(8) if hasattr(asyncio, "Barrier") else None

    async def handler(request: web.Request) -> web.Response:
        await get_session(request)
        if arrived is not None:
            await arrived.wait()
        return web.Response()

    responses = await asyncio.gather(*(browser.visit(handler) for browser in browsers))
    assert sum(NAME in response.cookies for response in responses) == 1


@KINDS
async def test_a_lifetime_ends_a_session_however_much_it_is_used(kind: str, clock: Clock) -> None:
    browser = Browser(make(kind, lifetime=100, max_age=50, touch_after=5))
    await browser.set(n=0)
    for number in range(1, 5):
        clock.now += 20
        await browser.set(n=number)
    assert await browser.load() == {"n": 4}
    clock.now += 20
    contents, _ = await read(browser)
    assert contents == {}
    await browser.set(n=9)
    clock.now += 40
    assert (await read(browser))[0] == {"n": 9}


@KINDS
async def test_what_is_written_when_it_is_over_begins_another(kind: str, clock: Clock) -> None:
    browser = Browser(make(kind, lifetime=100))
    await browser.set(a=1)
    before = browser.cookie
    clock.now += 101
    await browser.set(b=2)
    assert browser.cookie != before
    clock.now += 99
    assert await browser.load() == {"b": 2}


async def test_a_lifetime_that_is_over_deletes_the_record_at_the_next_write(
    make_storage: MakeStorage, clock: Clock
) -> None:
    storage = make_storage(lifetime=100)
    browser = Browser(storage)
    await browser.set(a=1)
    before = str(browser.cookie)
    clock.now += 101
    await browser.set(b=2)
    assert await stored(storage, before) is None


@KINDS
async def test_a_session_from_before_there_was_a_lifetime_counts_from_created(
    kind: str, clock: Clock
) -> None:
    storage = make(kind)
    browser = Browser(storage)
    await browser.set(a=1)
    storage._lifetime = 100  # type: ignore[attr-defined]
    clock.now += 60
    await browser.set(b=2)
    clock.now += 60
    assert (await read(browser))[0] == {}


@pytest.mark.parametrize("issued", [None, 1_700_000_000, 1_700_000_000.5])
async def test_a_lifetime_reads_any_record(issued: Any, clock: Clock) -> None:
    browser = Browser(SimpleCookieStorage(lifetime=100))
    payload = {"created": 1_700_000_000, "session": {"a": 1}, "issued": issued}
    browser.cookie = json.dumps(payload, separators=(",", ":"))
    assert (await browser.load()) == {"a": 1}


@pytest.mark.parametrize("member", ["created", "issued", "max_age"])
@pytest.mark.parametrize("value", ["x", [], {}, float("nan"), 1e300, 10**30, -(10**30)])
async def test_damaged_times_are_a_fresh_session(member: str, value: Any) -> None:
    browser = Browser(SimpleCookieStorage(lifetime=100, touch_after=1, max_age=100))
    payload = {"created": 1_700_000_000, "session": {"a": 1}, member: value}
    browser.cookie = json.dumps(payload, separators=(",", ":"))
    assert (await browser.load()).new


@pytest.mark.parametrize("max_age", [2**52, -(2**52), 0, True, 0.5])
async def test_no_max_age_in_a_plain_cookie_breaks_the_save(max_age: Any) -> None:
    browser = Browser(SimpleCookieStorage(lifetime=100, touch_after=1))
    payload = {"created": 1_700_000_000, "session": {"a": 1}, "max_age": max_age}
    browser.cookie = json.dumps(payload, separators=(",", ":"))
    assert NAME in (await browser.set(b=2)).cookies


@KINDS
async def test_issued_and_max_age_are_written_only_when_asked_for(kind: str, clock: Clock) -> None:
    storage: Any = make(kind, max_age=100, touch_after=10)
    session = Session(None, data=None, new=True, max_age=100)
    session["a"] = 1
    payload = json.loads(storage._make_payload(session))
    assert payload == {"created": 1_700_000_000, "session": {"a": 1}}
    session.max_age = 50
    storage._lifetime = 1000
    payload = json.loads(storage._make_payload(session))
    assert (payload["max_age"], payload["issued"]) == (50, 1_700_000_000)


@KINDS
@pytest.mark.parametrize("own", [500, 50, 50.5, None])
async def test_a_max_age_of_its_own_survives_a_reload(
    kind: str, own: float | None, clock: Clock
) -> None:
    def remember(session: Session) -> None:
        session["a"] = 1
        session.max_age = own  # type: ignore[assignment]

    browser = Browser(make(kind, max_age=100))
    await browser.do(remember)
    clock.now += 40
    assert (await browser.load()).max_age == own
    await browser.set(b=2)
    clock.now += 450 if own in {500, None} else 40
    assert await browser.load() == {"a": 1, "b": 2}
    clock.now += 1000
    assert bool(await browser.load()) is (own is None)


@KINDS
async def test_going_back_to_the_storages_max_age(kind: str, clock: Clock) -> None:
    def set_max_age(seconds: int) -> Any:
        def action(session: Session) -> None:
            session["a"] = 1
            session.max_age = seconds

        return action

    browser = Browser(make(kind, max_age=100))
    await browser.do(set_max_age(500))
    await browser.do(set_max_age(100))
    clock.now += 101
    assert await browser.load() == {}


@pytest.mark.parametrize(
    ("max_age", "lifetime", "age", "left"),
    [
        (None, None, 0, None),
        (100, None, 50, "100"),
        (None, 100, 30, "70"),
        (100, 1000, 50, "100"),
        (100, 120, 50, "70"),
        (100, 120, -500, "100"),
        (None, 120, -500, "120"),
        (0, None, 0, "0"),
        (0, 100, 0, "0"),
    ],
)
async def test_the_cookie_and_the_record_last_for_the_smaller_of_what_is_left(
    max_age: int | None,
    lifetime: int | None,
    age: int,
    left: str | None,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = MemoryStorage(max_age=max_age, lifetime=lifetime)
    ttls: list[int | None] = []
    create, swap = storage.store.create, storage.store.swap

    async def note_create(key: str, payload: bytes, ttl: int | None) -> None:
        ttls.append(ttl)
        await create(key, payload, ttl)

    async def note_swap(key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        ttls.append(ttl)
        return await swap(key, expected, payload, ttl)

    monkeypatch.setattr(storage.store, "create", note_create)
    monkeypatch.setattr(storage.store, "swap", note_swap)
    browser = Browser(storage)
    response = await browser.set(a=1)
    if age:
        clock.now += age
        response = await browser.set(a=2)
    assert response.cookies[NAME].get("max-age", "") == (left or "")
    assert ttls[-1] == (None if left is None else max(1, int(left)))


async def test_a_ttl_is_rounded_up(make_storage: MakeStorage) -> None:
    browser = Browser(make_storage(max_age=1.5))
    await browser.set(a=1)
    assert await browser.load() == {"a": 1}


async def test_max_age_zero_lasts_for_the_moment(make_storage: MakeStorage) -> None:
    browser = Browser(make_storage(max_age=0))
    response = await browser.set(a=1)
    assert response.cookies[NAME]["max-age"] == "0"


@KINDS
async def test_a_clock_that_was_set_back_ends_no_session_and_keeps_it_alive(
    kind: str, clock: Clock
) -> None:
    # Sealed cookies with a limit don't trust a time from the future.
    limits = {} if kind in {"fernet", "siv", "nacl"} else {"max_age": 100, "lifetime": 1000}
    browser = Browser(make(kind, touch_after=30, **limits))
    await browser.set(a=1)
    clock.now -= 3600
    contents, response = await read(browser)
    assert contents == {"a": 1}
    assert response.cookies  # or the store's own clock would end it
    clock.now += 10
    contents, response = await read(browser)
    assert contents == {"a": 1}
    assert not response.cookies


SEALED_WITHOUT_TIME = [
    *(("nacl", "max_age"), ("nacl", "lifetime"), ("fernet", "lifetime"), ("siv", "lifetime")),
]


@pytest.mark.parametrize(("kind", "limit"), SEALED_WITHOUT_TIME)
async def test_a_cookie_that_a_fast_clock_made_does_not_outlive_its_limit(
    kind: str, limit: str, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    browser = Browser(make(kind, **{limit: 100}))
    await browser.set(a=1)
    clock.now -= 61
    session = await browser.load()
    assert session.new
    assert session == {}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "could not be read" in caplog.text
    clock.now += 1
    assert await browser.load() == {"a": 1}


@pytest.mark.parametrize("kind", ["nacl", "fernet", "siv"])
async def test_resealing_does_not_hide_an_issue_date_in_the_future(kind: str, clock: Clock) -> None:
    browser = Browser(make(kind, max_age=1000, lifetime=100))

    def issue_too_late(session: Session) -> None:
        session._issued = int(clock.now) + 61
        session["a"] = 1

    await browser.do(issue_too_late)
    assert (await browser.load()).new


@pytest.mark.parametrize(("kind", "limit"), [("nacl", None), ("simple", "max_age")])
async def test_without_a_limit_or_a_seal_any_time_is_good(
    kind: str, limit: str | None, clock: Clock
) -> None:
    browser = Browser(make(kind, **({limit: 100} if limit else {})))
    await browser.set(a=1)
    clock.now -= 3600
    assert await browser.load() == {"a": 1}


@pytest.mark.parametrize("option", ["touch_after", "lifetime"])
def test_negative_seconds_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be a number of seconds, not -1"):
        make("memory", **{option: -1})


async def test_a_session_that_is_fresh_costs_no_write(
    make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage(touch_after=30, lifetime=100, max_age=50)
    browser = Browser(storage)
    await browser.set(a=1)
    calls = spy(monkeypatch, storage)
    await browser.load()
    assert calls == ["read"]


@pytest.mark.parametrize("lifetime", [None, 100])
async def test_what_a_storage_of_ones_own_returns_is_not_written_to(lifetime: int | None) -> None:
    class Constant(MemoryStorage):
        data: ClassVar[Any] = {"created": 1, "session": {"a": 1}}

        def _get_session_data(self, session: Session) -> Any:
            return self.data

    storage = Constant(lifetime=lifetime)
    browser = Browser(storage)
    await browser.set(b=1)
    (record,) = storage.store._records.values()
    written = json.loads(record[0])
    assert written.pop("issued", None) is not None or lifetime is None
    assert written == Constant.data
    assert Constant.data == {"created": 1, "session": {"a": 1}}
