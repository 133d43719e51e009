"""Results as bars, in an SVG file."""

from __future__ import annotations

from pathlib import Path

from .cases import VARIANTS, Case
from .results import Run

_COLORS = {"compiled": "#1b7f5c", "pure": "#57ab89", "reference": "#949494"}
_PANELS = ("read", "write")
# Where the reader's pages are dark, so is the picture.
_DARK = """
  <style type="text/css">@media (prefers-color-scheme: dark) {
    [style*="fill: #ffffff"] { fill: #131416 !important }
    [style*="stroke: #000000"] { stroke: #cfd0d0 !important }
    text, use { fill: #cfd0d0 !important; stroke: #cfd0d0 }
    text { stroke: none }
  }</style>
 </defs>"""


def save(run: Run, path: Path) -> None:
    """Draw what a read and a write cost with each storage, for a session of 250 bytes."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and for plots only

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "benchmarks"  # the same results give the same file
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import patches  # noqa: PLC0415
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = list(dict.fromkeys(_row(case) for case in run.timings if _row(case)))
    figure, panels = plt.subplots(1, len(_PANELS), figsize=(8, 1 + len(rows) / 2), sharey=True)
    height = 0.8 / len(run.contenders)
    for case, row in run.timings.items():
        if not (_row(case) and case.operation in _PANELS):
            continue
        panel = panels[_PANELS.index(case.operation)]
        for number, contender in enumerate(run.contenders):
            if contender in row:
                place = rows.index(_row(case)) + (number - (len(run.contenders) - 1) / 2) * height
                cost = row[contender].cost
                panel.barh(place, cost, height, color=_COLORS[contender])
                panel.text(cost, place, f" {cost:.0f}", va="center", fontsize=8)
    for panel, operation in zip(panels, _PANELS, strict=True):
        panel.set_title(operation)
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].invert_yaxis()
    handles = [patches.Rectangle((0, 0), 1, 1, color=_COLORS[name]) for name in run.contenders]
    figure.legend(handles, list(run.contenders), loc="upper right", ncols=3, frameon=False)
    figure.suptitle("µs of CPU time per request, over a bare handler", x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    drawn = path.read_text("utf-8")
    path.write_text(drawn.replace("\n </defs>", _DARK, 1), "utf-8")


def _row(case: Case) -> str:
    """Return the label of the bars that a case is among; empty if it is not drawn."""
    if case.storage in {"step", *VARIANTS} or case.size != Case.size or case.at_once == 8:
        return ""
    return case.storage if case.at_once == 1 else f"{case.storage}, {case.at_once} at once"
