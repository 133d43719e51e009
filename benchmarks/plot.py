"""Results as bars, in an SVG file."""

from __future__ import annotations

from pathlib import Path

from .cases import Case
from .results import Run

_COLORS = {"compiled": "#1b7f5c", "pure": "#8fcbb0", "reference": "#c9c9c9"}
_PANELS = ("read", "write", "new session", "logout")


def save(run: Run, path: Path) -> None:
    """Draw the costs of each storage and contender, 250 bytes and one request at a time."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and for plots only

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "benchmarks"  # the same results give the same file
    from matplotlib import patches  # noqa: PLC0415
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, panels = plt.subplots(1, len(_PANELS), figsize=(12, 4.2), sharey=True)
    storages = list(dict.fromkeys(case.storage for case in run.timings if case.storage != "step"))
    height = 0.8 / len(run.contenders)
    for panel, operation in zip(panels, _PANELS, strict=True):
        for number, contender in enumerate(run.contenders):
            for row, storage in enumerate(storages):
                timing = run.timings.get(Case(storage, operation), {}).get(contender)
                if timing is None:
                    continue
                place = row + (number - (len(run.contenders) - 1) / 2) * height
                panel.barh(place, timing.cost, height, color=_COLORS[contender])
                panel.text(timing.cost, place, f" {timing.cost:.0f}", va="center", fontsize=7)
        panel.set_title(operation)
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(storages)), storages)
    panels[0].invert_yaxis()
    handles = [patches.Rectangle((0, 0), 1, 1, color=_COLORS[name]) for name in run.contenders]
    figure.legend(handles, list(run.contenders), loc="upper right", ncols=3, frameon=False)
    figure.suptitle("Microseconds of CPU time per request over a bare handler", x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
