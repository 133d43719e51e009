"""The reference package, in a virtual environment of its own, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

REQUIREMENT = "aiohttp-session[secure,aioredis,aiomcache,pynacl]==2.12.1"

_CACHE = Path(__file__).parent.parent / ".cache"
# In the same versions as here, so that a comparison shows the package and nothing else.
_SHARED = (
    "aiohttp",
    "aiomcache",
    "cryptography",
    "frozenlist",
    "hiredis",
    "multidict",
    "orjson",
    "propcache",
    "pynacl",
    "redis",
    "uvloop",
    "yarl",
)


def python() -> str:
    """Return the path of an interpreter that has the reference package; install it if need be.

    The environment is kept for the next call, one for each version of Python and of what the
    package depends on. Any number of processes may call this at once.

    :raises RuntimeError: if the package can't be installed; the message says how to get it.
    """
    requirements = [REQUIREMENT, *_shared()]
    digest = hashlib.sha256(repr((sys.version, requirements)).encode("utf-8")).hexdigest()
    folder = _CACHE / f"reference-{digest[:12]}"
    executable = folder / "bin" / "python"
    ready = folder / "ready"
    with _locked(folder.with_suffix(".lock")):
        if not ready.exists():
            _run(sys.executable, "-m", "venv", "--clear", str(folder))
            _run(str(executable), "-m", "pip", "install", "--quiet", *requirements)
            ready.touch()
    return str(executable)


def _shared() -> Iterator[str]:
    for name in _SHARED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield f"{name}=={metadata.version(name)}"


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
