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

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def seen() -> str:
    """What a process saw that has nothing else in memory, of one function after another."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.leaks.watch"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        check=False,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("name", [name for name in cases() if name != "broken"])
def test_many_calls_leave_nothing_behind(seen: str, name: str) -> None:
    assert f"{name}: " in seen
    assert f"{name} leaks\n" not in seen, seen


def test_a_leak_is_found(seen: str) -> None:
    assert "broken leaks\n" in seen
