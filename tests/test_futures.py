"""Futures that a group makes are asyncio's, but for what it costs to wake who waits for them."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiohttp_session._core import FutureGroup

Make = Callable[[], "asyncio.Future[Any]"]
variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)


class Mistake(Exception):  # noqa: N818
    pass


def outcome(future: asyncio.Future[Any]) -> object:
    """Tell how a future ended."""
    if not future.done():
        return "pending"
    if future.cancelled():
        return "cancelled"
    error = future.exception()
    return repr(future.result()) if error is None else repr(error)


async def two_wait(make: Make) -> object:
    future = make()
    waiting = asyncio.gather(future, future)
    one, other = asyncio.ensure_future(wait(future)), asyncio.ensure_future(wait(future))
    await asyncio.sleep(0)
    future.set_result(b"record")
    return await waiting, await one, await other, await future


async def wait(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


async def one_of_two_gives_up(make: Make) -> object:
    future = make()
    one, other = asyncio.ensure_future(wait(future)), asyncio.ensure_future(wait(future))
    await asyncio.sleep(0)
    one.cancel("enough")
    done, _ = await asyncio.wait([one, other])
    return [outcome(task) for task in (one, other)], future.cancel(), outcome(future), len(done)


async def it_is_shielded(make: Make) -> object:
    future = make()
    task = asyncio.ensure_future(wait(asyncio.shield(future)))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    future.set_result(None)
    return outcome(task), await future


async def time_runs_out(make: Make) -> object:
    future = make()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(future, 0.001)
    return outcome(future)


async def it_comes_in_time(make: Make) -> object:
    future = make()
    asyncio.get_running_loop().call_soon(future.set_result, 7)
    return await asyncio.wait_for(future, 60)


async def it_fails(make: Make) -> object:
    future = make()
    task = asyncio.ensure_future(wait(future))
    await asyncio.sleep(0)
    future.set_exception(Mistake("once"))
    await asyncio.wait([task])
    with pytest.raises(Mistake) as caught:
        await future
    return outcome(task), outcome(future), caught.value is future.exception()


async def it_is_asked_too_early(make: Make) -> object:
    future = make()
    with pytest.raises(asyncio.InvalidStateError) as result:
        future.result()
    with pytest.raises(asyncio.InvalidStateError) as exception:
        future.exception()
    return str(result.value), str(exception.value), future.done(), future.cancelled()


def cancel(future: asyncio.Future[Any]) -> object:
    return future.cancel()


async def it_is_done_twice(make: Make) -> object:
    ends: list[Callable[[asyncio.Future[Any]], object]] = [
        lambda future: future.set_result(1),
        lambda future: future.set_exception(Mistake()),
    ]
    seen = []
    for first in (*ends, cancel):
        for second in ends:
            future = make()
            first(future)
            with pytest.raises(asyncio.InvalidStateError):
                second(future)
            seen.append((future.cancel(), outcome(future)))
    return seen


async def a_message_comes_along(make: Make) -> object:
    future = make()
    future.cancel("because")
    seen = []
    for ask in (future.result, future.exception, lambda: next(iter(future))):
        with pytest.raises(asyncio.CancelledError) as caught:
            ask()
        seen.append(caught.value.args)
    return seen


async def it_is_no_coroutine(make: Make) -> object:
    future = make()
    steps = iter(future)
    first = next(steps)
    with pytest.raises(RuntimeError, match="await wasn't used with future"):
        next(steps)
    return (
        first is future,
        future._asyncio_future_blocking,
        asyncio.isfuture(future),
        asyncio.ensure_future(future) is future,
        future.get_loop() is asyncio.get_running_loop(),
    )


async def a_context_is_kept(make: Make) -> object:
    future, seen = make(), []
    variable.set(1)
    future.add_done_callback(lambda _: seen.append(variable.get()))
    other = contextvars.copy_context()
    variable.set(2)
    future.add_done_callback(lambda _: seen.append(variable.get()))
    other.run(variable.set, 3)
    future.add_done_callback(lambda _: seen.append(variable.get()), context=other)
    future.set_result(None)
    future.add_done_callback(lambda _: seen.append(variable.get()))
    variable.set(4)
    assert not seen
    await asyncio.sleep(0)
    return seen


@pytest.mark.parametrize(
    "scenario",
    [
        two_wait,
        one_of_two_gives_up,
        it_is_shielded,
        time_runs_out,
        it_comes_in_time,
        it_fails,
        it_is_asked_too_early,
        it_is_done_twice,
        a_message_comes_along,
        it_is_no_coroutine,
        a_context_is_kept,
    ],
)
async def test_it_is_like_one_of_asyncio(scenario: Callable[[Make], Awaitable[object]]) -> None:
    loop = asyncio.get_running_loop()
    expected = await scenario(loop.create_future)
    assert await scenario(FutureGroup(loop).create_future) == expected


@pytest.mark.parametrize(
    "result",
    [
        None,
        0,
        b"record",
        (),
        (1,),
        (b"record", b"7"),
        Mistake("as a result"),
        Mistake,
        StopIteration,
    ],
)
async def test_any_result_is_handed_over(result: object) -> None:
    future = FutureGroup(asyncio.get_running_loop()).create_future()
    task = asyncio.ensure_future(wait(future))
    await asyncio.sleep(0)
    future.set_result(result)
    assert await task is result
    assert await future is result
    assert await asyncio.wait_for(future, 60) is result


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["result", "result", "exception", "cancel", "call", "call", "forget", "await", "turn"]
        ),
        st.integers(0, 3),
        st.integers(0, 2),
    ),
    max_size=30,
)


def tell(log: list[object], number: int) -> Callable[[asyncio.Future[Any]], None]:
    """Make a callback that takes down its call."""
    return lambda future: log.append((number, outcome(future)))


async def run(make: Make, steps: list[tuple[str, int, int]]) -> list[object]:
    """Do things to four futures, and take down what comes of it, in its order."""
    log: list[object] = []
    tasks: list[asyncio.Future[Any]] = []
    futures = [make() for _ in range(4)]
    calls = [tell(log, number) for number in range(3)]
    do: dict[str, Callable[[asyncio.Future[Any], int], object]] = {
        "result": lambda future, number: future.set_result(number),
        "exception": lambda future, number: future.set_exception(Mistake(number)),
        "cancel": lambda future, _: log.append(future.cancel()),
        "call": lambda future, number: future.add_done_callback(calls[number]),
        "forget": lambda future, number: log.append(future.remove_done_callback(calls[number])),
        "await": lambda future, _: tasks.append(asyncio.ensure_future(wait(future))),
    }
    for step, index, number in steps:
        future = futures[index]
        if step == "turn":
            log.append("turn")
            await asyncio.sleep(0)
        elif not (future.done() and step in {"result", "exception"}):
            do[step](future, number)
    for future in futures:
        future.cancel()
    if tasks:
        await asyncio.wait(tasks)
    await asyncio.sleep(0)
    return [*log, *map(outcome, tasks), *map(outcome, futures)]


@given(STEPS)
def test_whatever_is_done_comes_to_the_same(steps: list[tuple[str, int, int]]) -> None:
    async def compare() -> None:
        loop = asyncio.get_running_loop()
        expected = await run(loop.create_future, steps)
        assert await run(FutureGroup(loop).create_future, steps) == expected

    asyncio.run(compare())


async def test_an_error_in_a_callback_is_reported_and_the_others_are_called() -> None:
    loop = asyncio.get_running_loop()
    group = FutureGroup(loop)
    seen: list[object] = []
    reports: list[object] = []
    loop.set_exception_handler(lambda _, context: reports.append(context["exception"]))
    futures = [group.create_future() for _ in range(3)]
    futures[0].add_done_callback(seen.append)
    futures[1].add_done_callback(lambda _: 1 / 0)
    futures[1].add_done_callback(seen.append)
    futures[2].add_done_callback(seen.append)
    for future in futures:
        future.set_result(None)
    await asyncio.sleep(0)
    assert seen == futures
    assert [type(error) for error in reports] == [ZeroDivisionError]


@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_loop_leaves_the_other_callbacks_for_later(
    error: type[BaseException], is_held: bool
) -> None:
    loop = asyncio.new_event_loop()
    group = FutureGroup(loop)
    seen: list[object] = []

    def end(_: object) -> None:
        raise error

    def answer() -> None:
        if is_held:
            group.hold()
        for future in futures[:2]:
            future.set_result(None)
        if is_held:
            group.release()

    futures = [group.create_future() for _ in range(3)]
    futures[0].add_done_callback(seen.append)
    futures[0].add_done_callback(end)
    futures[0].add_done_callback(seen.append)
    futures[1].add_done_callback(seen.append)
    loop.call_soon(answer)
    with pytest.raises(error):
        loop.run_until_complete(asyncio.sleep(0))
    assert seen == futures[:1]
    loop.run_until_complete(asyncio.sleep(0))
    assert seen == [futures[0], *futures[:2]]
    loop.close()


async def turn(call: Callable[[], object]) -> None:
    """Have the event loop call a function, and end that turn."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.call_soon(call)
    loop.call_soon(ended.set)
    await ended.wait()


async def test_those_who_wait_go_on_when_a_group_is_released() -> None:
    group = FutureGroup(asyncio.get_running_loop())
    futures = [group.create_future() for _ in range(3)]
    tasks = [asyncio.ensure_future(wait(future)) for future in futures]
    await asyncio.sleep(0)
    seen: list[list[bool]] = []

    def done() -> list[bool]:
        return [task.done() for task in tasks]

    def answer() -> None:
        group.hold()
        for number, future in enumerate(futures):
            future.set_result(number)
        seen.append(done())
        group.release()
        seen.append(done())

    await turn(answer)
    assert seen[0] == [False] * 3
    assert seen[1] == [type(futures[0]) is not asyncio.Future] * 3
    assert await asyncio.gather(*tasks) == [0, 1, 2]


async def test_a_group_that_is_released_by_a_task_lets_that_end_first() -> None:
    """Python has one task at a time."""
    group = FutureGroup(asyncio.get_running_loop())
    future = group.create_future()
    task = asyncio.ensure_future(wait(future))
    await asyncio.sleep(0)
    group.hold()
    future.set_result(7)
    group.release()
    assert not task.done()
    assert await task == 7


async def test_what_was_done_before_a_group_was_held_comes_first() -> None:
    group = FutureGroup(asyncio.get_running_loop())
    seen: list[object] = []
    futures = [group.create_future() for _ in range(4)]
    for future in futures:
        future.add_done_callback(seen.append)

    def answer() -> None:
        futures[0].set_result(None)
        group.hold()
        futures[1].set_result(None)
        group.release()
        futures[2].set_result(None)

    await turn(answer)
    futures[3].set_result(None)
    await asyncio.sleep(0)
    assert seen == futures
    group.hold()
    group.release()  # with nothing to be called


def test_a_group_does_not_keep_its_loop_alive() -> None:
    loop = asyncio.new_event_loop()
    group, gone = FutureGroup(loop), weakref.ref(loop)
    loop.close()
    del loop
    gc.collect()
    assert gone() is None
    del group


async def test_only_asyncio_reports_a_failure_that_nobody_has_seen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    future = FutureGroup(asyncio.get_running_loop()).create_future()
    future.set_exception(Mistake())
    is_reported = type(future) is asyncio.Future
    del future
    gc.collect()
    assert bool(caplog.records) == is_reported


@pytest.mark.parametrize("end", ["set_result", "set_exception", "cancel"])
async def test_a_repr_says_how_it_ended(end: str) -> None:
    future = FutureGroup(asyncio.get_running_loop()).create_future()
    assert "pending" in repr(future)
    getattr(future, end)(Mistake("private"))
    assert ("cancelled" if end == "cancel" else "finished") in repr(future)
    if type(future) is not asyncio.Future:
        assert "private" not in repr(future)
    if end == "set_exception":
        future.exception()
