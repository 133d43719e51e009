"""HTTP load by wrk, if it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_SCRIPT = """
local cookies = {%s}
local turn = 0
request = function()
  turn = turn %% #cookies + 1
  return wrk.format("GET", nil, {Cookie = cookies[turn]})
end
"""


def program() -> str | None:
    """Return the path of wrk."""
    return shutil.which("wrk")


def load(
    host: str, port: int, path: str, cookies: list[str], connections: int, seconds: float
) -> dict[str, Any]:
    """Put load on a server, and return what was seen; times are in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "cookies.lua")
        script.write_text(_SCRIPT % ", ".join(f"[[{cookie}]]" for cookie in cookies), "utf-8")
        command = [program() or "wrk", "--threads", "1", "--latency", "--script", str(script)]
        command += ["--connections", str(connections), "--duration", f"{max(1, round(seconds))}s"]
        command += [f"http://{host}:{port}{path}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return read(done.stdout + done.stderr)


def read(report: str) -> dict[str, Any]:
    """Read wrk's report."""
    total = re.search(r"(\d+) requests in ([\d.]+)s", report)
    trouble = re.search(r"Non-2xx.*|Socket errors.*", report)
    if trouble or not (total and int(total[1])):
        return {"failure": trouble[0] if trouble else f"wrk: {report.strip()}"}
    latencies = {
        percent: float(value) * _UNITS[unit]
        for percent, value, unit in re.findall(
            r"^ +(50|99)% +([\d.]+)(us|ms|s)", report, re.MULTILINE
        )
    }
    return {
        "requests": int(total[1]),
        "seconds": float(total[2]),
        "p50": latencies["50"],
        "p99": latencies["99"],
    }
