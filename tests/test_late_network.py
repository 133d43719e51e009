"""Sessions on a network that may hold each byte and deliver it late: a model-based test.

Three processes serve the browsers of a user and of a visitor. The first process reaches the store
directly, each of the others by a network of its own. Hypothesis chooses the requests, and what the
networks hold, when they deliver it, and when a client is told that a connection is gone. At the end
everything is delivered. What the clients know is then checked against the `invariants`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiohttp_session import saving
from aiohttp_session.stores.redis import RedisStore
from benchmarks import servers
from benchmarks.servers import Server
from tests.history import Mode
from tests.invariants import check
from tests.late_model import (
    BROWSERS,
    Ask,
    Cancel,
    Cut,
    Delay,
    Deliver,
    GoOn,
    Run,
    Stall,
    Step,
)
from tests.late_network import (
    PROCESSES,
    RESTRICTED,
    Hold,
    Open,
    Time,
    clustered,
    guarded,
    memcached,
    processes,
    restricted,
    single,
)

pytestmark = pytest.mark.once  # the store has no twin

_Test = Callable[..., None]
_Steps = st.SearchStrategy[tuple[Step, ...]]

FAR = st.integers(1, PROCESSES - 1)  # the processes that have a network of their own
BROWSER = st.sampled_from([0, 0, 0, 0, *range(len(BROWSERS))])


def weighted(*strategies: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Choose among strategies; a union would flatten its members, and so distort their weights."""
    every = [strategy for weight, strategy in strategies for _ in range(weight)]
    return st.sampled_from(every).flatmap(lambda strategy: strategy)


HOLD = st.builds(
    lambda after, size, what, on_new: Hold(after, size, what[0], what[1], on_new),
    st.sampled_from([0, 0, 1, 1, 2, 3, 4, 6, 8]),
    st.sampled_from([0, 0, 0, 1, 20]),
    st.sampled_from([(True, True), (True, False), (False, True)]),
    st.booleans(),
)
GO_ON = st.builds(GoOn, st.integers(0, 2))
STALL_OR_CUT = st.builds(Stall) | st.builds(Cut, FAR) | st.builds(Cancel)
DELIVER = st.builds(Deliver, FAR, st.none() | st.integers(0, 2))


def ask(*kinds: str) -> _Steps:
    """A request, which may meet a fault, and what may happen to it next."""

    def builds(
        hold: st.SearchStrategy[Hold | None], *, is_slow: bool = False
    ) -> st.SearchStrategy[Ask]:
        return st.builds(
            Ask,
            st.integers(0, PROCESSES - 1),
            st.sampled_from(kinds),
            BROWSER,
            st.just(is_slow),
            st.sampled_from([False, False, False, True]),
            hold,
        )

    well, slow, held = builds(st.none()), builds(st.none(), is_slow=True), builds(HOLD)
    return weighted(
        (3, st.tuples(well)),
        (3, st.tuples(slow)),
        (1, st.tuples(builds(HOLD, is_slow=True))),
        (1, st.tuples(held)),
        (2, st.tuples(held, STALL_OR_CUT)),
        (1, st.tuples(held, STALL_OR_CUT, well, DELIVER)),
    )


STEPS: st.SearchStrategy[list[Step]] = st.lists(
    weighted(
        (4, ask("write", "nested write", "change of owner")),
        (3, ask("renewal", "login")),
        (2, ask("logout", "new session", "end_session", "end_sessions", "end_sessions(keep)")),
        (1, ask("load", "sessions_of")),
        (2, st.tuples(GO_ON)),
        (2, st.tuples(DELIVER)),
        (1, st.tuples(STALL_OR_CUT)),
        (1, st.tuples(st.builds(Delay, FAR, HOLD))),
    ),
    min_size=5,
    max_size=14,
).map(lambda phrases: [step for phrase in phrases for step in phrase])
MODES = st.sampled_from(["overwrite", "merge"])


async def follow(
    open_all: Open, servers: Any, steps: list[Step], mode: Mode, most: int | None
) -> None:
    """Take steps, and check what the clients know then."""
    time = Time()
    with time.followed():
        async with (
            open_all(servers) as links,
            processes(
                links, on_conflict=mode, max_per_owner=most, max_age=1000, touch_after=3
            ) as started,
        ):
            run = Run(started, mode, most, time)
            await run.begin()
            for step in steps:
                await run.take(step)
            history = await run.end()
    assert check(history) == []


def run(main: Any, *, on_uvloop: bool) -> None:
    loop = pytest.importorskip("uvloop").new_event_loop() if on_uvloop else asyncio.new_event_loop()
    try:
        loop.run_until_complete(main)
    finally:
        loop.close()


@pytest.fixture(scope="module")
def restricted_server(redis_server: Server) -> Iterator[Server]:
    """Redis, with a user that may run no script."""
    servers.ask(redis_server, f"ACL SETUSER {RESTRICTED} reset on nopass ~* +@all -@scripting")
    yield redis_server
    servers.ask(redis_server, f"ACL DELUSER {RESTRICTED}")


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    try:
        with servers.valkey() as server:
            yield server
    except servers.MissingServerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Server]]:
    with servers.redis_cluster() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def sentinel() -> Iterator[tuple[Server, Server, Server]]:
    with servers.redis_sentinel() as group:
        yield group


ALL = Hold(replies=True, on_new=True)
LATE_WRITE: list[Step] = [Ask(1, "write", 2, hold=ALL), Stall(), Ask(0, "write", 2), Deliver(1)]
LATE_SET: list[Step] = [Ask(1, "write", 2, hold=ALL._replace(after=1)), *LATE_WRITE[1:]]
OVER_MARK: list[Step] = [Ask(1, "write", is_slow=True), Ask(0, "renewal"), GoOn()]
EXAMPLES: list[list[Step]] = [
    LATE_WRITE,
    OVER_MARK,
    [Ask(1, "renewal", 2, hold=ALL._replace(after=1)), Stall(), Ask(0, "write", 2), Deliver(1)],
    [Ask(1, "write", 2, hold=Hold()), Cancel(), Ask(1, "write", 2), Cut(1), Ask(2, "load", 2)],
    [Ask(1, "nested write", 2, hold=Hold(size=20)), Cut(1), Ask(0, "write", 2), Deliver(1)],
    [Ask(1, "write", 2, hold=Hold(requests=False, replies=True)), Cut(1), Ask(0, "write", 2)],
    [Ask(1, "logout", 2, hold=ALL), Stall(), Ask(0, "write", 2), Deliver(1), Ask(2, "load", 2)],
    [
        Ask(2, "write", 2, is_slow=True),
        Ask(1, "logout", 2, hold=ALL._replace(requests=False)),
        Cut(1),
    ],
    [Ask(1, "renewal", 2, hold=Hold(after=1)), Ask(2, "renewal", 2), Cut(1), Deliver(1)],
    [Ask(1, "login", 2, hold=ALL._replace(after=3)), Ask(0, "login", 2), Stall(), Deliver(1)],
    [Ask(1, "renewal", hold=ALL._replace(after=4)), Ask(0, "end_session", 1), Deliver(1)],
    [Ask(1, "renewal", hold=Hold(after=4)), Ask(0, "end_sessions(keep)"), Deliver(1)],
    [Delay(1, ALL), Ask(1, "end_sessions"), Stall(), Ask(0, "login", 2), Deliver(1)],
]


def property_test(share: float) -> Callable[[_Test], _Test]:
    """Have hypothesis find steps, a mode and an event loop, after those that are known to be hard.

    :param share: of the examples that its profile has.
    """

    def decorate(test: _Test) -> _Test:
        for number, steps in enumerate(EXAMPLES):
            for mode in ("overwrite", "merge"):
                test = example(steps=steps, mode=mode, most=2, on_uvloop=bool(number % 2))(test)
        storages = settings.get_profile("storages")
        limited = settings(storages, max_examples=max(1, int(storages.max_examples * share)))
        most = st.sampled_from([None, None, 2])
        return limited(given(steps=STEPS, mode=MODES, most=most, on_uvloop=st.booleans())(test))

    return decorate


@property_test(2)
def test_the_guarantees_hold_in_redis(
    redis_server: Server, steps: list[Step], mode: Mode, most: int | None, on_uvloop: bool
) -> None:
    run(follow(single, redis_server, steps, mode, most), on_uvloop=on_uvloop)


@property_test(1)
def test_the_guarantees_hold_in_redis_by_transactions(
    restricted_server: Server, steps: list[Step], mode: Mode, most: int | None, on_uvloop: bool
) -> None:
    run(follow(restricted, restricted_server, steps, mode, most), on_uvloop=on_uvloop)


@property_test(2)
def test_the_guarantees_hold_in_valkey(
    valkey: Server, steps: list[Step], mode: Mode, most: int | None, on_uvloop: bool
) -> None:
    run(follow(single, valkey, steps, mode, most), on_uvloop=on_uvloop)


@property_test(2)
def test_the_guarantees_hold_in_memcached(
    memcached_server: Server, steps: list[Step], mode: Mode, most: int | None, on_uvloop: bool
) -> None:
    run(follow(memcached, memcached_server, steps, mode, most), on_uvloop=on_uvloop)


@property_test(1 / 3)
def test_the_guarantees_hold_on_a_cluster(
    cluster: list[Server], steps: list[Step], mode: Mode, most: int | None, on_uvloop: bool
) -> None:
    run(follow(clustered, cluster, steps, mode, most), on_uvloop=on_uvloop)


@property_test(1 / 3)
def test_the_guarantees_hold_behind_sentinel(
    sentinel: tuple[Server, Server, Server],
    steps: list[Step],
    mode: Mode,
    most: int | None,
    on_uvloop: bool,
) -> None:
    run(follow(guarded, sentinel, steps, mode, most), on_uvloop=on_uvloop)


def set_plainly(patch: pytest.MonkeyPatch) -> None:
    """Have RedisStore replace a record whatever it is."""

    async def swap(
        store: RedisStore, key: str, expected: bytes | None, payload: bytes, ttl: int | None
    ) -> bool:
        return bool(await store._set(key, payload, ttl, b"NX" if expected is None else b"XX"))

    patch.setattr(RedisStore, "swap", swap)


def read_and_set(patch: pytest.MonkeyPatch) -> None:
    """Have RedisStore compare a record, and then replace it whatever it is by then."""
    set_plainly(patch)
    swap = RedisStore.swap

    async def compare_and_swap(
        store: RedisStore, key: str, expected: bytes | None, payload: bytes, ttl: int | None
    ) -> bool:
        is_expected = expected is None or await store.read(key) == expected
        return is_expected and await swap(store, key, expected, payload, ttl)

    patch.setattr(RedisStore, "swap", compare_and_swap)


def replace_marks(patch: pytest.MonkeyPatch) -> None:
    """Have writes take a mark for the record of a session."""
    patch.setattr(saving, "is_ended", lambda record: record in {None, saving.ENDED})


@pytest.mark.parametrize(
    ("break_it", "steps", "problem"),
    [
        (set_plainly, LATE_WRITE, "acknowledged_is_there"),
        (read_and_set, LATE_SET, "acknowledged_is_there"),
        (set_plainly, OVER_MARK, "one_renewal_wins"),
        (replace_marks, OVER_MARK, "one_renewal_wins"),
    ],
)
def test_what_is_broken_is_found_out(
    redis_server: Server,
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[pytest.MonkeyPatch], None],
    steps: list[Step],
    problem: str,
) -> None:
    run(follow(single, redis_server, steps, "overwrite", None), on_uvloop=False)
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match=problem):
        run(follow(single, redis_server, steps, "overwrite", None), on_uvloop=False)
