"""The reference package, in a virtual environment of its own, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

REQUIREMENT = "aiohttp-session==2.12.1"

_CACHE = Path(__file__).parent.parent / ".cache"


def python() -> str:
    """Return the path of an interpreter that has the reference package; install it if need be.

    All that the package depends on it shares with this interpreter, so that a comparison shows the
    package and nothing else. It is kept for the next call. Any number of processes may call this at
    once.

    :raises RuntimeError: if the package can't be installed; the message says how to get it.
    """
    shared = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    digest = hashlib.sha256(repr((sys.version, REQUIREMENT, shared)).encode("utf-8")).hexdigest()
    folder = _CACHE / f"reference-{digest[:12]}"
    executable = folder / "bin" / "python"
    ready = folder / "ready"
    with _locked(folder.with_suffix(".lock")):
        if not ready.exists():
            _run(sys.executable, "-m", "venv", "--clear", str(folder))
            pip = (str(executable), "-m", "pip", "install", "--quiet")
            _run(*pip, "--no-deps", REQUIREMENT)
            # Behind its own packages, and without any .pth file of theirs.
            own = next(folder.glob("lib/*/site-packages"))
            (own / "shared.pth").write_text("\n".join(shared))
            ready.touch()
    return str(executable)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(*command: str) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            "The reference package could not be installed. It needs a package index that pip can "
            f"reach; this was tried, and has to work:\n  {' '.join(command)}\n{done.stdout}"
        )
