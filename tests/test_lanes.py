"""The changes of one key that wait for each other."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from aiohttp_session.saving import UNSEEN, Edit, Lanes, moved_to
from aiohttp_session.server_storage import ServerStorage
from aiohttp_session.stores import UnsettledError
from aiohttp_session.stores.memory import MemoryStore
from tests.contract import Browser
from tests.waiting import LoopClock


class HeldStore(MemoryStore):
    """A store in which each swap waits until the test answers it."""

    timeout = 10.0

    def __init__(self) -> None:
        super().__init__()
        self.swaps: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        answer = asyncio.get_running_loop().create_future()
        self.swaps.put_nowait(answer)
        await answer
        return await super().swap(key, expected, payload, ttl)


class CountingStore(MemoryStore):
    """A store at some distance, whose calls are noted."""

    reads_locally = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    async def read(self, key: str) -> bytes | None:
        self.calls.append("read")
        await asyncio.sleep(0)
        return await super().read(key)

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        self.calls.append("swap")
        await asyncio.sleep(0)
        return await super().swap(key, expected, payload, ttl)


def append(letter: bytes) -> Edit:
    return Edit(lambda found: ((found or b"") + letter, None))


def begin(lanes: Lanes, letter: bytes) -> asyncio.Task[None]:
    return asyncio.ensure_future(lanes.change("k", UNSEEN, append(letter)))


async def send_second(
    store: HeldStore, lanes: Lanes
) -> tuple[asyncio.Task[None], asyncio.Future[None]]:
    """Return a change that waited for another one, and its swap, which the store holds."""
    first = begin(lanes, b"1")
    swap = await store.swaps.get()
    second = begin(lanes, b"2")
    await asyncio.sleep(0)
    swap.set_result(None)
    swap = await store.swaps.get()
    assert first.done()
    return second, swap


async def test_what_waits_gets_the_error_of_its_own_swap() -> None:
    store = HeldStore()
    lanes = Lanes(SimpleNamespace(store=store))
    second, swap = await send_second(store, lanes)
    third = begin(lanes, b"3")
    await asyncio.sleep(0)
    # Nothing is known of the record then, so it is read again.
    await store.create("k", b"else", None)
    swap.set_exception(ConnectionRefusedError("second"))
    with pytest.raises(ConnectionRefusedError, match="second"):
        await second
    (await store.swaps.get()).set_result(None)
    await third
    await lanes.finish()
    assert await store.read("k") == b"else3"


async def test_finish_waits_for_all_that_wait() -> None:
    store = HeldStore()
    lanes = Lanes(SimpleNamespace(store=store))
    second, swap = await send_second(store, lanes)
    second.cancel()
    finish = asyncio.ensure_future(lanes.finish())
    await asyncio.sleep(0)
    assert not finish.done()
    swap.set_result(None)
    await finish
    assert await store.read("k") == b"12"  # the swap was sent before the cancellation


async def test_each_waits_for_its_own_time(loop_clock: LoopClock) -> None:
    store = HeldStore()
    lanes = Lanes(SimpleNamespace(store=store))
    first = asyncio.ensure_future(lanes.change("k", None, append(b"1")))
    swap = await store.swaps.get()
    early = begin(lanes, b"2")
    await asyncio.sleep(0)
    loop_clock.advance(6)
    late = begin(lanes, b"3")
    await asyncio.sleep(0)
    loop_clock.advance(4.5)
    with pytest.raises(TimeoutError, match="10"):
        await early
    assert not late.done()
    swap.set_result(None)
    await first
    (await store.swaps.get()).set_result(None)
    await late
    assert await store.read("k") == b"13"


async def test_the_end_of_the_event_loop_leaves_nobody_waiting() -> None:
    store = HeldStore()
    lanes = Lanes(SimpleNamespace(store=store))
    second, _ = await send_second(store, lanes)
    [drain] = lanes._here.get().drains
    drain.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second


@pytest.mark.parametrize("is_lost", range(1, 7))
async def test_a_swap_is_repeated_a_few_times(is_lost: int) -> None:
    left = is_lost

    class LosingStore(MemoryStore):
        async def swap(
            self, key: str, expected: bytes | None, payload: bytes, ttl: int | None
        ) -> bool:
            nonlocal left
            if left:
                left -= 1
                raise UnsettledError
            return await super().swap(key, expected, payload, ttl)

    store = LosingStore()
    await store.create("k", b"0", None)
    change = Lanes(SimpleNamespace(store=store)).change("k", b"0", append(b"1"))
    if is_lost < 5:
        await change
        assert await store.read("k") == b"01"
    else:
        with pytest.raises(UnsettledError):
            await change


@pytest.mark.parametrize("record", [b'{"moved":', b'{"moved":x}', b'{"moved":1}', b'{"moved":[]}'])
def test_a_damaged_mark_leads_nowhere(record: bytes) -> None:
    assert moved_to(record) is None


async def test_changes_that_are_expected_are_one_swap() -> None:
    store = HeldStore()
    await store.create("k", b"0", None)
    lanes = Lanes(SimpleNamespace(store=store))
    changes = [begin(lanes, letter) for letter in (b"1", b"2", b"3")]
    lanes.expect("k", b"0")
    lanes.expect("k", b"0")  # by other requests: that changes nothing
    (await store.swaps.get()).set_result(None)
    await asyncio.gather(*changes)
    assert store.swaps.empty()
    assert await store.read("k") == b"0123"


async def test_expected_changes_that_do_not_come_keep_nobody_waiting() -> None:
    lanes = Lanes(SimpleNamespace(store=MemoryStore()))
    lanes.expect("k", b"0")
    assert lanes.is_busy("k")
    await asyncio.sleep(0)
    assert not lanes.is_busy("k")


@pytest.mark.parametrize("mode", ["overwrite", "merge"])
async def test_eight_requests_of_a_visitor_take_one_read_and_one_swap(mode: Any) -> None:
    store = CountingStore()
    storage = ServerStorage(store, on_conflict=mode)
    browser = Browser(storage)
    await browser.set(a=1)
    store.calls.clear()
    requests = [browser.set(**{f"b{number}": number}) for number in range(8)]
    responses = await asyncio.gather(*requests)
    assert all(response.cookies for response in responses)
    assert store.calls == ["read", "swap"]
    if mode == "merge":
        assert len(await browser.load()) == 9
