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

from aiohttp_session.stores import UnsettledError
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


async def lose_bytes_of_write(operation: Awaitable[Any], proxy: HeldProxy) -> None:
    """Have the network hold a write, and its connection be lost."""
    with pytest.raises(UnsettledError, match="unknown whether the write was applied"):
        await lose_bytes_of(operation, proxy)


async def lose_reply_of_write(operation: Awaitable[Any], proxy: HeldProxy) -> None:
    """Have a write be applied, and its reply be lost."""
    with pytest.raises(UnsettledError, match="unknown whether the write was applied"):
        await lose_reply_of(operation, proxy)


async def replace(store: MemcachedStore) -> bytes | None:
    assert await store.swap("k", b"v0", b"v2", None)
    return b"v2"


async def log_out(store: MemcachedStore) -> bytes | None:
    await store.delete("k")
    return None


async def make_anew(store: MemcachedStore) -> bytes | None:
    await store.delete("k")
    await store.create("k", b"v0", None)  # the same bytes, in another version
    return b"v0"


@pytest.mark.parametrize("later", [replace, log_out, make_anew])
async def test_late_swap_does_not_undo_a_later_write(
    store: MemcachedStore,
    other: MemcachedStore,
    proxy: HeldProxy,
    later: Callable[[MemcachedStore], Awaitable[bytes | None]],
) -> None:
    await lose_bytes_of_write(store.swap("k", b"v0", b"v1", None), proxy)
    assert b"v1" not in proxy.passed
    written = await later(other)
    await proxy.release()
    assert bytes(proxy.passed).count(b"v1") == 1
    assert await other.read("k") == written


async def test_late_swap_is_applied_if_nobody_has_written(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    await lose_bytes_of_write(store.swap("k", b"v0", b"v1", None), proxy)
    assert await other.read("k") == b"v0"
    await proxy.release()
    assert await other.read("k") == b"v1"


async def test_late_swap_that_was_repeated_is_applied_once(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    await lose_bytes_of_write(store.swap("k", b"v0", b"v1", None), proxy)
    assert await store.swap("k", b"v0", b"v1", None)
    assert await other.swap("k", b"v1", b"v0", None)
    await proxy.release()
    assert bytes(proxy.passed).count(b"v1") == 2
    assert await other.read("k") == b"v0"


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


async def test_late_swap_that_read_the_record_itself_does_not_undo_a_later_write(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    async def hold() -> None:
        proxy.hold()

    client_of(store)._forget()
    swap = after_its_read(store, hold, store.swap("k", b"v0", b"v1", None))
    task = asyncio.ensure_future(swap)
    await proxy.holds()
    proxy.cut()
    with pytest.raises(UnsettledError):
        await task
    assert await other.swap("k", b"v0", b"v2", None)
    await proxy.release()
    assert bytes(proxy.passed).count(b"cas") == 1
    assert await other.read("k") == b"v2"


async def test_swap_finds_a_record_that_was_changed_after_its_read(
    store: MemcachedStore, other: MemcachedStore
) -> None:
    client_of(store)._forget()
    swap = store.swap("k", b"v0", b"v1", None)
    assert await after_its_read(store, lambda: replace(other), swap) is False
    assert await other.read("k") == b"v2"


async def test_swap_whose_reply_was_lost_is_unsettled_and_tells_when_it_is_repeated(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    await lose_reply_of_write(store.swap("k", b"v0", b"v1", None), proxy)
    assert await other.read("k") == b"v1"
    assert await store.swap("k", b"v0", b"v1", None) is False
    assert bytes(proxy.passed).count(b"cas") == 1  # what was read first forbade the other


async def test_swap_for_nothing_stores_what_is_not_there(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    await lose_reply_of_write(store.swap("new", None, b"v1", None), proxy)
    assert await store.swap("new", None, b"v2", None) is False
    assert await other.read("new") == b"v1"
    await lose_bytes_of_write(store.swap("newer", None, b"v1", None), proxy)
    assert await other.read("newer") is None
    assert await other.swap("newer", None, b"v2", None) is True
    await proxy.release()
    assert bytes(proxy.passed).count(b"add newer") == 1
    assert await other.read("newer") == b"v2"


async def test_write_whose_request_was_cancelled_does_not_undo_a_later_one(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    proxy.hold()
    swap = asyncio.ensure_future(store.swap("k", b"v0", b"v1", None))
    await proxy.holds()
    swap.cancel()
    proxy.cut()
    assert await other.read("k") == b"v0"
    assert await other.swap("k", b"v0", b"v2", None)
    await proxy.release()
    assert await other.read("k") == b"v2"


async def test_create_whose_outcome_is_unknown_is_not_repeated(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    await lose_bytes_of_write(store.create("new", b"v1", None), proxy)
    assert b"set new" not in proxy.passed
    assert await other.read("new") is None
    await proxy.release()
    assert bytes(proxy.passed).count(b"set new") == 1


async def test_create_whose_reply_was_lost_is_unsettled(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    await lose_reply_of_write(store.create("new", b"v1", None), proxy)
    assert bytes(proxy.passed).count(b"set new") == 1
    assert await other.read("new") == b"v1"


async def test_create_replaces_what_there_is(store: MemcachedStore, other: MemcachedStore) -> None:
    await store.create("k", b"v1", None)
    assert await other.read("k") == b"v1"


async def test_delete_whose_reply_was_lost_is_done(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    await lose_reply_of(store.delete("k"), proxy)
    assert await other.read("k") is None


async def test_delete_that_is_held_is_done_by_another_connection(
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    await lose_bytes_of(store.delete("k"), proxy)
    assert await other.read("k") is None
    await proxy.release()
    assert bytes(proxy.passed).count(b"delete k") == 2


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
        lambda store: store.swap("k", b"v0", b"v1", None),
        lambda store: store.swap("k", b"not read", b"v1", None),
        lambda store: store.swap("k", None, b"v1", None),
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
    ("operation", "commands", "error"),
    [
        (lambda store: store.read("k"), ["gets"] * 4, ConnectionLostError),
        (lambda store: store.swap("k", b"v0", b"v1", None), ["cas"], UnsettledError),
        (lambda store: store.swap("k", b"not read", b"v1", None), ["gets"] * 4, UnsettledError),
        (lambda store: store.swap("k", None, b"v1", None), ["add"], UnsettledError),
        (lambda store: store.create("k", b"v1", None), ["set"], UnsettledError),
        (lambda store: store.delete("k"), ["delete"] * 4, ConnectionError),
    ],
)
async def test_only_reads_and_deletions_are_repeated_and_not_for_ever(
    store: MemcachedStore,
    proxy: HeldProxy,
    operation: Callable[[MemcachedStore], Awaitable[object]],
    commands: list[str],
    error: type[Exception],
) -> None:
    proxy.passed.clear()
    proxy.replies_to_lose = 10
    with pytest.raises(error):
        await operation(store)
    assert re.findall(r"(gets|set|cas|add|delete) k", proxy.passed.decode()) == commands


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
    store: MemcachedStore, other: MemcachedStore, proxy: HeldProxy
) -> None:
    await make_anew(other)
    deadlines = []
    client = client_of(store)
    submit = client._submit

    def watched(command: Any) -> Any:
        deadlines.append(command.deadline)
        return submit(command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "_submit", watched)
        assert await store.swap("k", b"v0", b"v1", None)
    assert len(deadlines) == 3  # cas, gets, cas
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


async def test_finish_waits_for_operations_of_several_steps(
    store: MemcachedStore, other: MemcachedStore
) -> None:
    client_of(store)._forget()
    await asyncio.gather(store.swap("k", b"v0", b"v1", None), store.finish())
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
    | st.tuples(st.sampled_from(["read", "swap", "swap stale", "delete"]), st.booleans()),
    min_size=3,
    max_size=12,
)


@settings(settings.get_profile("storages"))
@given(STEPS)
@example(["hold", ("swap", True), ("swap", False), "release"])
@example(["hold", ("swap", True), ("swap", True), ("swap", False), "release"])
@example(["hold", ("swap", True), ("delete", False), ("swap", False), "release"])
@example(["lose", ("swap", True), ("swap", False), "lose", ("delete", True)])
@example([("swap", True), ("swap stale", False), "hold", ("delete", True), ("swap stale", True)])
def test_acknowledged_writes_are_not_undone(memcached_server: Server, steps: list[Any]) -> None:
    """Two processes, one of them behind a network that holds, loses and delivers late."""

    async def run() -> None:
        async with HeldProxy(memcached_server.port) as proxy:
            near, far = make_store(memcached_server.port), make_store(proxy.port)
            await flush(near)
            await near.create("k", b"0", None)
            await far.read("k")
            record = Record(b"0")
            for number, step in enumerate([*steps, "release"], 1):
                if step == "hold":
                    proxy.hold()
                elif step == "lose":
                    proxy.replies_to_lose = 1
                elif step == "release":
                    await proxy.release()
                else:
                    name, is_far = step
                    record.see(await near.read("k"))
                    await record.follow(name, far if is_far else near, b"%d" % number, proxy)
                    # A late one would remove a record under the same key, which ids never have.
                    record.may_go |= step == ("delete", True)
                record.see(await near.read("k"))
            proxy.replies_to_lose = 0
            await near.finish()
            await far.finish()

    asyncio.run(run())


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
        self._former: bytes | None = b"never"
        self._late: set[bytes] = set()  # of swaps from this record that are unsettled
        self._may_be_added: set[bytes] = set()  # by those from none, whenever there is none
        self.may_go = False
        """A deletion was held back, perhaps."""

    async def follow(
        self, name: str, store: MemcachedStore, payload: bytes, proxy: HeldProxy
    ) -> None:
        """Do an operation, and take down what came of it."""
        is_swap = name.startswith("swap")
        expected = self._former if name == "swap stale" else self._payload
        operation: Awaitable[Any]
        if is_swap:
            operation = store.swap("k", expected, payload, None)
        else:
            operation = store.read("k") if name == "read" else store.delete("k")
        try:
            result = await end(operation, proxy)
        except ConnectionError:
            if is_swap and expected is None:
                self._may_be_added.add(payload)
            elif is_swap and expected == self._payload:
                self._late.add(payload)
            return
        if name == "read":
            self.see(result)
        elif name == "delete":
            self._become(None)
        elif result:
            assert expected == self._payload
            self._become(payload)
        else:
            assert expected != self._payload

    def see(self, payload: bytes | None) -> None:
        if payload != self._payload:
            may_be_none = self.may_go or self._payload is None
            possible = {*self._late, *(self._may_be_added if may_be_none else ())}
            assert payload in possible or (payload is None and may_be_none)
            self._become(payload)

    def _become(self, payload: bytes | None) -> None:
        if payload != self._payload:
            self._former = self._payload
        self._payload = payload
        self._late = set()
