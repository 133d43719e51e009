"""The compiled functions lose no memory, and no reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

if os.environ.get("AIOHTTP_SESSION_NO_EXTENSIONS"):
    pytest.skip("the compiled twins are not wanted", allow_module_level=True)
pytest.importorskip("resource", reason="what memory a process has is asked the Unix way")

from tests.leaks.watch import cases

NAMES_THE_TWINS = True


def run(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.leaks.watch", name],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        check=False,
        text=True,
    )


@pytest.mark.parametrize("name", [name for name in cases() if name != "broken"])
def test_a_million_calls_leave_nothing_behind(name: str) -> None:
    done = run(name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_leak_is_found() -> None:
    done = run("broken")
    assert done.returncode == 1
    assert "blocks" in done.stdout
    assert not done.stderr
