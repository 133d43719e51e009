"""The packages that are compared, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import reference
from .cases import Stores

NAMES = ("compiled", "pure", "reference")
_ROOT = Path(__file__).parent.parent
_EXPECTED = {"compiled": "cython", "pure": "python", "reference": "reference"}
# The reference package is found before this one, which comes last on the path.
_START = "import sys; sys.path.{}; from benchmarks import worker; worker.main()"


class ContenderError(RuntimeError):
    """A contender failed, or is not what it was taken for."""


class Contender:
    """A process with one of the packages, that runs cases on command.

    :param name: one of `NAMES`.
    :raises ContenderError: if it is another implementation than the one asked for.
    :raises RuntimeError: if the reference package can't be had.
    """

    def __init__(self, name: str, stores: Stores) -> None:
        self.name = name
        python, place = sys.executable, f"insert(0, {str(_ROOT)!r})"
        if name == "reference":
            python, place = reference.python(), f"append({str(_ROOT)!r})"
        environment = {k: v for k, v in os.environ.items() if k != "AIOHTTP_SESSION_NO_EXTENSIONS"}
        if name == "pure":
            environment["AIOHTTP_SESSION_NO_EXTENSIONS"] = "1"
        self._process = subprocess.Popen(
            [python, "-I", "-c", _START.format(place), json.dumps(stores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.description: dict[str, str] = self.ask("describe")
        if self.description["implementation"] != _EXPECTED[name]:
            self.close()
            raise ContenderError(
                f"{name} was asked for, and {self.description['file']} is the "
                f"{self.description['implementation']} implementation. make develop builds the "
                "extensions; --impl leaves a contender out"
            )

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
