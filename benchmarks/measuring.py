"""Measure cases: contenders take turns, round by round, so that drift hits all alike.

A machine that is shared has slow moments, some as long as minutes: everything takes 1.8 times as
long. They show in the pace, what the bare handler takes just before and after. A case that was
never, or hardly ever, seen in a fast moment is tried again in the end; see `catch_up`.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from .cases import ONLY_HERE, Case
from .contenders import Contender

BATCH = 0.012  # seconds of CPU time that a contender gets for a case in a round
PATIENCE = 15.0  # seconds
_FAST_ROUNDS = 4  # that each case should have
_FAST = 1.15  # times the best pace


@dataclass
class Timing:
    """Microseconds of CPU time of one case with one contender, one number a round."""

    taken: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)  # of a handler without sessions
    paces: list[float] = field(default_factory=list)  # of the machine at the time

    @property
    def cost(self) -> float:
        """What the case costs over the bare handler: the least of all rounds, each."""
        return max(0.0, min(self.taken) - min(self.bare, default=0.0))

    @property
    def spread(self) -> float:
        """How far above the least the middle round lies."""
        return statistics.median(self.taken) - min(self.taken)


Timings = dict[Case, dict[str, Timing]]
Clock = Callable[[Case], float]
"""Returns the seconds of CPU time that the server of a case has used until now."""


def measure(
    contenders: Iterable[Contender],
    cases: Iterable[Case],
    rounds: int,
    step: Callable[[str], None],
    batch: float = BATCH,
    clock: Clock | None = None,
) -> Timings:
    """Check every case with every contender, then time them.

    :param clock: measures the servers instead of the contenders.
    :param step: called with a description before each of `count_steps` steps.
    :raises ContenderError: if a contender fails, or gives a wrong answer.
    """
    contenders, cases = list(contenders), list(cases)
    timings: Timings = {}
    for case in cases:
        step(f"checking {case.name}")
        timings[case] = {}
        for contender in contenders:
            if contender.name == "reference" and case.storage in ONLY_HERE:
                continue
            contender.ask("check", **dataclasses.asdict(case))
            timings[case][contender.name] = Timing()
    for number in range(rounds):
        bare = {
            (contender.name, at_once, one_session): contender.ask(
                "bare", seconds=batch, at_once=at_once, one_session=one_session
            )
            for at_once, one_session in sorted({(c.at_once, c.is_one_session) for c in cases})
            for contender in contenders
            if clock is None  # a bare handler asks no server
        }
        for case in cases:
            step(f"round {number + 1}: {case.name}")
            for contender in contenders:
                timing = timings[case].get(contender.name)
                if timing is None:
                    continue
                _time(timing, case, contender, batch, clock)
                if case.storage != "step" and clock is None:  # steps take off their own
                    timing.bare.append(bare[contender.name, case.at_once, case.is_one_session])
    return timings


def catch_up(
    timings: Timings,
    contenders: list[Contender],
    batch: float = BATCH,
    patience: float = PATIENCE,
    clock: Clock | None = None,
) -> None:
    """Try again what hardly saw a fast moment.

    :param patience: seconds that it may take.
    """
    ends = time.monotonic() + patience
    while slow := list(_slow(timings, contenders)):
        for timing, case, contender in slow:
            if time.monotonic() > ends:
                return
            _time(timing, case, contender, batch, clock)


def _slow(
    timings: Timings, contenders: list[Contender]
) -> Iterator[tuple[Timing, Case, Contender]]:
    for contender in contenders:
        name = contender.name
        rows = [(case, row[name]) for case, row in timings.items() if name in row]
        best = min((pace for _, timing in rows for pace in timing.paces), default=0.0)
        for case, timing in rows:
            if sum(pace < best * _FAST for pace in timing.paces) < _FAST_ROUNDS:
                yield timing, case, contender


def _time(
    timing: Timing, case: Case, contender: Contender, batch: float, clock: Clock | None
) -> None:
    before = clock(case) if clock else 0.0
    taken, pace, count = contender.ask("time", seconds=batch, **dataclasses.asdict(case))
    if clock:
        taken = (clock(case) - before) / count * 1e6
    timing.taken.append(taken)
    timing.paces.append(pace)


def count_steps(cases: list[Case], rounds: int) -> int:
    """Return how often `measure` calls its `step`."""
    return len(cases) * (rounds + 1)
