"""What a save does on the store, also when the store can't tell what became of a write."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from aiohttp_session import (
    ConflictError,
    Session,
    UnsettledError,
    get_session,
    new_session,
    settling,
    setup,
)
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.server_storage import ServerOptions, ServerStorage
from aiohttp_session.stores.memory import MemoryStore
from tests.conftest import Clock
from tests.contract import KEY, Browser, is_deletion, spy
from tests.stores import MakeStorage, YieldingStorage, make_storage, stored

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ("make_storage",)

MODES = pytest.mark.parametrize("mode", ["overwrite", "merge"])
DROPPED = "A session was deleted while a request used it; its changes are dropped"


@pytest.mark.parametrize(
    ("has_record", "moves", "empty", "changed", "merges"), list(product([False, True], repeat=5))
)
def test_a_save_is_one_of_six_operations(
    has_record: bool, moves: bool, empty: bool, changed: bool, merges: bool
) -> None:
    table = {
        # a record, new id, empty, changed, merges
        (False, None, False, None, None): "create",
        (False, None, True, None, None): "end",
        (True, True, False, None, None): "move",
        (True, True, True, None, None): "end",
        (True, False, False, True, False): "update",
        (True, False, True, None, False): "end",
        (True, False, False, False, None): "touch",
        (True, False, False, True, True): "merge",
        (True, False, True, None, True): "merge",
    }
    case = (has_record, moves, empty, changed, merges)
    expected = [
        operation
        for row, operation in table.items()
        if all(want in {None, is_so} for want, is_so in zip(row, case, strict=True))
    ]
    session = Session("id", data={"session": {} if empty else {"a": 1}}, new=False)
    session._record = b"record" if has_record else None
    session._renew, session._changed = moves, changed
    storage = MemoryStorage(on_conflict="merge" if merges else "overwrite")
    saving: Any = storage._store(session)
    saving.close()
    assert [saving.__name__] == [f"_{operation}" for operation in expected]


class Unsettled(MemoryStore):
    """A store that loses the answers to some operations, done or not."""

    timeout = 5

    def __init__(self) -> None:
        super().__init__(max_records=100_000)
        self.calls: list[str] = []
        self.lost: list[tuple[str, bool]] = []
        """The operations to come whose answers are lost, and whether they are done."""
        self.between: Callable[[], Awaitable[object]] | None = None
        """What happens before the next operation after a lost answer."""

    async def _do(self, name: str, do: Callable[[], Awaitable[Any]]) -> Any:
        self.calls.append(name)
        if not (self.lost and self.lost[0][0] == name):
            return await do()
        _, is_done = self.lost.pop(0)
        if is_done:
            await do()
        if self.between is not None:
            between, self.between = self.between, None
            await between()
        raise UnsettledError(f"the answer to {name} was lost")

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        await self._do("create", lambda: MemoryStore.create(self, key, payload, ttl))

    async def update(self, key: str, payload: bytes, ttl: int | None) -> bool:
        done: bool = await self._do("update", lambda: MemoryStore.update(self, key, payload, ttl))
        return done

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        done: bool = await self._do(
            "swap", lambda: MemoryStore.swap(self, key, expected, payload, ttl)
        )
        return done

    async def delete(self, key: str) -> None:
        await self._do("delete", lambda: MemoryStore.delete(self, key))


class UnsettledStorage(ServerStorage):
    store: Unsettled

    def __init__(self, store: Unsettled | None = None, **options: Unpack[ServerOptions]) -> None:
        super().__init__(store or Unsettled(), **options)

    def elsewhere(self, browser: Browser) -> Browser:
        """Return a browser with the same session, served by another process."""
        on_conflict: Any = "merge" if self._merges else "overwrite"
        return Browser(UnsettledStorage(self.store, on_conflict=on_conflict), browser.cookie)

    def lose(self, *lost: tuple[str, bool]) -> None:
        self.store.calls.clear()
        self.store.lost = list(lost)


@MODES
@pytest.mark.parametrize("is_done", [True, False])
async def test_a_save_whose_answer_was_lost_is_looked_up(mode: Any, is_done: bool) -> None:
    storage = UnsettledStorage(on_conflict=mode)
    browser = Browser(storage)
    await browser.set(a=1)
    storage.lose(("update" if mode == "overwrite" else "swap", is_done))
    await browser.set(b=2)
    assert not storage.store.lost
    assert await browser.load() == {"a": 1, "b": 2}


@MODES
@pytest.mark.parametrize("is_done", [True, False])
async def test_it_undoes_nothing_that_was_written_since(mode: Any, is_done: bool) -> None:
    storage = UnsettledStorage(on_conflict=mode)
    browser = Browser(storage)
    await browser.set(a=1)
    other = storage.elsewhere(browser)
    storage.lose(("update" if mode == "overwrite" else "swap", is_done))
    storage.store.between = lambda: other.set(a=2)
    with pytest.raises(UnsettledError):
        await browser.set(a=3)
    assert await browser.load() == {"a": 2}


@MODES
@pytest.mark.parametrize("is_done", [True, False])
async def test_it_brings_back_nothing_that_was_deleted_since(
    mode: Any, is_done: bool, caplog: pytest.LogCaptureFixture
) -> None:
    storage = UnsettledStorage(on_conflict=mode)
    browser = Browser(storage)
    await browser.set(a=1)
    other = storage.elsewhere(browser)
    storage.lose(("update" if mode == "overwrite" else "swap", is_done))
    storage.store.between = lambda: other.do(Session.invalidate)
    response = await browser.set(a=3)
    assert not response.cookies
    assert DROPPED in caplog.messages
    assert len(storage.store) == 0


@MODES
@pytest.mark.parametrize("is_done", [True, False])
async def test_a_touch_whose_answer_was_lost_is_looked_up(
    mode: Any, is_done: bool, clock: Clock
) -> None:
    storage = UnsettledStorage(on_conflict=mode, touch_after=10, max_age=100)
    browser = Browser(storage)
    await browser.set(a=1)
    clock.now += 50
    storage.lose(("swap", is_done))
    await browser.do(lambda session: session["a"])
    clock.now += 80
    assert (await browser.do(dict))[0] == {"a": 1}


async def test_a_new_session_gets_another_id_when_it_is_not_known_if_it_was_stored() -> None:
    ids = iter("abc")
    storage = UnsettledStorage(key_factory=lambda: next(ids))
    storage.lose(("create", True))
    browser = Browser(storage)
    await browser.set(a=1)
    assert browser.cookie == "b"
    assert await browser.load() == {"a": 1}


async def test_a_second_loss_is_an_error() -> None:
    storage = UnsettledStorage()
    storage.lose(("create", True), ("create", False))
    browser = Browser(storage)
    with pytest.raises(UnsettledError):
        await browser.set(a=1)
    assert browser.cookie is None


async def test_a_chosen_id_is_not_tried_again() -> None:
    storage = UnsettledStorage()
    storage.lose(("create", True))

    def choose(session: Session) -> None:
        session.set_new_identity("chosen")
        session["a"] = 1

    with pytest.raises(UnsettledError):
        await Browser(storage).do(choose)
    assert storage.store.calls == ["create"]


def log_in(session: Session) -> None:
    session["user"] = "ann"
    session.regenerate_id()


@MODES
@pytest.mark.parametrize("is_done", [True, False])
async def test_moving_survives_the_loss_of_the_mark_s_answer(mode: Any, is_done: bool) -> None:
    storage = UnsettledStorage(on_conflict=mode)
    browser = Browser(storage)
    await browser.set(a=1)
    before = str(browser.cookie)
    storage.lose(("update" if mode == "overwrite" else "swap", is_done))
    await browser.do(log_in)
    assert not storage.store.lost
    assert browser.cookie not in {None, before}
    assert await browser.load() == {"a": 1, "user": "ann"}
    assert len(storage.store) == 1


@MODES
@pytest.mark.parametrize("is_done", [True, False])
async def test_moving_notices_a_log_out_behind_a_lost_answer(mode: Any, is_done: bool) -> None:
    storage = UnsettledStorage(on_conflict=mode)
    browser = Browser(storage)
    await browser.set(a=1)
    key = storage._keys.get(str(browser.cookie))
    storage.lose(("update" if mode == "overwrite" else "swap", is_done))
    storage.store.between = lambda: storage.store.delete(key)
    response = (await browser.do(log_in))[1]
    assert not response.cookies
    assert len(storage.store) == 0


@MODES
async def test_moving_overwrites_or_merges_what_was_written_behind_a_lost_answer(mode: Any) -> None:
    storage = UnsettledStorage(on_conflict=mode)
    browser = Browser(storage)
    await browser.set(a=1)
    other = storage.elsewhere(browser)
    storage.lose(("update", False) if mode == "overwrite" else ("swap", False))
    storage.store.between = lambda: other.set(b=2)
    if mode == "merge":
        # Done or not: it isn't known, and others have gone on.
        with pytest.raises(UnsettledError):
            await browser.do(log_in)
        return
    await browser.do(log_in)
    assert await browser.load() == {"a": 1, "user": "ann"}
    assert len(storage.store) == 1


async def test_an_old_record_that_can_t_be_deleted_is_worth_nothing(
    caplog: pytest.LogCaptureFixture, make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage()
    browser = Browser(storage)
    await browser.set(a=1)
    before = str(browser.cookie)

    async def fail(key: str) -> None:
        raise ConnectionResetError("at " + key)

    monkeypatch.setattr(storage.store, "delete", fail)
    await browser.do(log_in)
    assert await browser.load() == {"a": 1, "user": "ann"}
    (message,) = caplog.messages
    assert "former id could not be deleted (ConnectionResetError)" in message
    assert (await Browser(storage, before).load()).new
    record = await stored(storage, before)
    assert record is not None
    assert set(json.loads(record)) == {"moved"}
    assert str(browser.cookie).encode() not in record


async def test_a_slow_request_does_not_follow_a_session_that_moved(
    make_storage: MakeStorage,
) -> None:
    storage = make_storage(on_conflict="merge")
    browser = Browser(storage)
    await browser.set(a=1)
    other = Browser(storage, browser.cookie)

    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        await other.do(log_in)
        session["late"] = True
        return web.Response()

    response = await browser.visit(handler)
    assert not response.cookies
    assert await other.load() == {"a": 1, "user": "ann"}


async def test_a_session_that_others_emptied_before_it_moves_is_ended() -> None:
    storage = YieldingStorage(on_conflict="merge")
    browser = Browser(storage)
    await browser.set(a=1)
    other = Browser(storage, browser.cookie)

    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        await other.do(Session.clear)
        session.regenerate_id()
        return web.Response()

    response = await browser.visit(handler)
    assert is_deletion(response)
    assert len(storage.store) == 0


async def test_what_another_request_added_moves_along(make_storage: MakeStorage) -> None:
    storage = make_storage(on_conflict="merge")
    browser = Browser(storage)
    await browser.set(a=1)
    other = Browser(storage, browser.cookie)

    async def handler(request: web.Request) -> web.Response:
        log_in(await get_session(request))
        await other.set(b=2)
        return web.Response()

    await browser.visit(handler)
    assert await browser.load() == {"a": 1, "b": 2, "user": "ann"}


async def never(*args: object) -> Any:
    await asyncio.Event().wait()


@MODES
@pytest.mark.parametrize("verb", ["create", "mark", "delete"])
async def test_moving_has_one_time_limit(mode: Any, verb: str) -> None:
    storage = YieldingStorage(on_conflict=mode)
    browser = Browser(storage)
    await browser.set(a=1)
    storage.store.timeout = 0.01
    if verb == "mark":
        verb = "swap" if mode == "merge" else "update"
    setattr(storage.store, verb, never)
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.01 seconds"):
        await browser.do(log_in)


async def test_looking_up_has_the_save_s_time_limit() -> None:
    storage = UnsettledStorage()
    browser = Browser(storage)
    await browser.set(a=1)
    storage.store.timeout = 0.01  # type: ignore[assignment]
    storage.lose(("update", True))
    storage.store.swap = never  # type: ignore[method-assign, assignment]
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.01 seconds"):
        await browser.set(b=2)


async def test_the_requests_that_wait_for_their_turn_wait_no_longer() -> None:
    storage = YieldingStorage(on_conflict="merge")
    browser = Browser(storage)
    await browser.set(a=1)
    key = storage._keys.get(str(browser.cookie))
    async with storage._turn(key):
        storage.store.timeout = 0.01
        with pytest.raises(TimeoutError):
            await browser.set(b=2)


async def test_a_new_session_in_place_of_another_has_one_time_limit_too() -> None:
    storage = YieldingStorage()
    browser = Browser(storage)
    await browser.set(a=1)

    async def handler(request: web.Request) -> web.Response:
        (await new_session(request))["b"] = 2
        return web.Response()

    storage.store.timeout = 0.01
    storage.store.delete = never  # type: ignore[method-assign, assignment]
    with pytest.raises(TimeoutError):
        await browser.visit(handler)


async def test_an_expired_session_goes_on_under_a_new_id(
    make_storage: MakeStorage, clock: Clock
) -> None:
    storage = make_storage(max_age=100)
    browser = Browser(storage)
    await browser.set(a=1)
    before = str(browser.cookie)
    key = storage._keys.get(before)
    record = await stored(storage, before)
    assert record is not None
    clock.now += 101
    await storage.store.create(key, record, None)  # its TTL is late, or the clock was set
    session = await browser.load()
    assert (session.identity, session.new, session.empty) == (before, False, True)
    await browser.set(b=2)
    assert browser.cookie not in {None, before}
    assert await browser.load() == {"b": 2}
    assert await stored(storage, before) is None


def test_an_expired_session_in_a_cookie_stays_what_it_was(clock: Clock) -> None:
    storage = EncryptedCookieStorage(KEY, max_age=100)
    session = storage._restore(None, b'{"created":1,"session":{"a":1}}')
    assert session is not None
    assert (session.identity, session.new, session.empty) == (None, False, True)


async def test_an_id_never_leads_to_another_names_records(make_storage: MakeStorage) -> None:
    guests = make_storage(cookie_name="S_GUEST")
    guest = Browser(guests)
    await guest.set(a=1)
    storage = make_storage(cookie_name="S")
    session = await Browser(storage, f"GUEST_{guest.cookie}").load()
    assert session.new
    later = make_storage(cookie_name="S_LATER")
    browser = Browser(later)
    await browser.set(a=1)
    assert (await Browser(storage, f"LATER_{browser.cookie}").load()).new
    with pytest.raises(ValueError, match="no key of another cookie's sessions"):
        storage._keys.get("LATER_1")
    assert storage._keys.get("LATER") == "S_LATER"
    assert make_storage(cookie_name="S", hash_ids=True)._keys.find("LATER_1") is not None


@pytest.mark.parametrize("names", [("S", "S_GUEST"), ("S_GUEST", "S")])
def test_names_of_which_one_begins_the_other_are_refused(names: tuple[str, str]) -> None:
    app = web.Application()
    setup(app, MemoryStorage(cookie_name=names[0]))
    with pytest.raises(ValueError, match="could be taken for each other: give one"):
        setup(app, MemoryStorage(cookie_name=names[1]), name="other")


def test_names_may_begin_alike() -> None:
    app = web.Application()
    setup(app, MemoryStorage(cookie_name="S", hash_ids=True))
    setup(app, MemoryStorage(cookie_name="S_GUEST"), name="guest")
    setup(app, MemoryStorage(cookie_name="SID"), name="third")
    setup(app, EncryptedCookieStorage(KEY, cookie_name="S_GUEST_2"), name="fourth")


async def test_a_session_that_always_changes_can_t_move(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = YieldingStorage(on_conflict="merge")
    browser = Browser(storage)
    await browser.set(x="secret")

    async def swap(*args: object) -> bool:
        return False

    async def no_pause(seconds: float) -> None:
        assert 0 <= seconds <= 0.02

    monkeypatch.setattr(settling, "sleep", no_pause)
    monkeypatch.setattr(storage.store, "swap", swap)
    with pytest.raises(ConflictError, match="in 100 attempts") as raised:
        await browser.do(log_in)
    assert "secret" not in str(raised.value)
    assert len(storage.store) == 1


async def test_a_store_without_a_time_limit_has_none(make_storage: MakeStorage) -> None:
    storage = YieldingStorage(on_conflict="merge")
    assert storage.store.timeout is None
    browser = Browser(storage)
    await browser.set(a=1)
    await browser.do(log_in)
    assert await browser.load() == {"a": 1, "user": "ann"}


async def test_moving_takes_no_more_round_trips_than_it_must(
    make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode, mark in (("overwrite", "update"), ("merge", "swap")):
        storage = make_storage(on_conflict=mode)
        browser = Browser(storage)
        await browser.set(a=1)
        with monkeypatch.context() as patch:
            calls = spy(patch, storage)
            await browser.do(log_in)
        assert calls == ["read", "create", mark, "delete"]
