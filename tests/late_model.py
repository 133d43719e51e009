"""Requests of browsers to processes behind late networks, and what the browsers know."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from aiohttp import web

from aiohttp_session import ConflictError, Session, get_session, new_session, session_middleware
from aiohttp_session.server_storage import ServerStorage
from aiohttp_session.stores.outage import is_outage
from tests.contract import make_request
from tests.history import Content, History, Lineage, Mode, Request, View
from tests.late_network import Hold, Network, Process, Time
from tests.simulation import content_of
from tests.waiting import PATIENCE, turns, until

OWNERS = ("ann", "bob")
BROWSERS = ("S0", "S1", "S2")
"""The sessions that the browsers have at first: two belong to ann, and one has no owner."""

Act: TypeAlias = Callable[[Session, Request], object]


class Ask(NamedTuple):
    """A request of a browser, or a call of a method of the storage."""

    process: int
    kind: str
    browser: int = 0
    is_slow: bool = False
    """Whether the handler goes on only at a later step."""
    is_stale: bool = False
    """Whether the request sends the first cookie that the browser ever had."""
    hold: Hold | None = None
    """What the network of the process holds from the time when the session was loaded."""


class GoOn(NamedTuple):
    """A slow handler goes on: the oldest, unless another one is named."""

    number: int = 0


class Delay(NamedTuple):
    """The network of a process is about to hold something."""

    process: int
    hold: Hold = Hold()


class Cut(NamedTuple):
    """A process learns that its connections with held bytes are gone."""

    process: int


class Deliver(NamedTuple):
    """A network delivers what it holds of one connection, or everything."""

    process: int
    number: int | None = None


class Cancel(NamedTuple):
    """The client of the oldest unfinished request leaves."""


class Stall(NamedTuple):
    """Time passes until all requests have ended that wait for the network."""


Step: TypeAlias = "Ask | GoOn | Delay | Cut | Deliver | Cancel | Stall"


def write(session: Session, request: Request) -> None:
    session.setdefault("device", request.name)
    session[request.name] = 1
    session["last"] = request.name  # so no record ever returns to the same bytes


def write_nested(session: Session, request: Request) -> None:
    session.setdefault("device", request.name)
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


LOGINS = ("login", "change of owner")
ACTS: Mapping[str, Act] = {
    "load": lambda session, request: None,
    "write": write,
    "nested write": write_nested,
    "renewal": renew,
    "logout": lambda session, request: session.invalidate(),
    "new session": write,
    "login": log_in,
    "change of owner": change_owner,
}
OF_BROWSERS = (*ACTS, "end_sessions(keep)")


class LateHistory(History):
    """A history of so many requests that sessions are made, and belong to owners, at any time."""

    def may_be_over(self, lineage: Lineage, reader: Request | None = None) -> bool:
        if reader is not None and lineage.maker is not None:
            was_there = lineage.maker.name in reader.after
        else:
            was_there = True
        is_over = super().may_be_over(lineage, reader)
        return is_over or not was_there or self._may_be_one_too_many(lineage)

    def _may_be_one_too_many(self, lineage: Lineage) -> bool:
        """Tell whether as many sessions may be younger as an owner may have."""
        if self.most is None:
            return False
        others = [other for other in self.lineages if other is not lineage]
        younger = sum(self._may_be_younger(other, lineage) for other in others)
        known = {r.name for other in self.lineages for r in _logins(other)}
        unknown = [r for r in self.requests if r.kind in LOGINS and r.name not in known]
        return younger + len(unknown) >= self.most

    def _may_be_younger(self, one: Lineage, other: Lineage) -> bool:
        """Tell whether a session may have become an owner's after another one."""
        logins = _logins(one)
        if other.first.owner is None or other.maker is not None:
            return any(r.name not in o.after for r in logins for o in _logins(other))
        is_initial = one.maker is None and one.first.owner is not None
        is_later = self.lineages.index(one) > self.lineages.index(other)
        return bool(logins) or (is_initial and is_later)


def _logins(lineage: Lineage) -> list[Request]:
    """Return the requests that may have made a session an owner's."""
    requests = [*lineage.requests, *filter(None, [lineage.maker])]
    return [r for r in requests if r.kind in LOGINS]


class Run:
    """What happens to some sessions, as their clients know it.

    :param most: the ``max_per_owner`` of the storages.
    """

    def __init__(
        self, servers: Sequence[Process], mode: Mode, most: int | None, time: Time
    ) -> None:
        self._mode = mode
        self._most = most
        self._processes = servers
        self._time = time
        self._initial: dict[str, Content] = {}
        self._cookies: list[list[str | None]] = [[] for _ in BROWSERS]
        self._ids: dict[str, str] = {}  # the last known id of each session, by its device
        self._requests: list[Request] = []
        self._running: dict[str, tuple[Network, asyncio.Task[None]]] = {}
        self._paused: dict[str, asyncio.Event] = {}
        self._is_well = True

    async def begin(self) -> None:
        """Have each browser get a session."""
        for device, cookies in zip(BROWSERS, self._cookies, strict=True):

            def fill(session: Session, request: Request, device: str = device) -> None:
                session["device"] = device
                session.owner = None if device == BROWSERS[-1] else OWNERS[0]

            self._time.date.now += 1
            request = Request("first", "new session")
            await self._visit(self._processes[0], request, fill)
            assert request.cookie is not None
            assert request.saved is not None
            self._initial[request.cookie] = request.saved
            self._keep_cookie(request, cookies)

    async def take(self, step: Step) -> None:
        self._time.date.now += 1
        if isinstance(step, Ask):
            await self._ask(step)
        elif isinstance(step, GoOn):
            if self._paused:
                self._paused.pop([*self._paused][step.number % len(self._paused)]).set()
        elif isinstance(step, Cancel):
            for _, task in [*self._running.values()][:1]:
                task.cancel()
                self._is_well = False
        elif isinstance(step, Stall):
            await self._stall()
        else:
            network = self._processes[step.process].network
            if isinstance(step, Delay):
                self._plan(network, step.hold)
            elif isinstance(step, Cut):
                network.cut()
            elif step.number is not None:
                network.release_one(step.number)
            else:
                network.heal()
                await network.delivers()
        await self._settle()

    async def end(self) -> History:
        """Have all requests end and everything delivered; return what happened."""
        await self._stall()
        await self._deliver()
        while self._running:
            await self.take(GoOn())
            await self._stall()
        await self._deliver()
        return LateHistory(
            mode=self._mode,
            initial=self._initial,
            requests=self._requests,
            view=await self._look(),
            most=self._most,
            is_well=self._is_well,
        )

    def _plan(self, network: Network, hold: Hold | None) -> None:
        if hold is not None:
            self._is_well = False
            network.plan(hold)

    async def _ask(self, step: Ask) -> None:
        request = Request(f"r{len(self._requests)}", step.kind, owner=OWNERS[0])
        process = self._processes[step.process]
        if step.kind == "change of owner":
            request.owner = OWNERS[1]
        elif step.kind == "end_session":
            infos = await self._processes[0].storage.sessions_of(OWNERS[0])
            if not infos:
                return
            info = infos[step.browser % len(infos)]
            request.target, request.handle = self._ids.get(info.data["device"]), info.handle
        if step.kind in OF_BROWSERS:
            request.sent = self._cookies[step.browser][0 if step.is_stale else -1]
        request.after = frozenset(r.name for r in self._requests if r.status != "running")
        self._requests.append(request)
        task = asyncio.ensure_future(self._attend(step, request, process))
        self._running[request.name] = process.network, task
        task.add_done_callback(lambda _: self._running.pop(request.name))

    async def _attend(self, step: Ask, request: Request, process: Process) -> None:
        try:
            if step.kind in OF_BROWSERS:
                act = ACTS.get(step.kind)
                await self._visit(process, request, act, is_slow=step.is_slow, hold=step.hold)
            else:
                self._plan(process.network, step.hold)
                with self._limited():
                    await _call(process.storage, request)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - judged below
            is_expected = isinstance(error, (ConflictError, asyncio.CancelledError))
            is_expected = is_expected or is_outage(error)
            request.error = repr(error) if is_expected else f"unexpected {error!r}"
            request.status = "failed"
        else:
            request.status = "acknowledged"
            self._keep_cookie(request, self._cookies[step.browser])

    async def _visit(
        self,
        process: Process,
        request: Request,
        act: Act | None,
        *,
        is_slow: bool = False,
        hold: Hold | None = None,
    ) -> None:
        storage = process.storage
        saving = contextlib.ExitStack()

        async def handler(http: web.Request) -> web.Response:
            if request.kind == "new session":
                session = await new_session(http)
            else:
                with self._limited():
                    session = await get_session(http)
                request.has_loaded, request.loaded = True, content_of(session)
            if is_slow:
                self._paused[request.name] = gate = asyncio.Event()
                try:
                    await gate.wait()
                finally:
                    self._paused.pop(request.name, None)
            self._plan(process.network, hold)
            if act is not None:
                act(session, request)
                request.saved = content_of(session)
            else:
                await self._end_others(storage, request, session)
            saving.enter_context(self._limited())
            return web.Response()

        name = storage.cookie_name
        cookie = None if request.sent is None else f"{name}={request.sent}"
        with saving:
            response = await session_middleware(storage)(make_request(cookie), handler)
        morsel = response.cookies.get(name)
        request.cookie = None if morsel is None else morsel.value

    async def _end_others(self, storage: ServerStorage, request: Request, session: Session) -> None:
        request.owner = session.owner
        if session.owner is not None:
            with self._limited():
                request.result = await storage.end_sessions(session.owner, keep=session)

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """Check that an operation takes no longer than its time limit."""
        began = self._time.loop_time()
        try:
            yield
        finally:
            assert self._time.loop_time() - began <= 1.1 * PATIENCE, "a request ends late"

    def _keep_cookie(self, request: Request, cookies: list[str | None]) -> None:
        if request.cookie is None:
            return
        cookies.append(request.cookie or None)
        if request.cookie and request.saved is not None:
            self._ids[request.saved.items["device"]] = request.cookie

    async def _settle(self) -> None:
        """Wait until each request has ended, or waits for its handler or its network."""

        def is_settled() -> bool:
            return all(
                name in self._paused or network.is_blocking
                for name, (network, _) in self._running.items()
            )

        await until(is_settled)
        if not self._is_over():
            await turns(30)
            await until(is_settled)

    async def _stall(self) -> None:
        """Let time pass until no request waits for its network."""
        networks = [process.network for process in self._processes]
        await self._time.pass_until(self._is_over, networks)

    def _is_over(self) -> bool:
        return self._running.keys() <= self._paused.keys()

    async def _deliver(self) -> None:
        for process in self._processes:
            process.network.heal()
        for process in self._processes:
            await process.storage.finish()
            await process.network.delivers()

    async def _look(self) -> View:
        storage = self._processes[0].storage
        listed, survivors = {}, {}
        alive = await self._load_all(storage)
        for owner in OWNERS:
            infos = await storage.sessions_of(owner)
            listed[owner] = [Content(owner, info.data) for info in infos]
        for owner in OWNERS:
            await storage.end_sessions(owner)
            survivors[owner] = frozenset(await self._load_all(storage))
        return View(alive, listed, survivors)

    async def _load_all(self, storage: ServerStorage) -> dict[str, Content]:
        contents = {}
        for i in {*self._initial, *(r.cookie for r in self._requests if r.cookie)}:
            session = await storage.load_session(make_request(f"{storage.cookie_name}={i}"))
            if (content := content_of(session)) is not None:
                contents[i] = content
        return contents


async def _call(storage: ServerStorage, request: Request) -> None:
    owner = str(request.owner)
    if request.kind == "end_session":
        request.result = await storage.end_session(owner, request.handle)
    elif request.kind == "end_sessions":
        request.result = await storage.end_sessions(owner)
    else:
        infos = await storage.sessions_of(owner)
        request.result = [Content(owner, info.data) for info in infos]
