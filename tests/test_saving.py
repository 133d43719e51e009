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
    saving,
    server_storage,
    setup,
)
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.saving import UNSEEN
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
    has_record: bool,
    moves: bool,
    empty: bool,
    changed: bool,
    merges: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = {
        # a record, new id, empty, changed, merges
        (False, None, False, None, None): "create",
        (False, None, True, None, None): "end",
        (True, True, False, None, None): "move",
        (True, True, True, None, None): "end",
        (True, False, False, True, False): "overwrite",
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
    done: list[str] = []
    for operation in set(table.values()):
        monkeypatch.setattr(storage, f"_{operation}", lambda *_, name=operation: done.append(name))
    _ = storage._store(session)
    assert done == expected


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
    storage.lose(("swap", is_done))
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
    storage.lose(("swap", is_done))
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
    storage.lose(("swap", is_done))
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
    storage = UnsettledStorage()
    storage.lose(("create", True))
    browser = Browser(storage)
    await browser.set(a=1)
    assert storage.store.calls == ["create", "create"]
    assert len(storage.store) == 2
    assert await browser.load() == {"a": 1}


async def test_a_second_loss_is_an_error() -> None:
    storage = UnsettledStorage()
    storage.lose(("create", True), ("create", False))
    browser = Browser(storage)
    with pytest.raises(UnsettledError):
        await browser.set(a=1)
    assert browser.cookie is None


def choose(session: Session) -> None:
    session.set_new_identity("chosen")
    session["a"] = 1


@pytest.mark.parametrize("is_done", [True, False])
@pytest.mark.parametrize("is_there", [True, False])
async def test_a_session_with_a_chosen_id_is_stored_by_a_swap(
    is_done: bool, is_there: bool
) -> None:
    storage = UnsettledStorage()
    if is_there:
        await storage.store.create("AIOHTTP_SESSION_chosen", b'{"created":1,"session":{}}', None)
    else:
        storage.lose(("swap", is_done))
    browser = Browser(storage)
    await browser.do(choose)
    assert {*storage.store.calls} - {"create"} == {"swap"}
    assert browser.cookie == "chosen"
    assert await browser.load() == {"a": 1}


@pytest.mark.parametrize("makes_ids", [True, False])
async def test_the_end_of_a_session_with_a_chosen_id_leaves_an_empty_record(
    makes_ids: bool,
) -> None:
    """A late write of an earlier session with this id finds that record, and not none."""
    storage = UnsettledStorage(key_factory=lambda: "chosen") if makes_ids else UnsettledStorage()
    browser = Browser(storage)
    await browser.do(add if makes_ids else choose)
    assert browser.cookie == "chosen"
    storage.store.calls.clear()
    response = (await browser.do(Session.invalidate))[1]
    assert is_deletion(response)
    assert storage.store.calls == ["swap"]
    assert await storage.store.read("AIOHTTP_SESSION_chosen") == b"{}"
    assert (await Browser(storage, "chosen").load()).new
    await browser.do(add if makes_ids else choose)
    assert await browser.load() == {"a": 1}


def add(session: Session) -> None:
    session["a"] = 1


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
    storage.lose(("swap", is_done))
    await browser.do(log_in)
    assert not storage.store.lost
    assert browser.cookie not in {None, before}
    assert await browser.load() == {"a": 1, "user": "ann"}
    assert len(storage.store) == 2  # with the mark


@MODES
@pytest.mark.parametrize("is_done", [True, False])
async def test_moving_notices_a_log_out_behind_a_lost_answer(mode: Any, is_done: bool) -> None:
    storage = UnsettledStorage(on_conflict=mode)
    browser = Browser(storage)
    await browser.set(a=1)
    key = storage._keys.get(str(browser.cookie))
    storage.lose(("swap", is_done))
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
    storage.lose(("swap", False))
    storage.store.between = lambda: other.set(b=2)
    # Nothing replaces a mark, so the mark was not written.
    await browser.do(log_in)
    merged = {"b": 2} if mode == "merge" else {}
    assert await browser.load() == {"a": 1, **merged, "user": "ann"}
    assert len(storage.store) == 2


@pytest.mark.parametrize("hash_ids", [True, False])
async def test_a_mark_stays_for_a_minute_and_names_the_new_key(
    make_storage: MakeStorage, clock: Clock, hash_ids: bool
) -> None:
    storage = make_storage(hash_ids=hash_ids)
    browser = Browser(storage)
    await browser.set(a=1)
    before = str(browser.cookie)
    slow = Browser(storage, before)

    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        await browser.do(log_in)
        session["late"] = True
        return web.Response()

    response = await slow.visit(handler)
    assert not response.cookies
    record = await stored(storage, before)
    assert record is not None
    assert json.loads(record) == {"moved": storage._keys.tail(browser.cookie)}
    assert (await Browser(storage, before).load()).new
    assert await browser.load() == {"a": 1, "user": "ann"}


async def test_a_mark_expires(clock: Clock) -> None:
    storage = MemoryStorage()
    browser = Browser(storage)
    await browser.set(a=1)
    before = str(browser.cookie)
    await browser.do(log_in)
    clock.now += 59
    assert await stored(storage, before) is not None
    clock.now += 1
    assert await stored(storage, before) is None


@MODES
async def test_an_ended_session_whose_record_can_t_be_deleted_is_over(
    caplog: pytest.LogCaptureFixture,
    make_storage: MakeStorage,
    monkeypatch: pytest.MonkeyPatch,
    mode: Any,
) -> None:
    storage = make_storage(on_conflict=mode)
    browser = Browser(storage)
    await browser.set(a=1)
    before = str(browser.cookie)
    slow = Browser(storage, before)

    async def fail(key: str) -> None:
        raise ConnectionResetError("at " + key)

    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        assert is_deletion((await browser.do(Session.invalidate))[1])
        session["late"] = True
        return web.Response()

    monkeypatch.setattr(storage.store, "delete", fail)
    assert not (await slow.visit(handler)).cookies
    failed, dropped = caplog.messages
    assert failed.startswith("The record of a session that has ended could not be deleted (Connec")
    assert dropped == DROPPED
    assert await stored(storage, before) == b"{}"
    assert (await Browser(storage, before).load()).new


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
@pytest.mark.parametrize("verb", ["create", "swap"])
async def test_moving_has_one_time_limit(mode: Any, verb: str) -> None:
    storage = YieldingStorage(on_conflict=mode)
    browser = Browser(storage)
    await browser.set(a=1)
    storage.store.timeout = 0.01
    setattr(storage.store, verb, never)
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.01 seconds"):
        await browser.do(log_in)


async def test_looking_up_has_the_save_s_time_limit() -> None:
    storage = UnsettledStorage()
    browser = Browser(storage)
    await browser.set(a=1)
    storage.store.timeout = 0.01  # type: ignore[assignment]
    storage.lose(("swap", True))
    storage.store.read_latest = never  # type: ignore[method-assign, assignment]
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.01 seconds"):
        await browser.set(b=2)


async def test_the_requests_that_wait_for_their_turn_wait_no_longer() -> None:
    storage = YieldingStorage(on_conflict="merge")
    browser = Browser(storage)
    await browser.set(a=1)
    storage.store.swap = never  # type: ignore[method-assign, assignment]
    first = asyncio.ensure_future(browser.set(b=1))
    await asyncio.sleep(0)
    storage.store.timeout = 0.01
    with pytest.raises(TimeoutError):
        await Browser(storage, browser.cookie).set(b=2)
    first.cancel()


async def test_a_new_session_in_place_of_another_has_one_time_limit_too() -> None:
    storage = YieldingStorage()
    browser = Browser(storage)
    await browser.set(a=1)

    async def handler(request: web.Request) -> web.Response:
        (await new_session(request))["b"] = 2
        return web.Response()

    storage.store.timeout = 0.01
    storage.store.swap = never  # type: ignore[method-assign, assignment]
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

    monkeypatch.setattr(saving, "sleep", no_pause)
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
    for mode in ("overwrite", "merge"):
        storage = make_storage(on_conflict=mode)
        browser = Browser(storage)
        await browser.set(a=1)
        with monkeypatch.context() as patch:
            calls = spy(patch, storage)
            await browser.do(log_in)
        assert calls == ["read", "create", "swap"]


async def test_a_renewal_merges_again_what_always_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = YieldingStorage(on_conflict="merge")
    browser = Browser(storage)
    await browser.set(a=1)
    other = Browser(storage, browser.cookie)
    create_anew, left = storage._create_anew, 2

    async def create(*args: Any) -> Any:
        nonlocal left
        created = await create_anew(*args)
        if left:
            left -= 1
            await other.set(left=left)
        return created

    monkeypatch.setattr(storage, "_create_anew", create)
    await browser.do(log_in)
    assert await browser.load() == {"a": 1, "user": "ann", "left": 0}

    left = 3
    other = Browser(storage, browser.cookie)
    monkeypatch.setattr(server_storage, "ATTEMPTS", 2)
    with pytest.raises(ConflictError, match="could not be merged in 2 attempts"):
        await browser.do(log_in)


async def test_a_session_without_items_that_was_ended_meanwhile_stays_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = YieldingStorage(on_conflict="merge")
    browser = Browser(storage)
    await browser.set(a=1)
    other = Browser(storage, browser.cookie)

    async def handler(request: web.Request) -> web.Response:
        session = await get_session(request)
        await other.do(Session.invalidate)
        del session["a"]
        return web.Response()

    await browser.visit(handler)
    assert len(storage.store) == 0
    assert DROPPED in caplog.messages


@MODES
async def test_a_renewal_that_makes_the_same_id_keeps_the_session(mode: Any) -> None:
    storage = YieldingStorage(on_conflict=mode, key_factory=lambda: "chosen")
    browser = Browser(storage)
    await browser.set(a=1)
    await browser.do(log_in)
    assert browser.cookie == "chosen"
    assert await browser.load() == {"a": 1, "user": "ann"}


@pytest.mark.parametrize("makes_ids", [True, False])
async def test_the_loser_of_a_renewal_takes_back_what_it_created(
    makes_ids: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the server refuses deletions, or the ids may be used again."""
    ids = iter(["first", "second", "third"])
    storage = YieldingStorage(key_factory=lambda: next(ids)) if makes_ids else YieldingStorage()
    browser = Browser(storage)
    await browser.set(a=1)
    other = Browser(storage, browser.cookie)
    create = storage._create_anew
    created: list[str] = []

    async def create_anew(*args: Any) -> Any:
        identity, payload = await create(*args)
        created.append(identity)
        if len(created) == 1:
            await other.do(log_in)
        return identity, payload

    async def refuse(key: str) -> None:
        raise PermissionError

    monkeypatch.setattr(storage, "_create_anew", create_anew)
    monkeypatch.setattr(storage.store, "delete", refuse)
    assert not (await browser.do(log_in))[1].cookies
    lost, won = created
    assert await stored(storage, lost) == b"{}"
    assert other.cookie == won
    assert await other.load() == {"a": 1, "user": "ann"}


async def test_marks_that_lead_in_a_circle_end() -> None:
    storage = YieldingStorage()
    key = storage._keys.at("id")
    await storage.store.create(key, b'{"moved":"id"}', None)
    assert await storage._end_record(key, UNSEEN, is_random=True) is None


async def test_a_lost_creation_is_no_device_of_the_owner() -> None:
    storage = UnsettledStorage(max_per_owner=2)
    first, second = Browser(storage), Browser(storage)

    def enter(session: Session) -> None:
        session.owner = "ann"

    await first.do(enter)
    storage.lose(("create", True))
    await second.do(enter)
    assert len(storage.store) == 4  # with the index, and the record whose id nobody knows
    assert len(await storage.sessions_of("ann")) == 2
    assert not (await first.load()).new
