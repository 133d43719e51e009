"""Results as tables: for the terminal, and for the README."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .cases import Case
from .faults import Outcome
from .load import Load
from .measuring import Timing
from .near import Delays
from .outage import Outage
from .owners import ENDED, Owned
from .results import Run, ratio
from .scale import Stored

if TYPE_CHECKING:
    from rich.table import Table

TITLE = "Microseconds of CPU time over a bare handler: least of all rounds, +distance to the median"
SERVER_TITLE = (
    "Microseconds of CPU time of the server: least of all rounds, +distance to the median"
)
_LABELS = ("storage", "operation", "session", "at once", "cookies")


class Rows(NamedTuple):
    """A table before it has a form: groups are set apart."""

    headings: list[str]
    groups: list[list[list[str]]]


def rows(run: Run, old: Run | None = None) -> Rows:
    """Make a row for each case: its cost by contender, how many times it the reference costs.

    :param old: an earlier run; the new cost is shown as so many times the old one.
    """
    contenders = list(run.contenders)
    ours = [name for name in contenders if name != "reference"]
    ratios = ours if "reference" in contenders else []
    headings = [*_LABELS, *contenders, *(f"vs {name}" for name in ratios)]
    if old is not None:
        headings += [f"{name} new/old" for name in contenders]
    groups: list[list[list[str]]] = []
    last: object = None
    for case, costs in run.timings.items():
        label = [case.storage, case.operation, f"{case.size} B", str(case.at_once)]
        row = [*label, str(case.cookies)]
        row += [_cell(costs.get(name), run.contenders[name], case) for name in contenders]
        row += [_times_reference(costs, name) for name in ratios]
        if old is not None:
            row += [_times(ratio(run, old, case, name)) for name in contenders]
        group = (case.storage, case.at_once, case.size, case.cookies)
        if group != last:
            groups.append([])
        last = group
        groups[-1].append(row)
    return _without_constant_labels(Rows(headings, groups))


def _without_constant_labels(table: Rows) -> Rows:
    """Leave out labels that are the same in every row, such as four cookies."""
    every = [row for group in table.groups for row in group]
    constant = {i for i in range(2, len(_LABELS)) if len({row[i] for row in every}) == 1}

    def kept(row: list[str]) -> list[str]:
        return [cell for i, cell in enumerate(row) if i not in constant]

    return Rows(kept(table.headings), [[kept(row) for row in group] for group in table.groups])


def _cell(timing: Timing | None, description: str, case: Case) -> str:
    if timing is None:
        return "not run" if description.startswith("not run") else "n/a"
    digits = 3 if case.storage == "step" else 1
    spread = f" +{timing.spread:.{digits}f}" if timing.taken[1:] else ""
    return f"{timing.cost:.{digits}f}{spread}"


def _times_reference(costs: dict[str, Timing], name: str) -> str:
    if "reference" not in costs or name not in costs or not costs[name].cost:
        return "n/a"
    return _times(costs["reference"].cost / costs[name].cost)


def _times(factor: float | None) -> str:
    return "n/a" if factor is None else f"{factor:.2f}x"


def load_rows(loads: list[Load]) -> Rows:
    """Make a row for each handler that was under load."""
    headings = ["storage", "operation", "contender", "requests/s", "of bare", "of hooks"]
    headings += ["CPU µs", "busy", "p50 ms", "p99 ms", "µs alone", "of bare", "of hooks"]
    groups: dict[tuple[str, str], list[list[str]]] = {}
    for load in loads:
        row = [load.storage, load.operation, load.contender, f"{load.per_second:,.0f}"]
        row += [f"{load.share:.0%}", f"{load.share_of_hooks:.0%}"]
        row += [f"{load.cpu:.0f}", f"{load.busy:.0%}"]
        row += [f"{load.p50:.1f}", f"{load.p99:.1f}"]
        row += [f"{load.alone:.1f}", f"{load.share_alone:.0%}", f"{load.share_of_hooks_alone:.0%}"]
        groups.setdefault((load.storage, load.operation), []).append(row)
    return Rows(headings, list(groups.values()))


def owner_rows(found: list[Owned]) -> Rows:
    """Make a row for each storage: what log-ins cost, and the end of a user's sessions."""
    headings = ["storage", "log-in", "with an owner", *(f"end of {count}" for count in ENDED)]
    costs = [[owned.log_in, owned.owned_log_in, *owned.ends] for owned in found]
    rows = [
        [owned.storage, *(f"{cost:.3f}" for cost in row)]
        for owned, row in zip(found, costs, strict=True)
    ]
    return Rows(headings, [rows])


def outage_rows(outages: list[Outage]) -> Rows:
    """Make a row for each outage."""
    headings = ["storage", "contender", "answered", "not answered", "sent late by s"]
    headings += ["most waiting", "longest s", "then median ms", "well after s"]
    headings += ["MiB before", "most", "after", "objects before", "after"]
    groups: dict[str, list[list[str]]] = {}
    for outage in outages:
        statuses = ", ".join(
            f"{count} of {status or 'closed'}" for status, count in outage.statuses.items()
        )
        row = [outage.storage, outage.contender, statuses]
        row += [str(outage.unanswered + outage.not_sent), f"{outage.latest:.2f}"]
        row += [str(outage.most_waiting), f"{max(outage.waited, default=0):.2f}"]
        row += [f"{outage.quick * 1e3:.1f}", f"{outage.recovery:.2f}"]
        row += [f"{memory:.0f}" for memory in outage.memory]
        # Only Python's own allocator counts them.
        row += [f"{objects:,}" if objects else "n/a" for objects in outage.objects]
        groups.setdefault(outage.storage, []).append(row)
    return Rows(headings, list(groups.values()))


def scale_rows(run: Run, axis: str, cases: list[Case]) -> Rows:
    """Make a row for each storage, operation and contender, a column for each size (or other)."""
    values = sorted({getattr(case, axis) for case in cases})
    groups: dict[tuple[str, str], list[list[str]]] = {}
    for case in cases:
        where = (case.storage, case.operation)
        if where in groups or case not in run.timings:
            continue
        for contender in run.timings[case]:
            row = [*where, contender]
            for value in values:
                costs = run.timings.get(dataclasses.replace(case, **{axis: value}), {})
                row.append(f"{costs[contender].cost:.1f}" if contender in costs else "")
            groups.setdefault(where, []).append(row)
    headings = ["storage", "operation", "contender", *(f"{value:,}" for value in values)]
    return Rows(headings, list(groups.values()))


def memory_rows(found: list[Stored]) -> Rows:
    """Make a row for each number of sessions in memory."""
    rows = [
        [
            *(entry.storage, entry.contender, f"{entry.sessions:,}"),
            *(f"{entry.bytes:,.0f}", f"{entry.read:.1f}"),
        ]
        for entry in found
    ]
    return Rows(["storage", "contender", "sessions", "bytes a session", "read"], [rows])


def fault_rows(found: dict[str, Outcome]) -> Rows:
    """Make a row for each storage."""
    rows = []
    for storage, outcome in found.items():
        failed = outcome.errors.total()
        row = [storage, f"{outcome.faults.total():,}", f"{outcome.requests:,}", f"{failed:,}"]
        row += [f"{failed / max(1, outcome.requests):.2%}", str(outcome.lost)]
        rows.append([*row, f"{outcome.worst:.2f}"])
    headings = ["storage", "faults", "requests", "errors", "share", "lost writes", "longest s"]
    return Rows(headings, [rows])


def near_rows(found: list[Delays]) -> Rows:
    """Make a row for what log-outs took."""
    rows = [[f"{entry.log_outs:,}", f"{entry.median:.3f}", f"{entry.worst:.3f}"] for entry in found]
    return Rows(["log-outs", "median", "worst"], [rows])


def for_terminal(table: Rows, title: str) -> Table:
    """Draw rows for a terminal."""
    from rich.table import Table  # noqa: PLC0415 - tables in other forms do without

    drawn = Table(title=title)
    for heading in table.headings:
        justify = "left" if heading in {*_LABELS[:2], "contender"} else "right"
        drawn.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for group in table.groups:
        for row in group:
            drawn.add_row(*row, end_section=row is group[-1])
    return drawn


def save_rst(table: Rows, path: Path) -> None:
    """Write rows as a table in reStructuredText."""
    path.write_text("\n".join(_rst(table)) + "\n", encoding="utf-8")


def _rst(table: Rows) -> Iterator[str]:
    lines = [table.headings, *(row for group in table.groups for row in group)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.headings))]
    rule = "  ".join("=" * width for width in widths)
    yield rule
    for number, line in enumerate(lines):
        cells = zip(line, widths, strict=True)
        yield "  ".join(cell.ljust(width) for cell, width in cells).rstrip()
        if number == 0:
            yield rule
    yield rule
