"""Every schedule of two requests on one session, and of the triples that matter.

The requests come to one process (together) or each to a process of its own (apart). See `explorer`
for the faults, and `invariants` for the guarantees. The search is complete for requests apart, and
for requests together without a fault. For requests together with a fault it omits what is searched
for requests apart, and concerns nothing that the requests of a process share:

- The calls that one request has in flight are answered in the order in which they were made.
- A write that is lost or late is a swap, not the creation or deletion of a record.
- The requests are no requests that only read, except in a pair of loads; no nested write, which is
  saved as another write is; and neither a new session nor a visit after ``max_age``, which create
  a record and end the old one as a logout does.

The mode does not concern all requests. If there is a fault, a pair that it does not concern is
searched in one mode. So is, for requests together, a pair in which it concerns one request.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, get_args

import pytest
from aiohttp import web

from aiohttp_session import Session, get_session, new_session, session_middleware
from aiohttp_session.server_storage import ServerStorage
from tests.explorer import Explorer, Fault, Scenario, ViolationError
from tests.history import WRITES, Content, Mode, Request
from tests.quiet_loop import NOW, controlled
from tests.simulation import (
    NAME,
    Actor,
    Behave,
    Call,
    FreeStore,
    Memory,
    Records,
    content_of,
    make_request,
    perform,
    run_freely,
)

pytestmark = pytest.mark.once

Placement: TypeAlias = Literal["together", "apart"]

MAX_AGE = 1000
TOUCH_AFTER = MAX_AGE - 50
# The sessions were saved so long ago that they are nearly due to be touched.
FIRST = NOW - TOUCH_AFTER + 20


def visit(act: Callable[[Session, Request], object], *, is_new: bool = False) -> Behave:
    """Make a request whose handler does something to its session."""

    async def behave(storage: ServerStorage, request: Request) -> None:
        async def handler(http: web.Request) -> web.Response:
            if is_new:
                session = await new_session(http)
            else:
                session = await get_session(http)
                request.has_loaded, request.loaded = True, content_of(session)
            act(session, request)
            request.saved = content_of(session)
            return web.Response()

        response = await session_middleware(storage)(make_request(request.sent), handler)
        morsel = response.cookies.get(NAME)
        request.cookie = None if morsel is None else morsel.value

    return behave


def write(session: Session, request: Request) -> None:
    session[request.name] = 1
    session["last"] = request.name


def write_nested(session: Session, request: Request) -> None:
    session.setdefault("list", []).append(request.name)


def renew(session: Session, request: Request) -> None:
    session.regenerate_id()
    write(session, request)


def log_in(session: Session, request: Request) -> None:
    renew(session, request)
    session.owner = request.owner


def change_owner(session: Session, request: Request) -> None:
    write(session, request)
    session.owner = request.owner


async def end_session(storage: ServerStorage, request: Request) -> None:
    request.result = await storage.end_session(str(request.owner), request.handle)


async def end_sessions(storage: ServerStorage, request: Request) -> None:
    request.result = await storage.end_sessions(str(request.owner))


async def end_others(storage: ServerStorage, request: Request) -> None:
    async def handler(http: web.Request) -> web.Response:
        session = await get_session(http)
        request.has_loaded, request.loaded = True, content_of(session)
        request.owner = session.owner
        if session.owner is not None:
            request.result = await storage.end_sessions(session.owner, keep=session)
        return web.Response()

    await session_middleware(storage)(make_request(request.sent), handler)


async def list_sessions(storage: ServerStorage, request: Request) -> None:
    infos = await storage.sessions_of(str(request.owner))
    request.result = [Content(request.owner, info.data) for info in infos]


BEHAVIOR: dict[str, Behave] = {
    "load": visit(lambda session, request: None),
    "write": visit(write),
    "nested write": visit(write_nested),
    "touch": visit(lambda session, request: None),
    "renewal": visit(renew),
    "logout": visit(lambda session, request: session.invalidate()),
    "new session": visit(write, is_new=True),
    "login": visit(log_in),
    "change of owner": visit(change_owner),
    "end_session": end_session,
    "end_sessions": end_sessions,
    "end_sessions(keep)": end_others,
    "sessions_of": list_sessions,
    "visit after max_age": visit(write),
}
KINDS = [*BEHAVIOR, "expiry"]
NOT_TOGETHER = {"load", "sessions_of", "nested write", "new session", "visit after max_age"}
DEPENDS_ON_MODE = {*WRITES, "touch"}
HAS_NO_COOKIE = {"end_session", "end_sessions", "sessions_of"}
CLOCKS = {"touch": NOW + 30, "visit after max_age": NOW + 80}


def scenario(
    kinds: Sequence[str],
    mode: Mode,
    placement: Placement,
    *,
    most: int | None = None,
    devices: int = 1,
) -> Scenario:
    """Set up requests with a session of ann's, who has another session.

    If one of the requests logs ann in, the session of the requests has no owner yet.

    :param most: the option ``max_per_owner``.
    :param devices: the number of sessions that the requests have in turn.
    """
    options: dict[str, Any] = {"max_age": MAX_AGE, "max_per_owner": most}
    if "touch" in kinds:
        options["touch_after"] = TOUCH_AFTER
    owners = [None if "login" in kinds else "ann"] * devices + ["ann"]
    records: Records = {}
    initial: dict[str, Content] = {}
    handles: dict[str, str] = {}

    async def set_up(storage: ServerStorage) -> None:
        for number, owner in enumerate(owners):
            first = Request(f"S{number}", "new session", owner=owner)
            await visit(fill, is_new=True)(storage, first)
            assert first.cookie is not None
            assert first.saved is not None
            initial[first.cookie] = first.saved
        by_device = {info.data["device"]: info.handle for info in await storage.sessions_of("ann")}
        handles.update((i, by_device.get(initial[i].items["device"], "")) for i in initial)

    run_freely(set_up(ServerStorage(FreeStore(records), **options)), now=FIRST)
    *ids, other = initial
    actors: dict[str, Actor] = {}
    for name, kind, i in zip("abc", kinds, itertools.cycle(ids), strict=False):
        if kind == "expiry":
            continue
        if kind == "end_session":
            target = i if handles[i] else other
            request = Request(name, kind, None, "ann", target, handles[target])
        else:
            is_other = kind == "end_sessions(keep)" and "login" in kinds
            cookie = None if kind in HAS_NO_COOKIE else other if is_other else i
            request = Request(name, kind, cookie, "bob" if kind == "change of owner" else "ann")
        # The clocks differ, so that no request profits from what another has just read.
        actors[name] = Actor(request, BEHAVIOR[kind], CLOCKS.get(kind, NOW) + 2 * len(actors))
    limit = "" if most is None else f"-{devices} devices, at most {most}"
    return Scenario(
        name=f"{'+'.join(kinds)}{limit}-{mode}-{placement}",
        actors=actors,
        placement=[[*actors]] if placement == "together" else [[name] for name in actors],
        mode=mode,
        records=records,
        initial=initial,
        options=options,
        expiring=frozenset(ids if "expiry" in kinds else ()),
    )


def fill(session: Session, request: Request) -> None:
    session["device"] = request.name
    session["list"] = ["first"]
    session.owner = request.owner


MODES: tuple[Mode, ...] = get_args(Mode)
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
FAULTS: tuple[Fault, ...] = get_args(Fault)


def pairs() -> Iterator[Any]:
    """Return all pairs with each mode, placement and fault, in an order that shares most work."""
    for kinds in itertools.combinations_with_replacement(KINDS, 2):
        for mode, placement, fault in itertools.product(MODES, PLACEMENTS, FAULTS):
            if is_searched({*kinds}, mode, placement, fault):
                name = f"{'+'.join(kinds)}-{mode}-{placement}-{fault}"
                yield pytest.param(kinds, mode, placement, fault, id=name)


def is_searched(kinds: set[str], mode: Mode, placement: Placement, fault: Fault) -> bool:
    if kinds == {"expiry"} or ("expiry" in kinds and placement == "together"):
        return False  # an expiry comes to no process
    concerned = kinds & DEPENDS_ON_MODE
    if placement == "together" and concerned not in (set(), kinds):
        return mode == "merge" and (fault == "none" or not kinds & NOT_TOGETHER)
    if fault == "none":
        return True
    if mode == "merge" and not concerned:
        return False
    return placement == "apart" or kinds == {"load"} or not kinds & NOT_TOGETHER


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.clear()


@pytest.fixture(autouse=True)
def control() -> Iterator[None]:
    with controlled():
        yield


@pytest.mark.parametrize(("kinds", "mode", "placement", "fault"), [*pairs()])
def test_pair(
    kinds: Sequence[str], mode: Mode, placement: Placement, fault: Fault, memory: Memory
) -> None:
    Explorer(scenario(kinds, mode, placement), fault, memory=memory).run()


TRIPLES = [
    ("renewal", "write", "logout"),
    ("renewal", "renewal", "write"),
    ("renewal", "end_session", "write"),
    ("renewal", "logout", "renewal"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kinds", TRIPLES, ids="+".join)
def test_triple(kinds: Sequence[str], mode: Mode) -> None:
    Explorer(scenario(kinds, mode, "apart")).run()


def test_triple_in_one_process() -> None:
    """The first triple; a search of all of them takes minutes, and found nothing."""
    Explorer(scenario(TRIPLES[0], "merge", "together")).run()


def logins(placement: Placement, *, most: int, devices: int, fault: Fault = "none") -> Any:
    name = f"{devices} devices, at most {most}-{placement}-{fault}"
    logins = scenario(["login"] * 2, "merge", placement, most=most, devices=devices)
    return pytest.param(logins, fault, id=name)


@pytest.mark.parametrize(
    ("logins", "fault"),
    [
        *(logins("together", most=2, devices=1, fault=fault) for fault in FAULTS),
        logins("apart", most=1, devices=1),
        *(logins("apart", most=2, devices=1, fault=fault) for fault in FAULTS),
        logins("apart", most=2, devices=2),
    ],
)
def test_logins_with_a_limit(logins: Scenario, fault: Fault, memory: Memory) -> None:
    Explorer(logins, fault, memory=memory).run()


def plain_set(records: Records, call: Call) -> Any:
    """Replace any record, as SET does, where `swap` must replace the expected one."""
    if call.verb == "swap" and call.expected is not None:
        records[call.key] = call.payload
        return True
    return perform(records, call)


def swap_marks(records: Records, call: Call) -> Any:
    """Replace also a mark, whatever record is expected."""
    if call.verb == "swap" and records.get(call.key, b"").startswith(b'{"moved":'):
        records[call.key] = call.payload
        return True
    return perform(records, call)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("store", "kinds", "fault", "invariant"),
    [
        (plain_set, ["write", "write"], "timeout", "acknowledged_is_there"),
        (plain_set, ["renewal", "renewal"], "none", "one_renewal_wins"),
        (swap_marks, ["renewal", "write"], "none", "one_renewal_wins"),
        (swap_marks, ["renewal", "renewal"], "none", "one_renewal_wins"),
    ],
)
def test_a_wrong_store_is_found_out(
    store: Any, kinds: Sequence[str], fault: Fault, invariant: str, mode: Mode, placement: Placement
) -> None:
    with pytest.raises(ViolationError, match=rf"(?s)(^|\n){invariant}: .*\nreplay\("):
        Explorer(scenario(kinds, mode, placement), fault, store=store).run()


@pytest.mark.parametrize(
    ("kinds", "placement", "fault"),
    [
        (["write", "write"], "together", "none"),
        (["write", "renewal"], "together", "none"),
        (["logout", "write"], "together", "none"),
        (["write", "write"], "apart", "unsettled"),
        (["write", "renewal"], "apart", "timeout"),
        (["new session", "write"], "apart", "killed"),
        (["renewal", "logout"], "apart", "cancelled"),
    ],
)
def test_reductions_omit_no_outcome(
    kinds: Sequence[str], placement: Placement, fault: Fault
) -> None:
    explorers = [
        Explorer(scenario(kinds, "merge", placement), fault, reduces=reduces)
        for reduces in (True, False)
    ]
    for explorer in explorers:
        explorer.run()
    reduced, complete = explorers
    assert reduced.outcomes == complete.outcomes
    assert reduced.states < complete.states


def test_a_schedule_is_replayed() -> None:
    lines = Explorer(scenario(["write", "load"], "merge", "apart")).replay(0, 0, 0, 0).splitlines()
    assert lines[0] == "a begins, with the cookie first.id1"
    assert lines[1].startswith("a.task1#1 read AIOHTTP_SESSION_first.id1")
    assert lines[-1] == "a (write) acknowledged: cookie 'first.id1', result None"
