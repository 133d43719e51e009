"""Programs that are run in a process of their own, which they may crash, or never end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(
    code: str, *arguments: str, implementation: str, returncode: int = 0, **environment: str
) -> str:
    """Run code over one implementation, to the return code that is expected; return its output."""
    pure = "1" if implementation == "python" else ""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, *arguments],
        env={**os.environ, "AIOHTTP_SESSION_NO_EXTENSIONS": pure, **environment},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (returncode, "")
    return done.stdout
