"""The packages that are compared, each in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp_session

from . import reference

NAMES = ("compiled", "pure", "reference")
_ROOT = Path(__file__).parent.parent
_IMPLEMENTATIONS = {"compiled": "cython", "pure": "python", "reference": "reference"}


class ContenderError(RuntimeError):
    """A contender failed, or is not what it was taken for."""


def available(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the contenders that can be had, and why the others can't."""
    missing = {}
    if "reference" in names:
        try:
            reference.python()
        except RuntimeError as error:
            missing["reference"] = f"not run: {error}"
    return [name for name in names if name not in missing], missing


class Contender:
    """A process with one of the packages, that does what it is asked.

    :param name: one of `NAMES`.
    :param setting: what the process is told at its start.
    :param module: what runs in it: the module of this package whose ``main`` is called.
    :raises ContenderError: if it is another implementation than the one asked for.
    :raises RuntimeError: if the reference package can't be had.
    """

    def __init__(self, name: str, setting: Any, module: str = "worker") -> None:
        self.name = name
        python, place = sys.executable, "insert(0, folder)"
        if name == "reference":
            # Its package is found before this one, which comes last on the path.
            python, place = reference.python(), "append(folder)"
        code = f"import sys; folder = {str(_ROOT)!r}; del sys.path[0]; sys.path.{place}; "
        code += f"from benchmarks import {module} as module; module.main()"
        ours = ("PYTHON", "AIOHTTP_SESSION_")
        # Its allocator is the caller's choice: what memory an outage leaves depends on that.
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(ours) or k == "PYTHONMALLOC"
        }
        # Hashes that differ from run to run make the costs of dicts differ.
        environment["PYTHONHASHSEED"] = "0"
        if name == "pure":
            environment["AIOHTTP_SESSION_NO_EXTENSIONS"] = "1"
        self._process = subprocess.Popen(
            [python, "-s", "-c", code, json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        try:
            self._loaded: dict[str, str] = self.ask("describe")
            self._check_loaded()
        except ContenderError:
            self.close()
            raise

    def describe(self) -> str:
        """Say which package was really loaded."""
        return "aiohttp_session {version}, implementation: {implementation}".format(**self._loaded)

    def ask(self, command: str, **arguments: Any) -> Any:
        """Have the process do something, and return its answer.

        :raises ContenderError: if it fails.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps([command, arguments]), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ContenderError(f"{self.name}: its process ended")
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderError(f"{self.name}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _check_loaded(self) -> None:
        loaded = self._loaded
        is_ours = loaded["file"] == aiohttp_session.__file__
        if loaded["implementation"] != _IMPLEMENTATIONS[self.name] or is_ours == (
            self.name == "reference"
        ):
            raise ContenderError(
                f"{self.name} was asked for, and {loaded['file']} was loaded, with the "
                f"implementation {loaded['implementation']!r}. make develop builds the "
                "extensions; --impl leaves a contender out"
            )
