"""A connection that many requests share, seen from its owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvloop
from redis.asyncio import Redis

from aiohttp_session._core import write_command
from aiohttp_session.stores import UnsettledError
from aiohttp_session.stores._redis_client import Pool
from aiohttp_session.stores._redis_pipeline import (
    READ,
    WRITE,
    LostError,
    Operation,
    PipelinedConnection,
    UnsentError,
)
from aiohttp_session.stores._redis_tracking import Tracking
from aiohttp_session.stores.kept_records import KeptRecords
from benchmarks.servers import HOST, Server


async def no_call(client: Any, key: str) -> None:
    raise NotImplementedError


def get(key: str) -> Operation:
    return key, write_command(b"GET", key.encode()), (no_call,), READ


def put(key: str, value: bytes) -> Operation:
    return key, write_command(b"SET", key.encode(), value), (no_call,), WRITE


class Owner:
    """Takes down what it is told."""

    stall = 60.0

    def __init__(self) -> None:
        self.left: list[PipelinedConnection] = []
        self.repeated: list[Any] = []
        self.sizes: dict[str, int] = {}
        self.closed: list[bool] = []  # whether each was clean

    def distrust(self, since: float) -> None:
        """Take no notice."""

    def note_size(self, key: str, size: int = 0) -> int:
        self.sizes[key] = size
        return size

    def repeat(self, entry: Any) -> None:
        self.repeated.append(entry)

    def leave(self, connection: PipelinedConnection) -> None:
        self.left.append(connection)

    async def close(self, connection: Any, *, is_clean: bool) -> None:
        self.closed.append(is_clean)


class Written:
    """A transport, and what is written to it."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.data: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self.data.append(data)
        self._transport.write(data)


@pytest.fixture
async def connection(redis_server: Server) -> AsyncIterator[Any]:
    client: Any = Redis(host=HOST, port=redis_server.port)
    connection = await Pool(client.connection_pool, is_copied=False).acquire()
    yield connection
    await connection.disconnect()
    await client.aclose()


@pytest.fixture
async def owner() -> Owner:
    return Owner()


@pytest.fixture
async def pipeline(connection: Any, owner: Owner) -> AsyncIterator[PipelinedConnection]:
    pipeline = PipelinedConnection(owner, connection)
    pipeline._transport = Written(pipeline._transport)
    yield pipeline
    await pipeline.abort()


def written(pipeline: PipelinedConnection) -> list[bytes]:
    data: list[bytes] = pipeline._transport.data
    return data


async def test_a_lone_operation_is_written_at_once(pipeline: PipelinedConnection) -> None:
    assert await pipeline.submit(put("k", b"1")) == b"OK"
    written(pipeline).clear()
    lone = pipeline.submit(get("k"))
    assert len(written(pipeline)) == 1
    assert await lone == b"1"


async def test_what_comes_in_one_turn_is_written_together(pipeline: PipelinedConnection) -> None:
    """Each write to a socket costs more than the operation."""
    operations = [put("k", b"1"), get("k"), put("k", b"2"), get("k")]
    together = [pipeline.submit(operation) for operation in operations]
    assert written(pipeline) == []
    assert await asyncio.gather(*together) == [b"OK", b"1", b"OK", b"2"]
    assert written(pipeline) == [b"".join(operation[1] for operation in operations)]
    # So many may come in the next turn too.
    first, second = pipeline.submit(get("k")), pipeline.submit(get("k"))
    assert len(written(pipeline)) == 1
    assert [await first, await second] == [b"2", b"2"]


async def test_while_replies_are_due_what_comes_in_one_turn_is_written_together(
    pipeline: PipelinedConnection,
) -> None:
    await pipeline.submit(put("k", b"1"))
    written(pipeline).clear()
    replies = [pipeline.submit(get("k")) for _ in range(3)]
    assert len(written(pipeline)) == 1
    assert await asyncio.gather(*replies) == [b"1"] * 3
    assert len(written(pipeline)) == 2


async def test_nothing_is_handed_out_after_what_is_no_reply(
    pipeline: PipelinedConnection, owner: Owner
) -> None:
    """What follows might be anybody's."""
    first, second = pipeline.submit(put("k", b"1")), pipeline.submit(get("k"))
    transport = pipeline._transport
    transport.get_protocol().data_received(b"+OK\r\n$1\r\nab\r\n")
    transport.get_protocol().data_received(b"$1\r\nc\r\n")
    assert await first == b"OK"
    await asyncio.wait({pipeline._task})
    assert not second.done()
    assert [entry[1] for entry in owner.repeated] == [second]
    assert owner.closed == [False]


async def test_only_large_records_are_noted(pipeline: PipelinedConnection, owner: Owner) -> None:
    keys = ("small", "large", "none")
    replies = [pipeline.submit(get(key)) for key in keys]
    transport = pipeline._transport
    large = b"x" * 40_000
    transport.get_protocol().data_received(b"$1\r\n1\r\n$40000\r\n%b\r\n$-1\r\n" % large)
    assert [await reply for reply in replies] == [b"1", large, None]
    assert owner.sizes == {"large": 40_000}
    pipeline._transport.abort()  # the server's own replies are on their way


async def test_from_the_moment_it_is_lost_it_is_not_used(
    pipeline: PipelinedConnection, owner: Owner
) -> None:
    reply = pipeline.submit(put("k", b"1"), is_batched=True)
    await asyncio.sleep(0)
    unsent = pipeline.submit(put("k", b"2"), is_batched=True)
    pipeline.connection_lost(ConnectionResetError())
    assert owner.left == [pipeline]
    await asyncio.wait({pipeline._task})
    assert isinstance(await reply, LostError)
    assert isinstance(await unsent, UnsentError)
    assert owner.closed == [False]
    assert len(written(pipeline)) == 1


async def test_when_it_is_lost_reads_and_what_was_not_written_are_the_owners(
    pipeline: PipelinedConnection, owner: Owner
) -> None:
    read, write = pipeline.submit(get("k")), pipeline.submit(put("k", b"1"))
    cancelled = pipeline.submit(put("k", b"2"))
    cancelled.cancel()
    await asyncio.sleep(0)
    unsent, not_wanted = pipeline.submit(put("k", b"3")), pipeline.submit(put("k", b"4"))
    not_wanted.cancel()
    pipeline.connection_lost(None)
    await asyncio.wait({pipeline._task})
    with pytest.raises(UnsettledError, match="unknown whether the write was applied"):
        await write
    assert [entry[1] for entry in owner.repeated] == [read, unsent]
    assert owner.closed == [False]


@pytest.mark.parametrize("end", ["eof_received", "lost"])
async def test_the_clients_stream_learns_that_its_connection_is_lost(
    pipeline: PipelinedConnection, connection: Any, owner: Owner, end: str
) -> None:
    if end == "lost":
        connection._writer.transport.abort()
    else:
        assert pipeline.eof_received()  # so its writer may go on until it is closed
    await asyncio.wait({pipeline._task})
    assert owner.closed == [False]
    assert await connection._reader.read(1) == b""
    await connection.disconnect()


async def test_the_clients_stream_learns_that_it_has_to_wait(
    pipeline: PipelinedConnection, connection: Any
) -> None:
    pipeline.pause_writing()
    draining = asyncio.ensure_future(connection._writer.drain())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not draining.done()
    pipeline.resume_writing()
    await draining


async def test_the_client_goes_on_with_its_connection(
    pipeline: PipelinedConnection, connection: Any, owner: Owner
) -> None:
    assert await pipeline.submit(put("k", b"1")) == b"OK"
    await pipeline.close()
    assert owner.closed == [True]
    await connection.send_command("GET", "k")
    assert await connection.read_response() == b"1"


@pytest.mark.parametrize("is_tracked", [False, True])
async def test_a_connection_that_was_lost_before_takes_nothing(
    connection: Any, owner: Owner, is_tracked: bool
) -> None:
    connection._writer.transport.abort()
    connect: Callable[..., PipelinedConnection] = PipelinedConnection
    if is_tracked:
        records = KeptRecords(10, 10_000)
        connect = Tracking(lambda: records).connect
    pipeline = connect(owner, connection)
    future = pipeline.submit(put("k", b"1"), is_batched=True)
    await asyncio.wait({pipeline._task})
    assert isinstance(await future, UnsentError)
    assert owner.closed == [False]


@pytest.mark.parametrize("is_closing", [False, True])
async def test_when_the_loop_shuts_down_who_waits_is_cancelled(
    pipeline: PipelinedConnection, owner: Owner, is_closing: bool
) -> None:
    """But not who waits for a connection that was given up: its owner has the operation."""
    future = pipeline.submit(get("k"))
    if is_closing:
        pipeline.leave()
    await asyncio.sleep(0)
    pipeline._task.cancel()
    await asyncio.wait({pipeline._task})
    assert future.cancelled() is not is_closing
    assert [entry[1] for entry in owner.repeated] == [future] * is_closing


async def lose_it_and_write(pipeline: PipelinedConnection, owner: Owner) -> None:
    assert await pipeline.submit(put("k", b"1")) == b"OK"
    pipeline._transport.abort()
    write = pipeline.submit(put("k", b"2"))  # at once: it is not known to be lost
    read = pipeline.submit(get("k"))
    await asyncio.wait({pipeline._task})
    with pytest.raises(UnsettledError):
        await write
    assert not read.done()
    assert [entry[1] for entry in owner.repeated] == [read]


async def lose_it_and_its_transport_says_so(pipeline: PipelinedConnection, owner: Owner) -> None:
    """As uvloop's may."""

    class Closed(Written):
        def write(self, data: bytes) -> None:
            raise RuntimeError("unable to perform operation; the handler is closed")

    pipeline._transport = Closed(pipeline._transport)
    future = pipeline.submit(put("k", b"2"), is_batched=True)
    await asyncio.wait({pipeline._task})
    assert isinstance(await future, LostError)
    assert owner.left


@pytest.mark.parametrize("lose", [lose_it_and_write, lose_it_and_its_transport_says_so])
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_what_is_written_to_a_lost_connection_is_the_owners(
    redis_server: Server,
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    lose: Callable[[PipelinedConnection, Owner], Awaitable[None]],
) -> None:
    async def use() -> None:
        client: Any = Redis(host=HOST, port=redis_server.port)
        connection = await Pool(client.connection_pool, is_copied=False).acquire()
        owner = Owner()
        await lose(PipelinedConnection(owner, connection), owner)
        assert owner.closed == [False]
        await connection.disconnect()
        await client.aclose()

    loop = new_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(use(), 60))
    finally:
        loop.close()
