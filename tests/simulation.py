"""Processes that use a simulated store, and what each of them does after a history of events.

The real code of `ServerStorage` runs. Each of its operations on the store becomes a call, which
waits for an event: a reply, or a fault. Between two events a process runs until nothing in it can
go on. Nothing depends on time or chance, so a process is a function of its events.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextvars import copy_context
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias, TypeVar

from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from aiohttp_session import ConflictError, Session, UnsettledError
from aiohttp_session.server_storage import ServerStorage
from aiohttp_session.stores import Store
from tests.history import Content, Request, View
from tests.quiet_loop import NOW, Loop, Origin, origin

NAME = "AIOHTTP_SESSION"

_T = TypeVar("_T")
Records: TypeAlias = dict[str, bytes]
MakeStorage: TypeAlias = Callable[[Store], ServerStorage]
Event: TypeAlias = tuple[Any, ...]
"""("begin", names, cookies), ("reply", call, reply), ("cancel", request) or (fault, call)."""


class Call(NamedTuple):
    """An operation on the store, which waits until the explorer lets it happen."""

    name: str
    """The name of the task, and how many calls the task has made."""
    verb: str
    key: str
    payload: bytes = b""
    expected: bytes | None = None

    @property
    def writes(self) -> bool:
        return self.verb != "read"


def perform(records: Records, call: Call) -> Any:
    """Apply an operation to the records, and return the reply."""
    found = records.get(call.key)
    if call.verb == "read":
        return found
    if call.verb == "swap" and found != call.expected:
        return False
    if call.verb == "update" and found is None:
        return False
    if call.verb == "delete" or (call.verb == "expire" and found == call.expected):
        records.pop(call.key, None)
    elif call.verb != "expire":
        records[call.key] = call.payload
    return None if call.verb in {"create", "delete"} else True


class CallingStore(Store):
    """A store that passes its operations on."""

    def __init__(self, answer: Callable[..., Awaitable[Any]]) -> None:
        self._answer = answer

    async def read(self, key: str) -> bytes | None:
        record: bytes | None = await self._answer("read", key)
        return record

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        await self._answer("create", key, payload)

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        is_done: bool = await self._answer("swap", key, payload, expected)
        return is_done

    async def delete(self, key: str) -> None:
        await self._answer("delete", key)

    if hasattr(Store, "update"):

        async def update(self, key: str, payload: bytes, ttl: int | None) -> bool:
            is_done: bool = await self._answer("update", key, payload)
            return is_done


class FreeStore(CallingStore):
    """A store that performs each operation in the next turn of the event loop."""

    def __init__(self, records: Records) -> None:
        super().__init__(self._perform)
        self.records = records

    async def _perform(self, *call: Any) -> Any:
        await asyncio.sleep(0)
        return perform(self.records, Call("", *call))


def run_freely(use: Coroutine[Any, Any, _T], now: float = NOW) -> _T:
    """Run what uses a storage on a free store."""

    def start() -> asyncio.Task[_T]:
        origin.set(Origin("first", now))
        return loop.create_task(use)

    loop = Loop()  # type: ignore[abstract]
    task = copy_context().run(start)
    loop.run()
    return task.result()


def content_of(session: Session) -> Content | None:
    """Return what a session contains; None if it is no session."""
    return None if session.empty else Content(session.owner, copy.deepcopy(dict(session)))


_PROTOCOL: Any = SimpleNamespace(
    transport=asyncio.Transport(), ssl_context=None, peername=None, sockname=None
)
_REQUEST = make_mocked_request("GET", "/", protocol=_PROTOCOL)


def make_request(i: str | None) -> web.Request:
    """Make a request whose cookie contains a session id."""
    return _REQUEST.clone(headers={} if i is None else {"Cookie": f"{NAME}={i}"})


Behave: TypeAlias = Callable[[ServerStorage, Request], Coroutine[Any, Any, None]]


class Actor(NamedTuple):
    """A request to come.

    :param request: what is known of the request beforehand.
    :param behave: does what the request does, and takes the answer down.
    :param now: the time by the request's clock.
    """

    request: Request
    behave: Behave
    now: float


class Process:
    """A run of the real code: a storage, its requests, and the calls that wait."""

    def __init__(self, make: MakeStorage, actors: Mapping[str, Actor]) -> None:
        self.calls: dict[str, tuple[Call, asyncio.Future[Any]]] = {}
        self.dropped: list[Call] = []
        """The calls whose task was cancelled by the last event."""
        self._loop = Loop()  # type: ignore[abstract]
        self._storage = make(CallingStore(self._answer))
        self._actors = actors
        self._requests: dict[str, Request] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._numbers: defaultdict[str, int] = defaultdict(int)
        self._trace: list[tuple[Any, tuple[str, ...]]] = []
        """What has happened, each with the names of the tasks and keys that it concerns."""
        self._queue: list[str] = []
        self._is_closed = False

    def apply(self, event: Event) -> None:
        """Let an event happen, and run until nothing can go on."""
        kind, name, *args = event
        self.dropped.clear()
        if kind == "begin":
            for one, cookie in zip(name, args[0], strict=True):
                copy_context().run(self._begin, one, cookie)
        elif kind == "cancel":
            tasks = (task.get_name() for task in self._loop.tasks)
            self._trace.append((event, tuple(t for t in tasks if t.startswith(f"{name}."))))
            self._tasks[name].cancel()
        else:
            call, future = self.calls.pop(name)
            names = (_task_of(name), call.key) if call.writes else (_task_of(name),)
            self._trace.append(((kind, call, *args), names))
            if kind == "reply":
                future.set_result(args[0])
            else:
                future.set_exception(UnsettledError() if kind == "unsettled" else TimeoutError())
        self._loop.run()
        if self._queue or len(self._loop.tasks) > len(self.calls):
            queue = {t.get_name() for t in self._loop.tasks if _may_queue(t)}
            queue.difference_update(map(_task_of, self.calls))
            self._queue = [name for name in self._queue if name in queue]
            self._queue += sorted(queue.difference(self._queue))

    def requests(self) -> dict[str, Request]:
        return {name: dataclasses.replace(r) for name, r in sorted(self._requests.items())}

    def summary(self) -> Any:
        """Return what is equal for two histories that have the same effect.

        Those are the events of each task in their order, the replies to the writes of each key in
        their order, and the tasks that wait for their turn. Of a request whose tasks have all
        ended, only the writes and the answer count.
        """
        busy = {task.get_name().partition(".")[0] for task in self._loop.tasks}
        over = self._requests.keys() - busy
        answers = tuple(repr(self._requests[name]) for name in sorted(over))
        if len(over) == len(self._actors):
            return answers
        traces: defaultdict[str, int] = defaultdict(int)
        for event, names in self._trace:
            for name in names:
                if name.partition(".")[0] not in over:
                    traces[name] = hash((traces[name], event))
        return answers, tuple(self._queue), frozenset(traces.items())

    def close(self) -> None:
        """End all tasks, so that the garbage collector finds none of them unfinished."""
        self._is_closed = True
        for _ in range(100):
            if not self._loop.tasks:
                break
            for task in self._loop.tasks:
                task.cancel()
            self._loop.run()
        vars(self._storage).clear()  # or it would live until the garbage collector finds it

    def _begin(self, name: str, cookie: str | None) -> None:
        actor = self._actors[name]
        request = self._requests[name] = dataclasses.replace(actor.request, sent=cookie)
        origin.set(Origin(name, actor.now))
        task = self._tasks[name] = self._loop.create_task(self._attend(actor, request))
        self._trace.append((("begin", cookie), (task.get_name(),)))

    async def _attend(self, actor: Actor, request: Request) -> None:
        try:
            await actor.behave(self._storage, request)
        except (ConnectionError, TimeoutError, ConflictError, asyncio.CancelledError) as error:
            request.status, request.error = "failed", repr(error)
        except Exception as error:  # noqa: BLE001 - an invariant reports the error
            request.status, request.error = "failed", f"unexpected {error!r}"
        else:
            request.status = "acknowledged"

    async def _answer(self, *args: Any) -> Any:
        if self._is_closed:
            raise ConnectionError
        task = asyncio.current_task()
        assert task is not None
        name = task.get_name()
        self._numbers[name] += 1
        call = Call(f"{name}#{self._numbers[name]}", *args)
        self._trace.append((call, (name,)))
        future = self._loop.create_future()
        self.calls[call.name] = call, future
        try:
            return await future
        except asyncio.CancelledError:
            if self.calls.pop(call.name, None):
                self.dropped.append(call)
                self._trace.append((("dropped", call), (call.key,)))
            raise


def _task_of(call: str) -> str:
    return call.partition("#")[0]


def _may_queue(task: asyncio.Task[Any]) -> bool:
    """Tell whether a task may wait for its turn, and does not just wait for other tasks."""
    waits_for = getattr(task, "_fut_waiter", None)
    return type(waits_for).__name__ not in {"Task", "_GatheringFuture"}


class Node:
    """What a process is about after a history of events."""

    def __init__(self, process: Process, history: tuple[Node, Event] | None) -> None:
        self.history = history
        """The node before the last event, and that event."""
        self.calls = tuple(sorted(call for call, _ in process.calls.values()))
        self.requests = process.requests()
        self.running = tuple(n for n, r in self.requests.items() if r.status == "running")
        first = {name.partition(".")[0]: name for name in reversed(process.calls)}
        self.first = frozenset(first.values())
        """The call of each request that was made first."""
        self.next: dict[Event, tuple[Node, tuple[Call, ...]]] = {}

    @cached_property
    def answers(self) -> str:
        """What the clients know, in a form that can be compared fast."""
        return sys.intern(repr(self.requests))

    def events(self) -> list[Event]:
        """Return the events of the history."""
        events = []
        node = self
        while node.history is not None:
            node, event = node.history
            events.append(event)
        return events[::-1]


class Machine:
    """What a process does after each history of events, as far as this was asked for.

    :param reduces: whether histories that have the same effect count as one.
    """

    def __init__(self, start: Callable[[], Process], *, reduces: bool = True) -> None:
        self._start = start
        self._reduces = reduces
        self._nodes: dict[Any, Node] = {}
        self._process = start()
        self.root = Node(self._process, None)
        self._at: Node | None = self.root

    def after(self, node: Node, event: Event) -> tuple[Node, tuple[Call, ...]]:
        """Return where an event leads, and the writes that it leaves without a task."""
        if event not in node.next:
            if self._at is not node:
                self._process.close()
                self._process = self._start()
                for earlier in node.events():
                    self._process.apply(earlier)
            self._at = None  # should the event raise an error
            self._process.apply(event)
            dropped = tuple(call for call in self._process.dropped if call.writes)
            node.next[event] = self._find(node, event), dropped
            self._at = node.next[event][0]
        return node.next[event]

    def close(self) -> None:
        self._process.close()

    def _find(self, node: Node, event: Event) -> Node:
        new = Node(self._process, (node, event))
        if not self._reduces:
            return new
        known = self._nodes.setdefault(self._process.summary(), new)
        assert (known.calls, known.requests) == (new.calls, new.requests), (
            f"two histories count as one, but differ: {known.events()}, {new.events()}"
        )
        return known


class Observer:
    """A process that asks what a store contains."""

    def __init__(self, make: MakeStorage) -> None:
        self._store = FreeStore({})
        self._storage = make(self._store)
        self._views: dict[frozenset[tuple[str, bytes]], View] = {}

    def see(self, records: frozenset[tuple[str, bytes]]) -> View:
        if records not in self._views:
            self._views[records] = run_freely(self._look(dict(records)))
        return self._views[records]

    async def _look(self, records: Records) -> View:
        listed, survivors = {}, {}
        for owner in ("ann", "bob"):
            self._store.records = dict(records)
            infos = await self._storage.sessions_of(owner)
            listed[owner] = [Content(owner, info.data) for info in infos]
            await self._storage.end_sessions(owner)
            survivors[owner] = frozenset(await self._load())
        self._store.records = records
        return View(await self._load(), listed, survivors)

    async def _load(self) -> dict[str, Content]:
        contents = {}
        for key in [*self._store.records]:
            if key.startswith(f"{NAME}_"):
                i = key.removeprefix(f"{NAME}_")
                session = await self._storage.load_session(make_request(i))
                if (content := content_of(session)) is not None:
                    contents[i] = content
        return contents


class Memory:
    """What explorations share: what processes and stores were found to do.

    :param most: how many machines are kept.
    """

    def __init__(self, most: int = 24) -> None:
        self._most = most
        self._machines: OrderedDict[str, Machine] = OrderedDict()
        self._observers: dict[str, Observer] = {}

    def machine(self, key: str, make: Callable[[], Machine]) -> Machine:
        machine = self._machines.pop(key, None) or make()
        self._machines[key] = machine
        if len(self._machines) > self._most:
            self._machines.popitem(last=False)[1].close()
        return machine

    def observer(self, key: str, make: MakeStorage) -> Observer:
        return self._observers.setdefault(key, Observer(make))

    def clear(self) -> None:
        while self._machines:
            self._machines.popitem()[1].close()
        self._observers.clear()
