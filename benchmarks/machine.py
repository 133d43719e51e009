"""What a run was measured with."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from . import servers

_PACKAGES = (
    "aiohttp",
    "orjson",
    "cryptography",
    "PyNaCl",
    "redis",
    "hiredis",
    "aiomcache",
    "multidict",
    "yarl",
    "uvloop",
)
_PROGRAMS = ("redis-server", "memcached")


def describe() -> dict[str, str]:
    """Return the date, the machine, and the versions of everything."""
    cores = f"{os.cpu_count()} cores"
    return {
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "processor": f"{_processor()}, {cores}",
        "system": platform.platform(terse=True),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": ", ".join(_packages()),
        "servers": ", ".join(_programs()),
    }


def _packages() -> list[str]:
    found = []
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return found


def _programs() -> list[str]:
    found = []
    paths = [path for program in _PROGRAMS if (path := shutil.which(program))]
    with contextlib.suppress(servers.MissingServerError):
        paths.append(servers.valkey_program())
    for path in paths:
        program = Path(path).name
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        words = text.stdout.replace("v=", "").split()
        versions = [word for word in words if word[0].isdigit()]
        found.append(f"{program} {versions[0]}" if versions else program)
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()
