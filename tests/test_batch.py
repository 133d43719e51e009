from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any
from unittest import mock

import pytest

from aiohttp_session.stores.batch import Batch
from aiohttp_session.stores.per_loop import PerLoop
from tests.waiting import PATIENCE, LoopClock, until


class Store:
    """Answers an operation with its double; batches can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.held: dict[int, asyncio.Event] = {}
        self.cancelled = 0

    def hold(self, operation: int) -> asyncio.Event:
        """Let a batch with this operation wait until the event is set."""
        return self.held.setdefault(operation, asyncio.Event())

    async def run(self, operations: list[int]) -> Sequence[int | BaseException]:
        self.batches.append(operations)
        try:
            for operation in operations:
                if operation in self.held:
                    await self.held[operation].wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return [operation * 2 for operation in operations]


@pytest.fixture
async def store(young_heap: None) -> AsyncIterator[Store]:
    """A store whose test leaves no task and no unseen exception behind."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda loop, context: complaints.append(context)
    )
    yield Store()
    for _ in range(3):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    gc.collect()
    assert complaints == []


async def turn(times: int = 5) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


async def test_operations_of_one_turn_share_a_run(store: Store) -> None:
    batch = Batch(store.run, timeout=PATIENCE)
    assert await asyncio.gather(*(batch.submit(i) for i in range(5))) == [0, 2, 4, 6, 8]
    assert store.batches == [[0, 1, 2, 3, 4]]


async def test_an_operation_whose_time_is_up_when_it_comes_is_not_begun(store: Store) -> None:
    batch = Batch(store.run, timeout=PATIENCE)
    since = asyncio.get_running_loop().time() - PATIENCE
    late, other = batch.submit(1, since=since), batch.submit(2)
    with pytest.raises(TimeoutError):
        await late
    assert await other == 4
    assert store.batches == [[2]]


async def test_a_lone_operation_runs_in_the_next_turn(store: Store) -> None:
    batch = Batch(store.run, timeout=PATIENCE)
    future = batch.submit(1)
    await asyncio.sleep(0)
    assert store.batches == [[1]]
    assert await future == 2


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([0] * 7, [[0, 1, 2], [3, 4, 5], [6]]),
        ([40, 40, 40], [[0, 1], [2]]),
        ([1, 900, 1], [[0], [1], [2]]),
        ([900, 1, 1], [[0], [1, 2]]),
        ([100], [[0]]),
    ],
)
async def test_a_run_has_bounds(store: Store, sizes: list[int], expected: list[list[int]]) -> None:
    batch = Batch(store.run, timeout=PATIENCE, max_operations=3, max_bytes=100)
    await asyncio.gather(*(batch.submit(i, size) for i, size in enumerate(sizes)))
    assert store.batches == expected


async def test_a_slow_run_holds_up_no_other(store: Store) -> None:
    batch = Batch(store.run, timeout=PATIENCE, max_workers=2)
    event = store.hold(1)
    slow = batch.submit(1)
    await turn()
    assert await batch.submit(2) == 4
    assert await batch.submit(3) == 6
    assert not slow.done()
    event.set()
    assert await slow == 2


async def test_operations_gather_while_all_workers_are_busy(store: Store) -> None:
    batch = Batch(store.run, timeout=PATIENCE, max_workers=1)
    event = store.hold(1)
    first = batch.submit(1)
    await turn()
    rest = [batch.submit(i) for i in (2, 3)]
    await turn()
    rest.append(batch.submit(4))
    event.set()
    assert await asyncio.gather(first, *rest) == [2, 4, 6, 8]
    assert store.batches == [[1], [2, 3, 4]]


async def test_an_operation_that_fails_fails_alone(store: Store) -> None:
    async def run(operations: list[int]) -> Sequence[int | BaseException]:
        return [KeyError(i) if i == 2 else i for i in operations]

    batch = Batch(run, timeout=PATIENCE)
    one, two, three = await asyncio.gather(
        *(batch.submit(i) for i in (1, 2, 3)), return_exceptions=True
    )
    assert (one, three) == (1, 3)
    assert isinstance(two, KeyError)


async def test_what_a_run_raises_goes_to_all_as_copies(store: Store) -> None:
    async def run(operations: list[int]) -> Sequence[int]:
        raise KeyError("x") from OSError("why")

    batch = Batch(run, timeout=PATIENCE)
    one, two = await asyncio.gather(batch.submit(1), batch.submit(2), return_exceptions=True)
    assert isinstance(one, KeyError)
    assert isinstance(two, KeyError)
    assert one is not two
    assert one.args == ("x",)
    assert isinstance(one.__cause__, OSError)
    assert one.__traceback__ is not None


async def test_an_exception_that_cannot_be_copied_goes_to_all(store: Store) -> None:
    class OddError(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("odd")

    async def run(operations: list[int]) -> Sequence[int]:
        raise OddError(1, 2)

    with pytest.raises(OddError, match="odd"):
        await Batch(run, timeout=PATIENCE).submit(1)


async def test_too_few_results_are_an_error(store: Store) -> None:
    async def run(operations: list[int]) -> Sequence[int]:
        return operations[1:]

    batch = Batch(run, timeout=PATIENCE)
    results = await asyncio.gather(batch.submit(1), batch.submit(2), return_exceptions=True)
    assert isinstance(results[1], ValueError)


async def test_a_cancelled_waiter_disturbs_nobody(store: Store) -> None:
    batch = Batch(store.run, timeout=PATIENCE)
    event = store.hold(1)
    futures = [batch.submit(i) for i in (1, 2, 3)]
    await turn()
    futures[1].cancel()
    event.set()
    assert await futures[0] == 2
    assert await futures[2] == 6
    assert store.cancelled == 0


async def test_a_cancelled_operation_is_left_out_only_if_it_may_be(store: Store) -> None:
    batch = Batch(store.run, timeout=PATIENCE)
    futures = [batch.submit(i, droppable=i < 3) for i in (1, 2, 3, 4)]
    for i in (0, 2):
        futures[i].cancel()
    assert await futures[3] == 8
    assert store.batches == [[2, 3, 4]]


async def test_nothing_runs_if_all_were_cancelled(store: Store) -> None:
    batch = Batch(store.run, timeout=PATIENCE)
    batch.submit(1, droppable=True).cancel()
    await turn()
    assert store.batches == []
    assert await batch.submit(2) == 4


async def test_a_failure_without_a_waiter_is_not_reported(store: Store) -> None:
    async def run(operations: list[int]) -> Sequence[int]:
        raise KeyError

    batch = Batch(run, timeout=PATIENCE)
    batch.submit(1).cancel()
    batch.submit(2)
    await batch.finish()


async def test_a_run_without_an_answer_times_out(store: Store, loop_clock: LoopClock) -> None:
    batch = Batch(store.run, timeout=PATIENCE + 0.5)
    store.hold(1)
    stuck = batch.submit(1)
    assert await loop_clock.pass_until(stuck.done) >= PATIENCE
    with pytest.raises(TimeoutError, match=r"did not answer within 60\.5 seconds"):
        await stuck
    await until(lambda: store.cancelled == 1)
    assert await batch.submit(2) == 4


async def test_operations_that_wait_for_a_worker_time_out_too(
    store: Store, loop_clock: LoopClock
) -> None:
    batch = Batch(store.run, timeout=PATIENCE, max_workers=1, max_operations=1)
    for number in (1, 2, 3):
        store.hold(number)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    with mock.patch.object(loop, "time", return_value=begun):  # all at the same moment
        waiting = [batch.submit(number) for number in (1, 2, 3)]
    ended = asyncio.gather(*waiting, return_exceptions=True)
    await loop_clock.pass_until(ended.done)
    assert [type(result) for result in await ended] == [TimeoutError] * 3
    assert store.batches == [[1]]


async def test_a_later_operation_has_time_of_its_own(store: Store, loop_clock: LoopClock) -> None:
    batch = Batch(store.run, timeout=PATIENCE, max_workers=1)
    store.hold(1)
    stuck = batch.submit(1)
    await turn()
    early = batch.submit(2)
    loop_clock.advance(PATIENCE / 2)
    late = batch.submit(3)
    await loop_clock.pass_until(stuck.done)
    with pytest.raises(TimeoutError):
        await stuck
    assert await late == 6
    assert [3] in store.batches  # apart from the one that came with the stuck one
    await asyncio.wait([early])


async def test_every_worker_has_a_deadline(store: Store, loop_clock: LoopClock) -> None:
    batch = Batch(store.run, timeout=PATIENCE)
    store.hold(1)
    store.hold(2)
    first = batch.submit(1)
    await turn()
    loop_clock.advance(PATIENCE / 2)
    second = batch.submit(2)
    await loop_clock.pass_until(first.done)
    assert not second.done()
    await loop_clock.pass_until(second.done)
    results = await asyncio.gather(first, second, return_exceptions=True)
    assert [type(result) for result in results] == [TimeoutError] * 2


async def test_an_operation_that_comes_with_a_part_of_its_time_behind_it_keeps_its_deadline(
    store: Store, loop_clock: LoopClock
) -> None:
    batch = Batch(store.run, timeout=PATIENCE)
    event = store.hold(1)
    store.hold(2)
    first = batch.submit(1)
    await turn()
    loop = asyncio.get_running_loop()
    second: asyncio.Future[int] = loop.create_future()
    batch.put((2, second, 0, False, loop.time() - PATIENCE + 1), loop)
    assert await loop_clock.pass_until(second.done) < 2
    with pytest.raises(TimeoutError):
        await second
    assert not first.done()
    event.set()
    assert await first == 2


async def test_finish_waits_for_what_nobody_waits_for(store: Store) -> None:
    batch = Batch(store.run, timeout=PATIENCE)
    event = store.hold(1)
    batch.submit(1)
    await turn()
    batch.submit(2).cancel()
    finish = asyncio.ensure_future(batch.finish())
    await turn()
    assert not finish.done()
    event.set()
    await finish
    assert store.batches == [[1], [2]]
    await batch.finish()


@pytest.mark.parametrize("turns", [0, 1, 5], ids=["not begun", "beginning", "running"])
async def test_when_all_tasks_are_cancelled_so_are_the_waiters(store: Store, turns: int) -> None:
    batch = Batch(store.run, timeout=PATIENCE, max_operations=1, max_workers=1)
    store.hold(1)
    waiters = [batch.submit(1), batch.submit(2)]
    await turn(turns)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await turn()
    assert [waiter.cancelled() for waiter in waiters] == [True, True]
    assert await batch.submit(3) == 6


class Stubborn:
    """A store whose client swallows cancellations, so many of them."""

    def __init__(self, cancellations: int) -> None:
        self.cancellations = cancellations
        self.began = asyncio.Event()

    async def run(self, operations: list[int]) -> Sequence[int]:
        self.began.set()
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if not self.cancellations:
                    raise
                self.cancellations -= 1


@pytest.mark.parametrize("cancellations", [0, 1, 3])
async def test_a_worker_that_swallows_cancellations_is_cancelled_again(
    loop_clock: LoopClock, cancellations: int
) -> None:
    store = Stubborn(cancellations)
    batch = Batch(store.run, timeout=PATIENCE, max_workers=1)
    stuck = batch.submit(1)
    await store.began.wait()
    queued = batch.submit(2)
    for future in (stuck, queued):
        await loop_clock.pass_until(future.done)
        with pytest.raises(TimeoutError):
            await future
    finish = asyncio.ensure_future(batch.finish())
    await loop_clock.pass_until(finish.done)
    assert store.cancellations == 0


async def test_waiters_fail_in_time_though_no_worker_ever_ends(loop_clock: LoopClock) -> None:
    store = Stubborn(10**9)
    batch = Batch(store.run, timeout=PATIENCE, max_workers=1)
    for operations in ([1, 2], [3]):
        futures = [batch.submit(operation) for operation in operations]
        waiting = asyncio.gather(*futures, return_exceptions=True)
        await loop_clock.pass_until(waiting.done)
        assert {type(result) for result in await waiting} == {TimeoutError}
    store.cancellations = 0
    await batch.finish()


async def test_many_that_wait_are_not_looked_at_for_each_of_them(loop_clock: LoopClock) -> None:
    looks = 0

    class Counting(Batch[int, int]):
        def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
            nonlocal looks
            looks += 1
            super()._expire(loop)

    store = Stubborn(10**9)
    batch = Counting(store.run, timeout=PATIENCE, max_workers=1)
    waited: list[float] = []

    async def visit(number: int) -> None:
        since = loop_clock()
        with contextlib.suppress(TimeoutError):
            await batch.submit(number)
        waited.append(loop_clock() - since)

    visits = []
    for number in range(1000):
        visits.append(asyncio.ensure_future(visit(number)))
        loop_clock.advance(PATIENCE / 2000)
        await asyncio.sleep(0)
    await loop_clock.pass_until(lambda: len(waited) == len(visits) or looks > 200)
    queued = len(batch.queue)
    store.cancellations = 0  # or this test would not end if it failed
    assert len(waited) == len(visits)
    assert max(waited) < 1.05 * PATIENCE
    assert looks < 200
    assert queued == 0  # what has failed is forgotten
    finishing = asyncio.ensure_future(batch.finish())
    await loop_clock.pass_until(finishing.done)


async def test_a_loop_that_was_paused_before_a_worker_began_ends_all(store: Store) -> None:
    batch = Batch(store.run, timeout=5)
    loop = asyncio.get_running_loop()
    old = batch.submit(1)
    paused = loop.time() + 6
    with mock.patch.object(loop, "time", return_value=paused):
        batch._expire(loop)  # the timer comes first
        new = batch.submit(2)
        await turn()
    with pytest.raises(TimeoutError):
        await old
    assert await new == 4


async def test_a_loop_that_was_paused_while_a_worker_ran_ends_all(store: Store) -> None:
    batch = Batch(store.run, timeout=5, max_workers=1)
    store.hold(1)
    loop = asyncio.get_running_loop()
    futures = [batch.submit(1)]
    await turn()
    futures.append(batch.submit(2))
    with mock.patch.object(loop, "time", return_value=loop.time() + 6):
        batch._expire(loop)
        results = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(result) for result in results] == [TimeoutError] * 2
    assert await batch.submit(3) == 6


async def test_a_timer_may_have_no_time_of_its_own(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As uvloop's, if less than half a millisecond is to go: `call_at` gives a handle of
    # `call_soon`, without `when()`.
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_at", lambda when, call, *args: loop.call_soon(call, *args))
    batch = Batch(store.run, timeout=0.02, max_workers=2)
    for number in (1, 2, 3):
        store.hold(number)
    futures = [batch.submit(number) for number in (1, 2)]
    await turn()
    futures.append(batch.submit(3))
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(result) for result in results] == [TimeoutError] * 3


def test_threads_do_not_mix_their_batches() -> None:
    async def run(operations: list[int]) -> Sequence[int]:
        await asyncio.sleep(0)
        return [i + 1000 * threads[threading.get_ident()] for i in operations]

    async def work() -> None:
        for i in range(200):
            expected = i + 1000 * threads[threading.get_ident()]
            assert await batches.get().submit(i) == expected

    def main(number: int) -> None:
        threads[threading.get_ident()] = number
        asyncio.run(work())
        done.append(number)

    batches: PerLoop[Batch[int, int]] = PerLoop(lambda: Batch(run, timeout=PATIENCE))
    threads: dict[int, int] = {}
    done: list[int] = []
    workers = [threading.Thread(target=main, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(done) == [0, 1, 2, 3]
