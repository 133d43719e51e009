"""What a run found: kept as JSON, and compared with an earlier run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from .cases import Case
from .measuring import Timing, Timings


@dataclass
class Run:
    """The result of a run."""

    timings: Timings
    contenders: dict[str, str]  # what each was; "not run: why" for one that could not be had
    not_run: dict[Case, str] = field(default_factory=dict)  # and why
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> dict[str, str]:
        """Why storages were not run: a line for each reason."""
        storages: dict[str, dict[str, None]] = {}
        for case, why in self.not_run.items():
            storages.setdefault(why, {})[case.storage] = None
        return {", ".join(names): why for why, names in storages.items()}

    def save(self, path: Path) -> None:
        """Write the run as JSON."""
        results = [
            {
                **dataclasses.asdict(case),
                "name": case.name,
                "contender": contender,
                "microseconds": round(timing.cost, 4),
                "spread": round(timing.spread, 4),
                "rounds": [round(taken, 4) for taken in timing.taken],
                "bare_rounds": [round(taken, 4) for taken in timing.bare],
                "paces": [round(pace, 4) for pace in timing.paces],
            }
            for case, row in self.timings.items()
            for contender, timing in row.items()
        ]
        not_run = [{**dataclasses.asdict(case), "why": why} for case, why in self.not_run.items()]
        document = {
            "machine": self.machine,
            "contenders": self.contenders,
            "results": results,
            "not_run": not_run,
        }
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Run:
    """Read a run that was saved."""
    document = json.loads(path.read_text(encoding="utf-8"))
    timings: Timings = {}
    for result in document["results"]:
        timing = Timing(result["rounds"], result["bare_rounds"], result.get("paces", []))
        timings.setdefault(_case(result), {})[result["contender"]] = timing
    not_run = {_case(entry): entry["why"] for entry in document["not_run"]}
    return Run(timings, document["contenders"], not_run, document["machine"])


def _case(entry: dict[str, object]) -> Case:
    fields = {field.name: entry[field.name] for field in dataclasses.fields(Case)}
    return Case(**fields)  # type: ignore[arg-type]


def ratio(run: Run, old: Run, case: Case, contender: str) -> float | None:
    """Return how many times the old cost the new one is, or None if there is no such old cost."""
    timing = run.timings[case].get(contender)
    earlier = old.timings.get(case, {}).get(contender)
    if timing is None or earlier is None or not earlier.cost:
        return None
    return timing.cost / earlier.cost
