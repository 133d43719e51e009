"""All schedules of a few requests on `ServerStorage`, with at most one fault.

The requests come to processes that use one simulated store; see `simulation`. A schedule is a
sequence of steps: a request begins, a call is answered, a late write is applied, or a fault occurs.

==========  ==========================================================================
fault       what happens
==========  ==========================================================================
unsettled   a call raises UnsettledError; a write is applied at any later time, or never
timeout     the same with TimeoutError
cancelled   a request is cancelled; a write in flight is applied at any later time, or never
killed      a process stops; a write in flight is applied at any later time, or never
==========  ==========================================================================

A lost reply is a late write that is applied at once. Late writes are applied after everything else
has ended, too. The search is fast because it is a search in a graph. A state consists of what each
process has done, of the records and of the late writes, and no state is searched twice, although
many schedules lead to it. The following reductions omit no outcome:

- The code of a process runs once for each history of its events, not for each schedule. Two
  histories count as one if each task has seen the same events in the same order, the writes of each
  key were answered in the same order, and the same tasks wait for their turn in the same order. Of
  a request that is over, only the writes and the answer count. The reason is that the requests of a
  process share only what belongs to a key: who changes it, who waits, and what was last written.
- A late write and an expiry commute with a call of another key. They are applied only if a call of
  their key is about to be answered, or if nothing else is left.
- A request begins right before its first call is answered. An earlier beginning changes no call of
  another request, and it weakens the guarantees: more requests are concurrent. Several requests of
  one process may also begin in one tick of the event loop.
- A process is killed only while it has a write in flight. A process that is killed during a read
  has the same effect as one that is killed at its next write, if this write is never applied.

`Explorer(..., reduces=False)` searches without these reductions; a test compares the outcomes.

Two reductions do omit schedules, if several requests come to one process and a fault may occur: the
calls that one request has in flight are answered in the order in which they were made, and of all
writes only swaps are lost or late.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from aiohttp_session.server_storage import ServerStorage
from aiohttp_session.stores import Store
from tests.history import Content, History, Mode, Request
from tests.invariants import check
from tests.quiet_loop import readable
from tests.simulation import (
    NAME,
    Actor,
    Call,
    Event,
    Machine,
    Memory,
    Node,
    Process,
    Records,
    perform,
)

Fault: TypeAlias = Literal["none", "unsettled", "timeout", "cancelled", "killed"]
Frozen: TypeAlias = frozenset[tuple[str, bytes]]
Move: TypeAlias = tuple[Any, ...]
"""The kind of a step, the number of the process, and details; or "late" and a call."""


class ViolationError(AssertionError):
    """A schedule that breaks a guarantee."""


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Requests, the processes that they come to, and the records that exist before.

    :param placement: the names of the requests of each process.
    :param initial: the sessions in the records, by their ids.
    :param expiring: the ids under which a record may expire, unless a request replaces the record.
    """

    name: str
    actors: Mapping[str, Actor]
    placement: Sequence[Sequence[str]]
    mode: Mode
    records: Records
    initial: Mapping[str, Content]
    options: Mapping[str, Any]
    expiring: frozenset[str] = frozenset()

    def make(self, store: Store) -> ServerStorage:
        return ServerStorage(store, on_conflict=self.mode, **self.options)


class State(NamedTuple):
    """A point of a schedule."""

    nodes: tuple[Node, ...]
    records: Frozen
    late: tuple[Call, ...]
    """The writes that may still be applied."""
    may_fail: bool
    began: frozenset[tuple[str, frozenset[str]]]
    """The requests that have begun, each with the requests that had ended before."""
    killed: frozenset[int]
    fresh: str | None
    """The request that has just begun; its first call is answered next."""


class Explorer:
    """Searches the schedules of a scenario with at most one fault of one kind.

    :param store: applies an operation to the records; a wrong one shows that tests can fail.
    :param memory: is shared with other explorations.
    """

    def __init__(
        self,
        scenario: Scenario,
        fault: Fault = "none",
        *,
        store: Callable[[Records, Call], Any] = perform,
        memory: Memory | None = None,
        reduces: bool = True,
    ) -> None:
        self.scenario = scenario
        self.fault = fault
        self.outcomes: set[Any] = set()
        """The records and the answers to the clients at the end of each schedule."""
        self._store = store
        self._reduces = reduces
        self._is_limited = reduces and fault != "none" and len(scenario.placement[0]) > 1
        self._memory = memory or Memory()
        self._observer = self._memory.observer(repr(scenario.options), scenario.make)
        self._processes = [self._machine(names) for names in scenario.placement]
        self._schedules: dict[State, int] = {}
        self._applied: dict[tuple[Frozen, Call], tuple[Frozen, Any]] = {}
        self._checked: set[Any] = set()
        self._path: list[int] = []

    @property
    def states(self) -> int:
        return len(self._schedules)

    def run(self) -> int:
        """Search all schedules, and return their number.

        :raises ViolationError: for the first schedule that breaks a guarantee.
        """
        return self._search(self._first())

    def replay(self, *choices: int) -> str:
        """Describe a schedule, one step in a line, and the answers to the clients."""
        state, lines = self._first(), []
        for choice in choices:
            move = self._moves(state, self._calls(state))[choice]
            lines.append(self._describe(move, state))
            state = self._step(state, move)
        for one in self._requests(state):
            answer = one.error or f"cookie {one.cookie!r}, result {one.result!r}"
            lines.append(f"{one.name} ({one.kind}) {one.status}: {answer}")
        return readable("\n".join(lines))

    def _machine(self, names: Sequence[str]) -> Machine:
        scenario = self.scenario
        actors = {name: scenario.actors[name] for name in names}
        known = [(actor.request, actor.now) for actor in actors.values()]
        return self._memory.machine(
            repr((scenario.mode, scenario.options, known, self._reduces)),
            lambda: Machine(lambda: Process(scenario.make, actors), reduces=self._reduces),
        )

    def _first(self) -> State:
        records = self.scenario.records
        keys = [f"{NAME}_{i}" for i in self.scenario.expiring]
        return State(
            nodes=tuple(process.root for process in self._processes),
            records=frozenset(records.items()),
            late=tuple(Call("expiry", "expire", key, expected=records[key]) for key in keys),
            may_fail=self.fault != "none",
            began=frozenset(),
            killed=frozenset(),
            fresh=None,
        )

    def _search(self, state: State) -> int:
        """Search the schedules that begin in a state, and return their number."""
        if (number := self._schedules.get(state)) is not None:
            return number
        calls = self._calls(state)
        moves = self._moves(state, calls)
        if not calls and all(move[0] == "late" for move in moves):
            self._check(state)
        number = 0
        for choice, move in enumerate(moves):
            self._path.append(choice)
            number += self._search(self._step(state, move))
            self._path.pop()
        self._schedules[state] = number or 1
        return number or 1

    def _calls(self, state: State) -> list[tuple[int, Call]]:
        """Return the calls that may be answered next, each with the number of its process."""
        return [
            (number, call)
            for number, node in enumerate(state.nodes)
            if number not in state.killed
            for call in node.calls
            if state.fresh in {None, call.name.partition(".")[0]}
            if not self._is_limited or call.name in node.first
        ]

    def _moves(self, state: State, calls: Sequence[tuple[int, Call]]) -> list[Move]:
        """Return what may happen next."""
        moves: list[Move] = [("reply", number, call) for number, call in calls]
        if state.fresh is None:
            moves += self._begins(state)
        if state.late:
            is_last = not moves or not self._reduces
            keys = {call.key for _, call in calls}
            moves += [
                ("late", late)
                for late in state.late
                if (is_last or late.key in keys)
                and self._apply(state.records, late)[0] != state.records
            ]
        if state.may_fail:
            moves += self._faults(state, calls)
        return moves

    def _begins(self, state: State) -> Iterator[Move]:
        begun = {name for name, _ in state.began}
        for number, names in enumerate(self.scenario.placement):
            left = [name for name in names if name not in begun]
            if number in state.killed:
                continue
            for name in left:
                for cookie in self._cookies(state, name):
                    yield "begin", number, (name,), (cookie,)
            if len(left) == len(names) > 1:  # all at once, in one tick of the event loop
                cookies = (self.scenario.actors[name].request.sent for name in left)
                yield "begin", number, tuple(left), tuple(cookies)

    def _cookies(self, state: State, name: str) -> list[str | None]:
        """Return the cookies that a request may send: its own, and any from earlier responses."""
        cookies = [self.scenario.actors[name].request.sent]
        requests = [r for node in state.nodes for r in node.requests.values() if r.cookie]
        for _ in requests:
            cookies += {r.cookie for r in requests if r.sent in cookies} - {*cookies}
        return cookies

    def _faults(self, state: State, calls: Sequence[tuple[int, Call]]) -> Iterator[Move]:
        if self.fault == "cancelled":
            for number, node in enumerate(state.nodes):
                for name in node.running:
                    if state.fresh in {None, name}:
                        yield "cancel", number, name
        elif self.fault == "killed":
            numbers = {number for number, call in calls if call.writes or not self._reduces}
            yield from (("kill", number) for number in sorted(numbers))
        else:
            for number, call in calls:
                if call.verb == "swap" if self._is_limited else call.writes:
                    yield self.fault, number, call

    def _apply(self, records: Frozen, call: Call) -> tuple[Frozen, Any]:
        """Return the records after an operation, and its reply."""
        if (records, call) not in self._applied:
            after = dict(records)
            reply = self._store(after, call)
            self._applied[records, call] = frozenset(after.items()), reply
        return self._applied[records, call]

    def _step(self, state: State, move: Move) -> State:
        kind, *details = move
        if kind == "begin":
            return self._begin(state, *details)
        if kind == "kill":
            lost = (call for call in state.nodes[details[0]].calls if call.writes)
            state = state._replace(late=_sorted(state.late, lost), fresh=None, may_fail=False)
            return state._replace(killed=state.killed | {details[0]})
        if kind == "late":
            left = list(state.late)
            left.remove(details[0])
            return state._replace(records=self._apply(state.records, *details)[0], late=(*left,))
        number, what = details
        if kind == "cancel":
            state = state._replace(fresh=None, may_fail=False)
            return self._advance(state, number, (kind, what))
        if kind == "reply":
            records, reply = self._apply(state.records, what)
            state = state._replace(records=records, fresh=None)
            return self._advance(state, number, (kind, what.name, reply))
        state = state._replace(late=_sorted(state.late, [what]), fresh=None, may_fail=False)
        return self._advance(state, number, (kind, what.name))

    def _begin(
        self, state: State, number: int, names: tuple[str, ...], cookies: tuple[str | None, ...]
    ) -> State:
        ended = frozenset(r.name for r in self._requests(state) if r.status != "running")
        state = state._replace(began=state.began.union((name, ended) for name in names))
        state = self._advance(state, number, ("begin", names, cookies))
        [first, *others] = names
        calls = (call.name for call in state.nodes[number].calls)
        has_called = any(call.startswith(f"{first}.") for call in calls)
        return state._replace(fresh=first if has_called and not others and self._reduces else None)

    def _advance(self, state: State, number: int, event: Event) -> State:
        """Let an event happen in a process."""
        node, dropped = self._processes[number].after(state.nodes[number], event)
        nodes = (*state.nodes[:number], node, *state.nodes[number + 1 :])
        late = _sorted(state.late, dropped) if dropped else state.late
        return state._replace(nodes=nodes, late=late)

    def _requests(self, state: State) -> list[Request]:
        """Return the requests that have begun, as their clients know them."""
        after, requests = dict(state.began), []
        for number, node in enumerate(state.nodes):
            for known in node.requests.values():
                request = dataclasses.replace(known, after=after[known.name])
                if request.status == "running" and number in state.killed:
                    request.status, request.error = "failed", "killed"
                requests.append(request)
        return requests

    def _check(self, state: State) -> None:
        answers = tuple(node.answers for node in state.nodes)
        if (state.records, answers, state.began, state.killed) in self._checked:
            return
        self._checked.add((state.records, answers, state.began, state.killed))
        requests = self._requests(state)
        history = History(
            mode=self.scenario.mode,
            initial=self.scenario.initial,
            requests=requests,
            view=self._observer.see(state.records),
            expiring=self.scenario.expiring,
            most=self.scenario.options.get("max_per_owner"),
            is_well=self.fault == "none",
        )
        known = [(r.name, r.status, r.cookie, r.result, r.loaded) for r in requests]
        self.outcomes.add((state.records, repr(sorted(known))))
        if wrong := check(history):
            self.report(wrong, self._path)

    def report(self, wrong: Sequence[str], path: Sequence[int]) -> None:
        """Report what is wrong after a schedule."""
        choices = ", ".join(map(str, path))
        raise ViolationError(
            "\n".join([*map(readable, wrong), "", self.replay(*path)])
            + f"\n\nreplay({self.scenario.name!r}, {self.fault!r}, {choices})"
        )

    def _describe(self, move: Move, state: State) -> str:
        kind, *_, last = move
        if kind == "begin":
            return f"{' and '.join(move[2])} begins, with the cookie {', '.join(map(str, last))}"
        if not isinstance(last, Call):
            return f"{kind} {last}"
        text = f"{last.name} {last.verb} {last.key} {last.payload.decode()}"
        if kind != "reply":
            return f"{text}: {kind}"
        reply = self._apply(state.records, last)[1]
        return f"{text}: {reply.decode() if isinstance(reply, bytes) else reply}"


def _sorted(late: Iterable[Call], more: Iterable[Call]) -> tuple[Call, ...]:
    return tuple(sorted([*late, *more]))
