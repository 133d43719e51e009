"""Writes that come late, and requests that meet in the middle of a renewal: one test for each case.

Each case was found by a program, in a storage that replaced records whatever they were. The tests
hold or lose single calls of the store, where the programs stop a proxy or wait.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiomcache
import pytest
from redis.asyncio import Redis

from aiohttp_session import Session
from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.server_storage import ServerStorage
from benchmarks import servers
from benchmarks.servers import HOST
from tests.gated_store import Act, Process, Visit, moments, records
from tests.history import Mode
from tests.stores import YieldingStore, has_mark
from tests.waiting import turns

pytestmark = pytest.mark.once  # the store has no twin

OWNER = "ann"
Start = Callable[..., Process]


def put(**items: Any) -> Act:
    return lambda session: session.update(items)


def renew(session: Session) -> None:
    session.regenerate_id()
    session["is_renewed"] = True


def log_in(owner: str) -> Act:
    def act(session: Session) -> None:
        renew(session)
        session.owner = owner

    return act


async def new(process: Process, *others: Process, **items: Any) -> str:
    """Return the cookie of a new session; the processes count what they create from now on."""
    for one in (process, *others):
        one.store.created.clear()
    return await process.make(**items)


def give_to(owner: str) -> Act:
    def act(session: Session) -> None:
        session.owner = owner

    return act


def leave(session: Session) -> None:
    session.invalidate()


@pytest.fixture(params=["overwrite", "merge"])
def mode(request: pytest.FixtureRequest) -> Mode:
    mode: Mode = request.param
    return mode


@pytest.fixture(scope="module")
def valkey_server() -> Iterator[servers.Server]:
    try:
        with servers.valkey() as server:
            yield server
    except servers.MissingServerError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["memory", "redis", "transactions", "valkey", "memcached"])
async def start(request: pytest.FixtureRequest, mode: Mode) -> AsyncIterator[Start]:
    """Yield a function that starts processes, all on one store."""
    kind = request.param
    shared = YieldingStore(max_records=100_000)
    async with contextlib.AsyncExitStack() as stack:

        def start(**options: Any) -> Process:
            options = {"max_age": 3600, "on_conflict": mode, **options}
            if kind == "memory":
                return Process(ServerStorage(shared, **options))
            if kind == "memcached":
                cache = aiomcache.Client(HOST, server.port)
                stack.push_async_callback(cache.close)
                storage: ServerStorage = MemcachedStorage(cache, **options)
            else:
                client = Redis(host=HOST, port=server.port, username=user)
                stack.push_async_callback(client.aclose)
                storage = RedisStorage(client, **options)
            stack.push_async_callback(storage.finish)
            return Process(storage)

        if kind != "memory":
            fixture = {"valkey": "valkey_server", "memcached": "memcached_server"}
            server = request.getfixturevalue(fixture.get(kind, "redis_server"))
            user = "web" if kind == "transactions" else None
            if user is not None:
                servers.ask(server, f"ACL SETUSER {user} reset on nopass ~* +@all -@scripting")
                stack.callback(servers.ask, server, f"ACL DELUSER {user}")
        if kind != "memory" and kind != "memcached":
            servers.ask(server, "FLUSHALL")
        elif kind == "memcached":
            servers.ask(server, "flush_all")
        yield start


async def test_a_save_that_was_answered_503_does_not_undo_a_later_one(start: Start) -> None:
    """late_write.py"""
    one, other = start(), start()
    cookie = await one.make(n=0)
    late = one.store.lose("swap")
    with pytest.raises(TimeoutError):
        await one.do(cookie, put(n=1))
    assert await other.do(cookie, put(n=2, paid=True)) == cookie
    await late.open()
    assert await other.load(cookie) == {"n": 2, "paid": True}


async def test_a_renewal_that_was_answered_503_does_not_end_a_session_that_is_used_since(
    start: Start,
) -> None:
    """late_write.py regenerate"""
    one, other = start(), start()
    cookie = await one.make(n=0)
    late = one.store.lose("swap")
    with pytest.raises(TimeoutError):
        await one.do(cookie, renew)
    assert await other.do(cookie, put(n=2)) == cookie
    await late.open()
    assert await other.load(cookie) == {"n": 2}


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_writes_of_one_process_never_overtake_each_other(
    start: Start, is_cancelled: bool
) -> None:
    """overtake.py"""
    process = start()
    cookie = await process.make(n=0)
    gate = process.store.hold("swap")
    older = process.begin(cookie, put(n=1))
    assert await gate.reached(older)
    if is_cancelled:
        older.cancel()
    newer = process.begin(cookie, put(n=2, paid=True))
    await turns()
    if is_cancelled:
        assert await newer == cookie
        await gate.open()
    else:
        assert not newer.done()
        await gate.open()
        assert [await older, await newer] == [cookie, cookie]
    assert await process.load(cookie) == {"n": 2, "paid": True}


async def test_of_two_renewals_one_wins(start: Start) -> None:
    """regenerate_fork.py"""
    one, other = start(), start()
    for moment in moments():
        cookie = await new(other, one, n=0)
        visit, rival = await Visit.begin(one, cookie), await Visit.begin(other, cookie)
        gate = one.store.hold(**moment)
        first = visit.go_on(renew)
        has_begun = await gate.reached(first)
        second = await rival.go_on(renew)
        if not has_begun:
            return
        await gate.open()
        ids = [cookie, await first, second]
        assert ids.count(None) == 1
        [live] = await other.live(*ids)
        assert live != cookie
        assert await records(one, other) == [live]
        assert await other.do(live, leave) == ""
        assert await other.live(*ids) == await records(one, other) == []


async def test_a_former_id_stays_dead_whatever_a_slow_request_saves(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mark.py"""
    one, other = start(), start()
    cookie = await one.make(n=0)
    slow = await Visit.begin(other, cookie)

    async def delete(key: str) -> None:
        raise ConnectionError

    monkeypatch.setattr(one.store, "delete", delete)
    renewed = await one.do(cookie, renew)
    assert renewed not in {None, cookie}
    assert await slow.go_on(put(n=1)) is None
    assert await has_mark(other.storage, cookie)
    assert await other.live(cookie, renewed) == [renewed]


async def test_a_renewal_that_is_cancelled_has_ended_its_former_id_for_good_or_not_at_all(
    start: Start,
) -> None:
    """moved_revived.py"""
    one, other = start(), start()
    for moment in moments():
        cookie = await other.make(n=0)
        slow = await Visit.begin(other, cookie)
        visit = await Visit.begin(one, cookie)
        gate = one.store.hold(**moment)
        renewal = visit.go_on(renew)
        if not await gate.reached(renewal):
            await slow.go_on(put(n=1))
            return
        renewal.cancel()
        await asyncio.wait({renewal})
        has_moved = await has_mark(other.storage, cookie)
        assert await slow.go_on(put(n=1)) == (None if has_moved else cookie)
        await gate.open()
        assert await has_mark(other.storage, cookie) == has_moved
        assert await other.live(cookie) == ([] if has_moved else [cookie])


async def test_end_session_ends_a_session_that_is_being_renewed(start: Start) -> None:
    """end_session.py"""
    one, other = start(), start()
    for number, moment in enumerate(moments()):
        owner = f"{OWNER}{number}"
        cookie = await new(other, one, owner=owner, n=0)
        [info] = await other.storage.sessions_of(owner)
        visit = await Visit.begin(one, cookie)
        gate = one.store.hold(**moment)
        renewal = visit.go_on(renew)
        if not await gate.reached(renewal):
            return
        assert await other.storage.end_session(owner, info.handle) is True
        await gate.open()
        assert await other.live(cookie, await renewal) == []
        assert await other.storage.sessions_of(owner) == []
        assert await records(one) == []


async def test_a_logout_ends_a_session_that_is_being_renewed(start: Start) -> None:
    one, other = start(), start()
    for moment in moments():
        cookie = await new(other, one, n=0)
        slow = await Visit.begin(other, cookie)
        visit = await Visit.begin(one, cookie)
        gate = one.store.hold(**moment)
        renewal = visit.go_on(renew)
        has_begun = await gate.reached(renewal)
        assert await slow.go_on(leave) == ""
        if not has_begun:
            return
        await gate.open()
        assert await other.live(cookie, await renewal) == await records(one) == []


async def test_end_sessions_keeps_a_session_that_is_being_renewed(start: Start) -> None:
    """keep.py"""
    one, other = start(), start()
    for number, moment in enumerate(moments()):
        owner = f"{OWNER}{number}"
        cookie, device = await new(other, one, owner=owner, n=1), await other.make(owner, n=2)
        kept = await other.load(cookie)
        visit = await Visit.begin(one, cookie)
        gate = one.store.hold(**moment)
        renewal = visit.go_on(renew)
        if not await gate.reached(renewal):
            return
        assert await other.storage.end_sessions(owner, keep=kept) == 1
        await gate.open()
        renewed = await renewal
        assert renewed is not None
        assert await other.live(cookie, renewed, device) == [renewed]
        assert len(await other.storage.sessions_of(owner)) == 1
        assert await other.storage.end_sessions(owner) == 1
        assert await other.live(cookie, renewed, device) == []


@pytest.mark.parametrize("most", [1, 2, 3])
async def test_two_logins_of_one_session_count_as_one(start: Start, most: int) -> None:
    """double_login.py"""
    one, other = start(max_per_owner=most), start(max_per_owner=most)
    for number, moment in enumerate(moments()):
        owner = f"{OWNER}{number}"
        devices = [await other.make(owner, device=device) for device in range(most - 1)]
        cookie = await new(other, one, n=0)
        visit, rival = await Visit.begin(one, cookie), await Visit.begin(other, cookie)
        gate = one.store.hold(**moment)
        first = visit.go_on(log_in(owner))
        has_begun = await gate.reached(first)
        second = await rival.go_on(log_in(owner))
        if not has_begun:
            return
        await gate.open()
        ids = [cookie, await first, second]
        assert ids.count(None) == 1
        [live] = await other.live(*ids)
        assert live != cookie
        assert await other.live(*devices) == devices
        assert len(await other.storage.sessions_of(owner)) == most


async def test_a_logout_with_a_former_id_ends_the_session(start: Start) -> None:
    """A browser sends the former id until it has received the response of the renewal."""
    one, other = start(), start()
    cookie = await one.make(n=0)
    renewed = await one.do(cookie, renew)
    assert await other.do(cookie, leave) == ""
    assert await other.live(cookie, renewed) == []


@pytest.mark.parametrize("mode", ["overwrite"], indirect=True)
async def test_a_session_that_a_late_save_gives_back_to_its_former_owner_is_listed(
    start: Start,
) -> None:
    one, other = start(), start()
    cookie = await one.make("ann", n=0)
    change, slow = await Visit.begin(one, cookie), await Visit.begin(other, cookie)
    assert await change.go_on(give_to("bob")) == cookie
    assert await slow.go_on(put(n=1)) == cookie
    assert (await other.load(cookie)).owner == "ann"
    assert len(await other.storage.sessions_of("ann")) == 1
    assert await other.storage.end_sessions("ann") == 1
    assert await other.live(cookie) == []
