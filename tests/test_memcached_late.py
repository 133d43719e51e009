"""Each operation on memcached is done once or known to have failed, whatever arrives late."""

from __future__ import annotations

import asyncio
import re
import select
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiomcache
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiohttp_session.stores import UnsettledError, _memcached_client
from aiohttp_session.stores._memcached_client import Client
from aiohttp_session.stores._memcached_connection import Connection
from aiohttp_session.stores._memcached_protocol import ConnectionLostError
from aiohttp_session.stores.memcached import MemcachedStore
from benchmarks.servers import HOST, Server
from tests.held_memcached import HeldProxy
from tests.waiting import LoopClock, turns

HOUR = 3600  # the time limit: no test waits for it


def make_store(port: int, timeout: float = HOUR) -> MemcachedStore:
    return MemcachedStore(aiomcache.Client(HOST, port), timeout=timeout)


def client_of(store: MemcachedStore) -> Client:
    return store._operations.get()._client


async def flush(store: MemcachedStore) -> None:
    await store._client.flush_all()
    await store._client.close()


@pytest.fixture
async def proxy(memcached_server: Server) -> AsyncIterator[HeldProxy]:
    async with HeldProxy(memcached_server.port) as proxy:
        yield proxy


@pytest.fixture
async def other(memcached_server: Server) -> AsyncIterator[MemcachedStore]:
    """Another process's store, whose network is well."""
    store = make_store(memcached_server.port)
    await flush(store)
    yield store
    await store.finish()


@pytest.fixture
async def store(proxy: HeldProxy, other: MemcachedStore) -> AsyncIterator[MemcachedStore]:
    """Has an open connection, and the record of "k" read."""
    await other.create("k", b"v0", None)
    store = make_store(proxy.port)
    assert await store.read("k") == b"v0"
    yield store
    await store.finish()


async def lose_bytes_of(operation: Awaitable[Any], proxy: HeldProxy) -> Any:
    """Begin an operation, and cut its connection while the network holds what was sent."""
    proxy.hold()
    task = asyncio.ensure_future(operation)
    await proxy.holds()
    proxy.cut()
    return await task


async def lose_reply_of(operation: Awaitable[Any], proxy: HeldProxy) -> Any:
    """Do an operation whose first reply is lost, together with its connection."""
    proxy.replies_to_lose = 1
    return await operation


async def test_late_duplicate_of_an_update_does_not_undo_a_newer_one(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    assert await lose_bytes_of(store.update("k", b"v1", None), proxy) is True
    assert await other.update("k", b"v2", None)
    await proxy.release()
    assert bytes(proxy.passed).count(b"v1") == 2
    assert await other.read("k") == b"v2"


async def test_late_duplicate_of_an_update_does_not_undo_a_logout(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    assert await lose_bytes_of(store.update("k", b"v1", None), proxy) is True
    await other.delete("k")
    await proxy.release()
    assert await other.read("k") is None


async def test_late_duplicate_of_an_update_leaves_a_record_made_anew(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    assert await lose_bytes_of(store.update("k", b"v1", None), proxy) is True
    await other.delete("k")
    await other.create("k", b"anew", None)
    await proxy.release()
    assert await other.read("k") == b"anew"


async def after_its_read(
    store: MemcachedStore, happens: Callable[[], Awaitable[object]], operation: Awaitable[Any]
) -> Any:
    """Do an operation that reads first, with something that happens before it goes on."""
    client = client_of(store)
    gets = client.gets

    async def gets_and_wait(key: bytes, deadline: float) -> tuple[bytes | None, bytes]:
        patch.undo()
        result = await gets(key, deadline)
        await happens()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "gets", gets_and_wait)
        return await operation


async def test_late_duplicate_of_a_swap_does_nothing(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    async def hold() -> None:
        proxy.hold()

    swap = after_its_read(store, hold, store.swap("k", b"v0", b"v1", None))
    task = asyncio.ensure_future(swap)
    await proxy.holds()
    proxy.cut()
    assert await task is True
    assert await other.swap("k", b"v1", b"v0", None)
    await proxy.release()
    assert bytes(proxy.passed).count(b"cas") == 2
    assert await other.read("k") == b"v0"


@pytest.mark.parametrize("newer", [None, b"v2"])
async def test_swap_whose_reply_was_lost_is_settled_by_reading(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy, newer: bytes | None
) -> None:
    async def lose() -> None:
        proxy.replies_to_lose = 1
        if newer is not None:
            assert await other.update("k", newer, None)

    swap = after_its_read(store, lose, store.swap("k", b"v0", b"v1", None))
    if newer is None:
        assert await swap is True
        assert await other.read("k") == b"v1"
    else:
        with pytest.raises(UnsettledError):
            await swap
        assert await other.read("k") == newer


async def test_swap_for_nothing_stores_what_is_not_there(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    assert await lose_reply_of(store.swap("new", None, b"v1", None), proxy) is True
    assert await store.swap("new", None, b"v2", None) is False
    with pytest.raises(ConnectionLostError):
        await lose_bytes_of(store.swap("newer", None, b"v1", None), proxy)
    assert await other.read("new") == b"v1"


async def test_write_that_failed_is_not_done_after_a_later_one(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    proxy.hold()
    update = asyncio.ensure_future(store.update("k", b"v1", None))
    await proxy.holds()
    update.cancel()
    proxy.cut()
    assert await other.read("k") == b"v0"
    assert await other.update("k", b"v2", None)
    await proxy.release()
    assert await other.read("k") == b"v2"


async def test_create_whose_fate_is_unknown_is_an_error_and_not_repeated(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    with pytest.raises(ConnectionError) as caught:
        await lose_bytes_of(store.create("new", b"v1", None), proxy)
    assert not isinstance(caught.value, UnsettledError)  # it may be done yet
    assert b"add" not in proxy.passed
    assert await other.read("new") is None
    await proxy.release()
    assert bytes(proxy.passed).count(b"add") == 1


async def test_create_whose_reply_was_lost_is_settled_by_reading(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    await lose_reply_of(store.create("new", b"v1", None), proxy)
    assert bytes(proxy.passed).count(b"add") == 1
    assert await other.read("new") == b"v1"


async def test_create_replaces_what_there_is(store: MemcachedStore, other: MemcachedStore) -> None:
    await store.create("k", b"v1", None)
    assert await other.read("k") == b"v1"


async def test_create_goes_on_when_what_there_was_is_deleted_meanwhile(
    store: MemcachedStore, other: MemcachedStore
) -> None:
    await after_its_read(store, lambda: other.delete("k"), store.create("k", b"v1", None))
    assert await other.read("k") == b"v1"


async def test_update_and_delete_whose_replies_were_lost_are_done(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    assert await lose_reply_of(store.update("k", b"v1", None), proxy) is True
    assert await other.read("k") == b"v1"
    await lose_reply_of(store.delete("k"), proxy)
    assert await other.read("k") is None


@pytest.mark.parametrize("newer", [b"v2", None])
async def test_update_that_cannot_be_settled_says_so(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy, newer: bytes | None
) -> None:
    if newer is None:
        await other.delete("k")
    else:
        assert await other.update("k", newer, None)
    with pytest.raises(UnsettledError):
        await lose_reply_of(store.update("k", b"v1", None), proxy)
    assert await other.read("k") == newer


async def test_read_is_repeated(store: MemcachedStore, proxy: HeldProxy) -> None:
    async def read(key: str) -> bytes | None:
        return await store.read(key)

    assert await lose_bytes_of(read("k"), proxy) == b"v0"
    both = asyncio.gather(read("k"), read("none"))
    assert await lose_reply_of(both, proxy) == [b"v0", None]


@pytest.mark.parametrize(
    "operation",
    [
        lambda store: store.read("k"),
        lambda store: store.update("k", b"v1", None),
        lambda store: store.swap("k", b"v0", b"v1", None),
        lambda store: store.create("k", b"v1", None),
        lambda store: store.delete("k"),
    ],
)
async def test_operation_that_nobody_waits_for_is_not_sent_again(
    store: MemcachedStore,
    proxy: HeldProxy,
    operation: Callable[[MemcachedStore], Awaitable[object]],
) -> None:
    proxy.passed.clear()
    proxy.hold()
    abandoned = asyncio.ensure_future(operation(store))
    await proxy.holds()
    abandoned.cancel()
    proxy.cut()
    await store.read("other")
    assert bytes(proxy.passed) == b"gets other\r\n"


@pytest.mark.parametrize(
    ("operation", "commands"),
    [
        (lambda store: store.read("k"), ["gets"] * 4),
        (lambda store: store.update("k", b"v1", None), ["cas"] * 4),
        (lambda store: store.swap("k", b"v0", b"v1", None), ["gets"] * 4),
        (lambda store: store.create("k", b"v1", None), ["add"] + ["gets"] * 4),
        (lambda store: store.delete("k"), ["delete"] * 4),
    ],
)
async def test_command_is_not_repeated_for_ever(
    store: MemcachedStore,
    proxy: HeldProxy,
    operation: Callable[[MemcachedStore], Awaitable[object]],
    commands: list[str],
) -> None:
    proxy.passed.clear()
    proxy.replies_to_lose = 10
    with pytest.raises(ConnectionLostError):
        await operation(store)
    assert re.findall(r"(gets|cas|add|delete) k", proxy.passed.decode()) == commands


async def test_stalled_connection_is_given_up_with_time_left_for_another(
    store: MemcachedStore, proxy: HeldProxy
) -> None:
    proxy.hold()
    reads = [asyncio.ensure_future(store.read("k")) for _ in range(2)]
    await proxy.holds()
    (stalled,) = client_of(store)._connections
    now = asyncio.get_running_loop().time()
    assert now + HOUR / 3 < stalled.due < now + HOUR * 2 / 3
    stalled.expire(stalled.due)
    assert await asyncio.gather(*reads) == [b"v0"] * 2
    assert proxy.accepted == 2


@pytest.mark.parametrize(
    ("left", "patience"), [(HOUR, HOUR / 2), (HOUR / 2, HOUR / 4), (60, HOUR / 8)]
)
async def test_stalled_connection_leaves_half_of_what_its_command_had_left(
    store: MemcachedStore, proxy: HeldProxy, loop_clock: LoopClock, left: float, patience: float
) -> None:
    proxy.hold()
    client = client_of(store)
    now = loop_clock()
    reading = client.gets(b"k", now + left)
    await proxy.holds()
    (connection,) = client._connections
    assert connection._given_up - now == pytest.approx(patience, abs=1)
    await proxy.release()
    assert (await reading)[0] == b"v0"


async def open_another(store: MemcachedStore, clock: LoopClock) -> list[Connection]:
    """Have two connections open and idle."""
    large = b"x" * 65536
    await asyncio.gather(*(store.create(f"large{number}", large, None) for number in range(2)))
    clock.advance(1)
    connections = client_of(store)._connections
    assert len(connections) == 2
    return [*connections]


async def test_when_one_connection_stalls_those_that_are_idle_are_not_used(
    store: MemcachedStore, proxy: HeldProxy, loop_clock: LoopClock
) -> None:
    await open_another(store, loop_clock)
    proxy.hold()  # both: a network that has forgotten them
    first = asyncio.ensure_future(store.read("k"))
    await proxy.holds()
    loop_clock.advance(2)
    assert await store.read("k") == b"v0"
    assert proxy.accepted == 3
    proxy.cut()
    assert await first == b"v0"


async def test_what_a_stalled_connection_owes_is_not_asked_of_those_that_were_idle(
    store: MemcachedStore, proxy: HeldProxy, loop_clock: LoopClock
) -> None:
    stalled, _ = await open_another(store, loop_clock)
    proxy.hold()
    read = asyncio.ensure_future(store.read("k"))
    await proxy.holds()
    stalled.expire(stalled.due)
    assert await read == b"v0"
    assert proxy.accepted == 3


async def test_steps_of_an_operation_share_its_time_limit(
    store: MemcachedStore, proxy: HeldProxy
) -> None:
    deadlines = []
    client = client_of(store)
    submit = client._submit

    def watched(command: Any) -> Any:
        deadlines.append(command.deadline)
        return submit(command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "_submit", watched)
        await store.create("k", b"v1", None)
    assert len(deadlines) == 3  # add, gets, cas
    assert len(set(deadlines)) == 1


async def test_command_that_is_due_fails_and_the_stream_goes_on(
    store: MemcachedStore, proxy: HeldProxy, loop_clock: LoopClock
) -> None:
    """It was sent late in its operation's time, so the connection has not stalled."""
    loop = asyncio.get_running_loop()
    client = client_of(store)
    late = client.gets(b"k", loop.time() - 1)
    later = client.get(b"k")
    with pytest.raises(TimeoutError, match="memcached"):
        await late
    assert await later == b"v0"
    loop_clock.advance(HOUR)  # the timer that was set before
    await turns()
    assert await store.read("k") == b"v0"
    assert proxy.accepted == 1


async def test_connection_that_is_closing_is_not_used(
    store: MemcachedStore, proxy: HeldProxy
) -> None:
    (connection,) = client_of(store)._connections
    connection._transport.close()  # type: ignore[union-attr]
    assert await store.read("k") == b"v0"
    assert proxy.accepted == 2


async def test_connection_that_is_slow_gets_no_more_commands(
    store: MemcachedStore, proxy: HeldProxy, loop_clock: LoopClock
) -> None:
    proxy.hold()
    first = store.read("k")
    await proxy.holds()
    loop_clock.advance(2)
    assert await store.read("k") == b"v0"
    assert proxy.accepted == 2
    proxy.cut()
    assert await first == b"v0"


async def test_update_gets_the_token_that_is_no_longer_kept(
    store: MemcachedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_memcached_client, "_TOKENS_LIMIT", 2)
    client = client_of(store)
    keys = [f"k{number}" for number in range(10)]
    for key in keys:
        await store.create(key, b"v0", None)
        await store.read(key)
    assert len(client._tokens) + len(client._older_tokens) < 7
    for key in keys:
        assert await store.update(key, b"v1", None)
        assert await store.read(key) == b"v1"


async def test_updates_at_the_same_time_are_all_done_in_turn(
    store: MemcachedStore, proxy: HeldProxy
) -> None:
    payloads = [b"%d" % number for number in range(30)]
    done = await asyncio.gather(*(store.update("k", payload, None) for payload in payloads))
    assert done == [True] * 30
    assert await store.read("k") in payloads
    assert bytes(proxy.passed).count(b"cas k") < 2 * 30  # were they to compete: 400


async def test_finish_waits_for_operations_of_several_steps(
    store: MemcachedStore, other: MemcachedStore
) -> None:
    await asyncio.gather(store.create("k", b"v1", None), store.finish())
    assert await other.read("k") == b"v1"


@pytest.mark.parametrize("is_uvloop", [False, True])
def test_reply_that_came_while_the_process_stood_still_is_read(
    memcached_server: Server, is_uvloop: bool
) -> None:
    async def serve() -> None:
        store = make_store(memcached_server.port)
        await store.create("k", b"v1", None)
        client = client_of(store)
        (connection,) = client._connections
        client._timeout = connection._timeout = 0.01
        client._timer_at = float("inf")
        read = store.read("k")
        socket = connection._transport.get_extra_info("socket").fileno()  # type: ignore[union-attr]
        assert select.select([socket], [], [], 60)[0]
        time.sleep(0.02)  # noqa: ASYNC251 - the process stands still until the read is overdue
        # As a loop does that looks at its timers before its sockets; which do depends on versions.
        loop = asyncio.get_running_loop()
        loop.call_soon(client._expire, client._timer_at, loop)
        assert await read == b"v1"
        await store.finish()

    loop = pytest.importorskip("uvloop").new_event_loop() if is_uvloop else asyncio.new_event_loop()
    try:
        loop.run_until_complete(serve())
    finally:
        loop.close()


STEPS = st.lists(
    st.sampled_from(["hold", "lose", "release"])
    | st.tuples(st.sampled_from(["read", "update", "swap", "delete"]), st.booleans()),
    min_size=3,
    max_size=12,
)


@settings(settings.get_profile("storages"))
@given(STEPS)
@example(["hold", ("update", True), ("update", False), "release"])
@example(["hold", ("swap", True), ("swap", False), "release"])
@example(["hold", ("update", True), ("delete", False), "release"])
@example(["lose", ("update", True), ("update", False), "lose", ("delete", True)])
def test_acknowledged_writes_are_not_undone(memcached_server: Server, steps: list[Any]) -> None:
    """Two processes, one of them behind a network that holds, loses and delivers late."""

    async def run() -> None:
        async with HeldProxy(memcached_server.port) as proxy:
            near, far = make_store(memcached_server.port), make_store(proxy.port)
            await flush(near)
            await near.create("k", b"0", None)
            await far.read("k")
            record = Record(b"0")
            for number, step in enumerate([*steps, "release"]):
                if step == "hold":
                    proxy.hold()
                elif step == "lose":
                    proxy.replies_to_lose = 1
                elif step == "release":
                    await proxy.release()
                else:
                    name, is_far = step
                    seen = await near.read("k")
                    operation = begin(name, far if is_far else near, seen, b"%d" % number)
                    await record.note(name, end(operation, proxy), b"%d" % number)
                record.see(await near.read("k"))
            proxy.replies_to_lose = 0
            await near.finish()
            await far.finish()

    asyncio.run(run())


def begin(
    name: str, store: MemcachedStore, seen: bytes | None, payload: bytes
) -> Awaitable[bytes | bool | None]:
    if name == "read":
        return store.read("k")
    if name == "update":
        return store.update("k", payload, None)
    if name == "swap":
        return store.swap("k", seen or b"", payload, None)
    return store.delete("k")


async def end(operation: Awaitable[Any], proxy: HeldProxy) -> Any:
    """Wait for an operation; what is held back is not waited for for ever, but cut."""
    task = asyncio.ensure_future(operation)
    while True:
        holds = asyncio.ensure_future(proxy.holds())
        await asyncio.wait({task, holds}, return_when=asyncio.FIRST_COMPLETED)
        holds.cancel()
        if task.done():
            return await task
        proxy.cut()


class Record:
    """What the record is, as far as that was acknowledged or seen, and what it may become."""

    def __init__(self, payload: bytes) -> None:
        self._payload: bytes | None = payload
        self._late: set[bytes] = set()  # of writes that have failed since
        self._may_go = False  # a delete has failed

    async def note(self, name: str, operation: Awaitable[Any], payload: bytes) -> None:
        try:
            result = await operation
        except ConnectionError:
            if name == "delete":
                self._may_go = True
            elif name != "read":
                self._late.add(payload)
            return
        if name == "read":
            self.see(result)
        elif name == "delete":
            self._become(None)
        elif result:
            assert self._payload is not None
            self._become(payload)
        else:
            assert self._payload is None

    def see(self, payload: bytes | None) -> None:
        if payload != self._payload:
            assert payload in self._late or (payload is None and self._may_go)
            self._become(payload)

    def _become(self, payload: bytes | None) -> None:
        self._payload = payload
        self._late = set()
