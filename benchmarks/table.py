"""Results as a table for people."""

from __future__ import annotations

from rich.table import Table

from .cases import Case
from .measuring import Timing, Timings


def make_table(timings: Timings, not_run: dict[Case, str], contenders: list[str]) -> Table:
    """Make the table: a row for each case, a column for each contender, and the ratios."""
    table = Table(title="Microseconds of CPU time per request over a bare handler")
    for heading in ("storage", "operation", "session", "at once"):
        table.add_column(heading)
    ours = [name for name in contenders if name != "reference"]
    ratios = ours if "reference" in contenders else []
    for heading in (*contenders, *(f"reference/{name}" for name in ratios)):
        table.add_column(heading, justify="right")
    cases = list(dict.fromkeys([*timings, *not_run]))
    for i, case in enumerate(cases):
        row = [case.storage, case.operation, f"{case.size} B", str(case.at_once)]
        if case in not_run:
            row += [not_run[case]]
        else:
            row += [_cell(timings[case].get(name), case) for name in contenders]
            row += [_ratio(timings[case], name) for name in ratios]
        last = i + 1 == len(cases) or _group(cases[i + 1]) != _group(case)
        table.add_row(*row, end_section=last)
    return table


def _group(case: Case) -> tuple[str, int, int]:
    return case.storage, case.at_once, case.size


def _cell(timing: Timing | None, case: Case) -> str:
    if timing is None:
        return "-"
    digits = 3 if case.storage == "step" else 1
    return f"{timing.cost:.{digits}f} +{timing.spread:.{digits}f}"


def _ratio(row: dict[str, Timing], name: str) -> str:
    if "reference" not in row or name not in row or not row[name].cost:
        return "-"
    return f"{row['reference'].cost / row[name].cost:.1f}x"
