"""A user's sessions: listed, ended, limited."""

from __future__ import annotations

import asyncio
import json
import logging
from operator import methodcaller
from typing import Any

import pytest
from aiohttp import web

from aiohttp_session import ConflictError, Session, SessionInfo, get_session, new_session, owners
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.server_storage import ServerStorage
from aiohttp_session.stores import Store
from aiohttp_session.stores.memory import MemoryStore
from tests.conftest import Clock
from tests.contract import KEY, Browser, spy
from tests.stores import MakeStorage, YieldingStorage, make_storage, stored

__all__ = ("make_storage",)

MODES = pytest.mark.parametrize("mode", ["overwrite", "merge"])


def log_in(session: Session) -> None:
    session.owner = "ann"
    session.regenerate_id()


async def logged_in(storage: ServerStorage, owner: str = "ann", **items: Any) -> Browser:
    """Return a browser with a session of this owner."""
    browser = Browser(storage)

    def log_in(session: Session) -> None:
        session.update(items)
        session.owner = owner

    await browser.do(log_in)
    return browser


async def is_alive(browser: Browser, cookie: str | None = None) -> bool:
    return not (await Browser(browser.storage, cookie or browser.cookie).do(lambda s: s))[0].new


async def index(storage: ServerStorage, owner: str = "ann") -> Any:
    record = await storage.store.read(storage._keys.of_owner(owner))
    return record and json.loads(record)["sessions"]


async def test_an_owner_is_kept_until_it_is_taken_off(make_storage: MakeStorage) -> None:
    browser = await logged_in(make_storage(), a=1)
    before = browser.cookie
    assert (await browser.load()).owner == "ann"
    await browser.set(b=2)
    await browser.do(Session.regenerate_id)
    assert browser.cookie != before
    session = await browser.load()
    assert (dict(session), session.owner) == ({"a": 1, "b": 2}, "ann")
    await browser.do(lambda session: setattr(session, "owner", None))
    session = await browser.load()
    assert (dict(session), session.owner) == ({"a": 1, "b": 2}, None)


async def test_a_session_that_holds_an_owner_alone_is_kept(make_storage: MakeStorage) -> None:
    browser = await logged_in(make_storage())
    session = await browser.load()
    assert (dict(session), session.owner, session.empty, session.new) == ({}, "ann", False, False)


@pytest.mark.parametrize("action", ["invalidate", "clear"])
async def test_a_log_out_takes_it_off(make_storage: MakeStorage, action: str) -> None:
    storage = make_storage()
    browser = await logged_in(storage, a=1)
    before = browser.cookie
    assert (await browser.do(methodcaller(action)))[1].cookies
    assert browser.cookie is None
    assert not await is_alive(browser, before)
    assert await index(storage) == {}


async def test_the_last_key_may_go() -> None:
    browser = await logged_in(MemoryStorage(), a=1)
    await browser.do(lambda session: session.pop("a"))
    assert (await browser.load()).owner == "ann"


async def test_what_is_written_after_a_log_out_is_nobodys(make_storage: MakeStorage) -> None:
    def leave(session: Session) -> None:
        session.invalidate()
        session["flash"] = "bye"

    storage = make_storage()
    browser = await logged_in(storage)
    await browser.do(leave)
    session = await browser.load()
    assert (dict(session), session.owner) == ({"flash": "bye"}, None)
    assert await storage.sessions_of("ann") == []


@pytest.mark.parametrize(
    ("owner", "error", "message"),
    [
        (7, TypeError, "owner must be a str or None, not int"),
        (b"ann", TypeError, "owner must be a str or None, not bytes"),
        ("", ValueError, "owner must have 1 to 1000 characters, not 0"),
        ("a" * 1001, ValueError, "owner must have 1 to 1000 characters, not 1001"),
    ],
)
def test_what_is_no_owner(owner: Any, error: type[Exception], message: str) -> None:
    session = Session(None, data=None, new=True)
    with pytest.raises(error, match=message):
        session.owner = owner
    assert (session.owner, session._changed) == (None, False)


def test_setting_it_is_a_change(clock: Clock) -> None:
    session = Session("id", data={"created": 1, "session": {}}, new=False)
    session.owner = None
    assert (session._changed, session.created) == (False, 1)
    session.owner = "ann"
    assert (session._changed, session.created) == (True, int(clock.now))


@pytest.mark.parametrize("owner", ["a" * 1000, "Zoë", "\ud800", "a b\n;", '"'])
async def test_any_text_may_be_an_owner(make_storage: MakeStorage, owner: str) -> None:
    storage = make_storage()
    browser = await logged_in(storage, owner)
    assert (await browser.load()).owner == owner
    assert len(await storage.sessions_of(owner)) == 1
    assert await storage.end_sessions(owner) == 1


@pytest.mark.parametrize(
    "owner", [None, 7, "", "a" * 1001, ["ann"]], ids=["none", "int", "empty", "long", "list"]
)
@pytest.mark.parametrize("max_age", [None, 1000])
async def test_a_record_with_a_strange_owner_is_nobodys(owner: Any, max_age: int | None) -> None:
    storage = MemoryStorage(max_age=max_age)
    browser = await logged_in(storage, a=1)
    record = json.loads(await stored(storage, str(browser.cookie)) or b"")
    record["owner"] = owner
    await storage.store.create(
        storage._keys.get(browser.cookie), json.dumps(record).encode(), max_age
    )
    session = await browser.load()
    assert (dict(session), session.owner) == ({"a": 1}, None)
    assert await storage.sessions_of("ann") == []


async def test_a_payload_without_an_owner_is_what_it_was(clock: Clock) -> None:
    storage = MemoryStorage()
    browser = Browser(storage)
    await browser.set(a=1)
    record = await stored(storage, str(browser.cookie))
    assert record == b'{"created":1700000000,"session":{"a":1}}'
    await browser.do(lambda session: setattr(session, "owner", "ann"))
    record = await stored(storage, str(browser.cookie))
    assert record == b'{"created":1700000000,"session":{"a":1},"owner":"ann"}'


async def test_sessions_of_an_owner(make_storage: MakeStorage, clock: Clock) -> None:
    storage = make_storage(max_age=1000, lifetime=5000)
    clock.now = start = 2_000_000_000
    first = await logged_in(storage, device="phone")
    clock.now += 10
    await logged_in(storage, device="tablet")
    await logged_in(storage, "bob", device="car")
    clock.now += 10
    await first.set(seen=True)
    tablet, phone = await storage.sessions_of("ann")
    handles = {tablet.handle, phone.handle}
    assert phone == SessionInfo(
        phone.handle, start, start, start + 20, start + 1020, {"device": "phone", "seen": True}
    )
    assert tablet == SessionInfo(
        tablet.handle, start + 10, start + 10, start + 10, start + 1010, {"device": "tablet"}
    )
    assert len(handles) == 2
    assert await storage.sessions_of("nobody") == []


@pytest.mark.parametrize("hash_ids", [False, True])
async def test_a_handle_is_worthless_as_a_cookie(make_storage: MakeStorage, hash_ids: bool) -> None:
    storage = make_storage(hash_ids=hash_ids)
    browser = await logged_in(storage)
    (info,) = await storage.sessions_of("ann")
    assert str(browser.cookie) not in str(info)
    assert not await is_alive(browser, info.handle)
    if hash_ids:
        assert str(browser.cookie) not in str(await index(storage))
        assert not await is_alive(browser, next(iter(await index(storage))))
    assert await is_alive(browser)


@MODES
@pytest.mark.parametrize("hash_ids", [False, True])
async def test_ending_all_sessions_but_one(
    make_storage: MakeStorage, mode: str, hash_ids: bool
) -> None:
    storage = make_storage(on_conflict=mode, hash_ids=hash_ids, max_age=1000)
    browsers = [await logged_in(storage) for _ in range(3)]
    other = await logged_in(storage, "bob")

    async def change_password(request: web.Request) -> web.Response:
        session = await get_session(request)
        session["changed"] = True
        assert await storage.end_sessions("ann", keep=session) == 2
        return web.Response()

    await browsers[1].visit(change_password)
    assert [await is_alive(browser) for browser in browsers] == [False, True, False]
    assert await storage.end_sessions("ann") == 1
    assert await storage.end_sessions("ann") == 0
    assert not await is_alive(browsers[1])
    assert await is_alive(other)
    assert await storage.sessions_of("ann") == []


async def test_all_end_if_the_one_to_keep_is_none_of_them(make_storage: MakeStorage) -> None:
    storage = make_storage()
    await logged_in(storage)
    assert await storage.end_sessions("ann", keep=await storage.new_session()) == 1


async def test_ending_one_session(make_storage: MakeStorage) -> None:
    storage = make_storage()
    browsers = [await logged_in(storage, n=n) for n in range(3)]
    (info,) = [info for info in await storage.sessions_of("ann") if info.data == {"n": 1}]
    assert not await storage.end_session("bob", info.handle)
    assert not await storage.end_session("ann", "0" * 32)
    assert await storage.end_session("ann", info.handle)
    assert not await storage.end_session("ann", info.handle)
    assert [await is_alive(browser) for browser in browsers] == [True, False, True]


@MODES
@pytest.mark.parametrize("action", [methodcaller("update", b=1), methodcaller("regenerate_id")])
async def test_a_request_under_way_in_an_ended_session_saves_nothing(
    make_storage: MakeStorage, mode: str, action: Any, caplog: pytest.LogCaptureFixture
) -> None:
    storage = make_storage(on_conflict=mode)
    browser = await logged_in(storage, a=1)
    before = browser.cookie

    async def handler(request: web.Request) -> web.Response:
        action(await get_session(request))
        assert await storage.end_sessions("ann") == 1
        return web.Response()

    response = await browser.visit(handler)
    assert not response.cookies
    assert not await is_alive(browser, before)
    assert await storage.sessions_of("ann") == []
    assert "its changes are dropped" in caplog.text
    assert "ann" not in caplog.text


async def test_a_log_in_beyond_the_limit_ends_the_oldest(make_storage: MakeStorage) -> None:
    storage = make_storage(max_per_owner=2)
    browsers = [await logged_in(storage) for _ in range(4)]
    assert [await is_alive(browser) for browser in browsers] == [False, False, True, True]
    await logged_in(storage, "bob")
    await browsers[2].set(a=1)
    await browsers[2].do(Session.regenerate_id)
    assert [await is_alive(browser) for browser in browsers] == [False, False, True, True]
    assert len(await storage.sessions_of("ann")) == 2


async def test_sessions_that_are_over_don_t_count(make_storage: MakeStorage, clock: Clock) -> None:
    clock.now = 2_000_000_000
    storage = make_storage(max_per_owner=2)
    browsers = [await logged_in(storage) for _ in range(2)]
    await storage.store.delete(storage._keys.get(browsers[1].cookie))  # as by eviction
    clock.now += 61
    browsers.append(await logged_in(storage))
    assert [await is_alive(browser) for browser in browsers] == [True, False, True]
    await browsers[2].do(Session.invalidate)
    browsers[2] = await logged_in(storage)
    assert [await is_alive(browser) for browser in browsers] == [True, False, True]


async def test_a_session_that_went_to_another_user_doesn_t_count(make_storage: MakeStorage) -> None:
    storage = make_storage(max_per_owner=2)
    browsers = [await logged_in(storage) for _ in range(2)]
    await browsers[1].do(lambda session: setattr(session, "owner", "bob"))
    browsers.append(await logged_in(storage))
    assert [await is_alive(browser) for browser in browsers] == [True, True, True]
    assert await storage.end_sessions("ann") == 2
    assert [await is_alive(browser) for browser in browsers] == [False, True, False]
    assert await storage.end_sessions("bob") == 1


async def test_a_session_that_moved_counts_once(make_storage: MakeStorage, clock: Clock) -> None:
    storage = make_storage(max_per_owner=2)
    browsers = [await logged_in(storage)]
    clock.now += 1
    browsers.append(await logged_in(storage))
    for _ in range(3):
        await browsers[0].do(Session.regenerate_id)
    assert [await is_alive(browser) for browser in browsers] == [True, True]
    assert len(await index(storage)) == 3
    browsers.append(await logged_in(storage))
    assert [await is_alive(browser) for browser in browsers] == [False, True, True]
    assert len(await storage.sessions_of("ann")) == 2


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_is_positive(limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_per_owner must be at least 1, not {limit}"):
        MemoryStorage(max_per_owner=limit)


@MODES
async def test_what_it_costs(
    make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch, mode: str, clock: Clock
) -> None:
    storage = make_storage(on_conflict=mode, max_age=10_000)
    browser = Browser(storage)
    await browser.set(a=1)
    calls = spy(monkeypatch, storage)

    async def cost(action: Any) -> list[str]:
        calls.clear()
        await browser.do(action)
        return calls.copy()

    assert await cost(log_in) == ["read", "read", "swap", "create", "swap"]
    # The first request in a second reads the index, too.
    assert await cost(lambda session: session.update(b=2)) == ["read", "read", "swap"]
    assert await cost(lambda session: session.update(b=3)) == ["read", "swap"]
    assert await cost(lambda session: session["b"]) == ["read"]
    assert await cost(lambda session: setattr(session, "owner", "ann")) == ["read"]
    calls.clear()
    await logged_in(storage)
    assert calls == ["read", "swap", "create"]


async def test_the_index_knows_for_how_long(make_storage: MakeStorage, clock: Clock) -> None:
    clock.now = 2_000_000_000
    storage = make_storage(max_age=1000)
    browser = await logged_in(storage)
    for seconds in (900, 900, 900, 900):
        clock.now += seconds
        await browser.set(at=seconds)
        assert len(await storage.sessions_of("ann")) == 1
    clock.now += 1001
    assert await storage.sessions_of("ann") == []
    clock.now += 2000
    await logged_in(storage)
    assert len(await index(storage)) == 1


async def test_with_a_lifetime_it_knows_at_once(
    make_storage: MakeStorage, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.now = 2_000_000_000
    storage = make_storage(max_age=1000, lifetime=10_000)
    browser = await logged_in(storage)
    calls = spy(monkeypatch, storage)
    for _ in range(10):
        clock.now += 950
        await browser.set(at=clock.now)
    assert calls == ["read", "read", "swap"] * 10


def live_for(session: Session, max_age: int | None) -> None:
    session.max_age = max_age
    session.changed()


async def test_a_longer_max_age_is_entered(make_storage: MakeStorage, clock: Clock) -> None:
    clock.now = 2_000_000_000
    storage = make_storage(max_age=1000)
    browser = await logged_in(storage)
    await browser.do(lambda session: live_for(session, 100_000))
    clock.now += 90_000
    assert await is_alive(browser)
    await browser.do(lambda session: live_for(session, None))
    clock.now += 900_000
    assert await storage.end_sessions("ann") == 1
    assert not await is_alive(browser)


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"sessions":[]}',
        b'{"sessions":{"a":1}}',
        b'{"sessions":{"a":[1,2,3]}}',
        b'{"sessions":{"a b":[1,2,3,null]}}',
        b'{"sessions":{"a":["1",2,3,null]}}',
        b'{"sessions":{"a":[1,2,"3",null]}}',
        b'{"sessions":{"a":[1,2,3,4]}}',
    ],
)
async def test_a_damaged_index_keeps_nobody_from_logging_in(
    make_storage: MakeStorage, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    storage = make_storage(max_per_owner=1)
    await storage.store.create(storage._keys.of_owner("ann"), damaged, None)
    assert await storage.sessions_of("ann") == []
    browser = await logged_in(storage)
    assert await is_alive(browser)
    assert len(await storage.sessions_of("ann")) == 1
    assert {record.levelno for record in caplog.records} == {logging.ERROR}
    assert "index of a user's sessions is damaged" in caplog.text


async def test_a_crash_between_index_and_record_leaves_an_entry_only(
    make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage(max_age=1000)

    async def crash(*args: object) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(storage.store, "create", crash)
        with pytest.raises(RuntimeError, match="crash"):
            await logged_in(storage)
    assert len(await index(storage)) == 1
    assert await storage.sessions_of("ann") == []
    assert await storage.end_sessions("ann") == 0
    # The record may still come, so far as anybody knows.
    assert len(await index(storage)) == 1


async def test_an_index_can_t_change_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = YieldingStorage()

    async def swap(*args: object) -> bool:
        return False

    monkeypatch.setattr(storage.store, "swap", swap)
    monkeypatch.setattr("random.uniform", lambda low, high: 0)
    with pytest.raises(ConflictError, match="could not be changed in 100 attempts") as raised:
        await logged_in(storage)
    assert "ann" not in str(raised.value)


@pytest.mark.once
async def test_an_owner_s_thousand_sessions(make_storage: MakeStorage) -> None:
    storage = make_storage()
    number = 1000 if isinstance(storage, YieldingStorage) else 200  # a server takes seconds more
    browsers = [await logged_in(storage, n=n) for n in range(number)]
    assert len(await storage.sessions_of("ann")) == number
    assert await storage.end_sessions("ann") == number
    assert not any([await is_alive(browser) for browser in browsers])


async def test_two_hundred_log_ins_at_once(make_storage: MakeStorage) -> None:
    storage = make_storage()
    storages = [storage, ServerStorage(storage.store)]  # as of two processes
    browsers = await asyncio.gather(*(logged_in(storages[n % 2], n=n) for n in range(200)))
    infos = await storages[0].sessions_of("ann")
    assert {info.data["n"] for info in infos} == set(range(200))
    assert await storages[1].end_sessions("ann") == 200
    assert not any([await is_alive(browser) for browser in browsers])


async def test_a_new_session_may_have_the_same_owner(make_storage: MakeStorage) -> None:
    storage = make_storage()
    browser = await logged_in(storage)
    before = browser.cookie

    async def handler(request: web.Request) -> web.Response:
        (await new_session(request)).owner = "ann"
        return web.Response()

    await browser.visit(handler)
    assert browser.cookie != before
    assert not await is_alive(browser, before)
    assert len(await storage.sessions_of("ann")) == 1


@pytest.mark.parametrize(
    ("here", "there", "owner"),
    [("bob", None, "bob"), (None, "bob", "bob"), ("bob", "eve", "bob"), (None, None, "ann")],
)
async def test_merging_owners(
    make_storage: MakeStorage, here: str | None, there: str | None, owner: str
) -> None:
    storage = make_storage(on_conflict="merge", max_age=1000)
    browser = await logged_in(storage, a=1)
    other = Browser(storage, browser.cookie)

    def change(session: Session, owner: str | None, **items: int) -> None:
        session.update(items)
        if owner is not None:
            session.owner = owner

    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        await other.do(lambda session: change(session, there, b=2))
        change(session, here, c=3)
        return web.Response()

    await browser.visit(handler)
    session = await browser.load()
    assert (dict(session), session.owner) == ({"a": 1, "b": 2, "c": 3}, owner)
    assert await storage.end_sessions(owner) == 1


async def test_the_index_is_no_session(make_storage: MakeStorage) -> None:
    names = make_storage(cookie_name="S_USER"), make_storage(cookie_name="S")
    browser = await logged_in(names[0])
    (key,) = {names[0]._keys.of_owner("ann")}
    assert key.startswith("S_USER@")
    assert not await is_alive(Browser(names[1]), key.removeprefix("S_"))
    assert await is_alive(browser)


async def test_a_session_in_a_cookie_keeps_its_owner() -> None:
    storage = EncryptedCookieStorage(KEY, max_age=1000)
    browser = Browser(storage)
    await browser.do(lambda session: setattr(session, "owner", "ann"))
    assert (await browser.load()).owner == "ann"
    assert not hasattr(storage, "end_sessions")


async def test_an_expired_session_is_nobodys(clock: Clock) -> None:
    storage = EncryptedCookieStorage(KEY, max_age=1000, touch_after=2000)
    session = storage._restore(None, b'{"created":1,"session":{},"owner":"ann"}')
    assert session is not None
    assert (session.owner, session.empty) == (None, True)


async def test_an_owner_s_session_that_moves_to_another_user(make_storage: MakeStorage) -> None:
    storage = make_storage()
    browser = await logged_in(storage)

    def change(session: Session) -> None:
        session.owner = "bob"
        session.regenerate_id()

    await browser.do(change)
    assert (await browser.load()).owner == "bob"
    assert await storage.end_sessions("ann") == 0
    assert await storage.end_sessions("bob") == 1


async def test_a_record_that_was_damaged_is_listed_no_more(make_storage: MakeStorage) -> None:
    storage = make_storage()
    browser = await logged_in(storage)
    await storage.store.create(storage._keys.get(browser.cookie), b"[garbage", None)
    assert await storage.sessions_of("ann") == []
    assert await storage.end_sessions("ann") == 0


async def test_a_session_that_has_a_lifetime_gets_an_owner_later(make_storage: MakeStorage) -> None:
    storage = make_storage(lifetime=1000)
    browser = Browser(storage)
    await browser.set(a=1)
    await browser.do(log_in)
    (info,) = await storage.sessions_of("ann")
    assert info.issued is not None
    assert info.expires == info.issued + 1000


async def test_an_index_without_a_limit_lists_the_latest(
    make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(owners, "_MOST_ENTRIES", 3)
    storage = make_storage()
    browsers = [await logged_in(storage, number=number) for number in range(5)]
    assert [info.data["number"] for info in await storage.sessions_of("ann")] == [4, 3, 2]
    assert [message for message in caplog.messages if "lists at most 3 sessions" in message]
    assert await is_alive(browsers[0])
    # A session that is not listed is entered again by no mere save, or it would push out another.
    await browsers[0].set(b=2)
    assert len(await index(storage)) == 3


@pytest.mark.parametrize("is_damaged", [True, False])
async def test_an_index_that_was_lost_is_made_anew_by_the_next_save(
    make_storage: MakeStorage, clock: Clock, is_damaged: bool
) -> None:
    storage = make_storage()
    browser = await logged_in(storage, a=1)
    key = storage._keys.of_owner("ann")
    if is_damaged:
        await storage.store.create(key, b'{"sessions', None)
    else:
        await storage.store.delete(key)
    clock.now += 2
    await browser.do(lambda session: session.update(b=2))
    assert [info.data for info in await storage.sessions_of("ann")] == [{"a": 1, "b": 2}]


async def test_a_session_may_leave_an_index_that_was_lost(make_storage: MakeStorage) -> None:
    storage = make_storage()
    browser = await logged_in(storage, a=1)
    await storage.store.delete(storage._keys.of_owner("ann"))
    await browser.do(Session.invalidate)
    assert await index(storage) is None


async def test_a_visit_that_fails_is_made_again(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = YieldingStorage()
    browser = await logged_in(storage, a=1)
    clock.now += 2
    key, read, reads = storage._keys.of_owner("ann"), storage.store.read, 0

    async def fail(read_key: str) -> bytes | None:
        nonlocal reads
        if read_key == key:
            reads += 1
            raise ConnectionResetError
        return await read(read_key)

    monkeypatch.setattr(storage.store, "read", fail)
    for _ in range(2):
        await browser.do(lambda session: session["a"])
        await storage.finish()
    assert reads == 2


async def test_finish_waits_for_visits(clock: Clock) -> None:
    storage = YieldingStorage()
    browser = await logged_in(storage, a=1)
    clock.now += 2
    await browser.do(lambda session: session["a"])
    assert storage._owners._visits.get()
    await storage.finish()
    assert not storage._owners._visits.get()


async def test_few_visits_are_remembered(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "_VISITS_KEPT", 2)
    storage = YieldingStorage()
    for _ in range(5):
        browser = await logged_in(storage, a=1)
        await browser.do(lambda session: session["a"])
        assert 1 <= len(storage._owners._visited) <= 2


async def test_sessions_that_always_come_can_t_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "ATTEMPTS", 3)
    storage = YieldingStorage()
    await logged_in(storage)
    end = storage._owners._end_names

    async def end_names(*args: Any) -> set[str]:
        await logged_in(storage)
        return await end(*args)

    monkeypatch.setattr(storage._owners, "_end_names", end_names)
    with pytest.raises(ConflictError, match="in 3 attempts") as raised:
        await storage.end_sessions("ann")
    assert "ann" not in str(raised.value)


async def test_a_login_in_a_session_that_ended_meanwhile_leaves_the_index(
    make_storage: MakeStorage,
) -> None:
    storage = make_storage()
    browser = Browser(storage)
    await browser.set(a=1)
    other = Browser(storage, browser.cookie)

    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        await other.do(Session.invalidate)
        session.owner = "ann"
        return web.Response()

    await browser.visit(handler)
    assert await index(storage) == {}


async def test_clocks_that_differ_order_no_logins(make_storage: MakeStorage, clock: Clock) -> None:
    storage = make_storage(max_per_owner=1)
    first = await logged_in(storage, a=1)
    clock.now -= 2
    second = await logged_in(storage, a=2)
    assert (await is_alive(first), await is_alive(second)) == (False, True)
    await second.do(log_in)
    assert [info.data for info in await storage.sessions_of("ann")] == [{"a": 2}]


async def test_a_list_follows_a_session_that_moves_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = YieldingStorage()
    browser = await logged_in(storage, a=1)
    moved = 0

    async def find(entries: Any) -> Any:
        nonlocal moved
        if moved < 2:  # once while the index was read, once while the records are
            moved += 1
            await browser.do(log_in)
        return await read(entries)

    read = storage._owners._read_all
    monkeypatch.setattr(storage._owners, "_read_all", find)
    assert [info.data for info in await storage.sessions_of("ann")] == [{"a": 1}]
    [info] = await storage.sessions_of("ann")
    assert await storage.end_session("ann", info.handle)
    assert not await is_alive(browser)


async def test_a_session_that_moved_is_listed_once(make_storage: MakeStorage) -> None:
    """Its former entry stays until the next change of the index."""
    storage = make_storage()
    browser = await logged_in(storage, a=1)
    for _ in range(2):
        await browser.do(Session.regenerate_id)
    assert len(await index(storage)) == 2
    assert [info.data for info in await storage.sessions_of("ann")] == [{"a": 1}]


@pytest.mark.once
@pytest.mark.parametrize("is_visited", [True, False])
async def test_a_store_that_evicts_keeps_the_index_of_a_user_in_constant_use(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, is_visited: bool
) -> None:
    """An hour of 20 users, and of visitors whose records evict the least recently used ones."""
    if not is_visited:  # and the test would fail
        monkeypatch.setattr(owners, "_VISIT_AFTER", 10_000)
    storage = ServerStorage(MemoryStore(max_records=200), max_age=86400)
    names = [f"user {number}" for number in range(20)]
    browsers = [await logged_in(storage, owner, a=1) for owner in names]
    for minute in range(60):
        for browser in browsers:
            clock.now += 3
            await browser.do(lambda session: session["a"])
            await storage.finish()
        for _ in range(100):
            await Browser(storage).set(minute=minute)
    listed = [len(await storage.sessions_of(owner)) for owner in names]
    assert all([await is_alive(browser) for browser in browsers])
    assert listed == [1 if is_visited else 0] * 20


async def test_a_wrapper_that_passes_all_on_is_a_store_too() -> None:
    class Wrapper:
        def __init__(self, store: Store) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

    storage = ServerStorage(MemoryStore())
    storage.store = Wrapper(storage.store)  # type: ignore[assignment]
    browser = await logged_in(storage, a=1)
    await browser.do(log_in)
    assert [info.data for info in await storage.sessions_of("ann")] == [{"a": 1}]
    assert await storage.end_sessions("ann") == 1
