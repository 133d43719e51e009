"""How costs grow: with the session, with the other cookies, with the load, with the store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

from .cases import MAIN, ONLY_HERE, SERVERS, Case, Stores
from .contenders import Contender
from .measuring import count_steps, measure

_SIZES = (20, 250, 1000, 2900, 16_384, 65_536)  # bytes
_COOKIE_LIMIT = 2900  # bytes of a session, when it is encrypted
_COOKIES = (1, 4, 10, 20, 50)
_AT_ONCE = (1, 8, 64, 256)
_STORED = (10**3, 10**4, 10**5, 10**6)
_OPERATIONS = ("read", "write")

AXES = {
    "size": [
        Case(storage, operation, size=size)
        for storage in MAIN
        for operation in _OPERATIONS
        for size in _SIZES
        if size <= _COOKIE_LIMIT or storage in {*SERVERS, *ONLY_HERE}
    ],
    "cookies": [
        Case(storage, "read", cookies=cookies)
        for storage in ("siv", "fernet", "redis")
        for cookies in _COOKIES
    ],
    "at_once": [
        Case(storage, operation, at_once=at_once)
        for storage in SERVERS
        if storage in MAIN
        for operation in _OPERATIONS
        for at_once in _AT_ONCE
    ],
}
"""What grows: a field of `Case`, and the cases that show it."""

MEMORY = [
    Case(storage, "read", stored=stored)
    for storage in ("memory", "redis near")
    for stored in _STORED
]
"""Where sessions are kept in the process."""


class Stored(NamedTuple):
    """What many sessions in memory cost."""

    contender: str
    storage: str
    sessions: int
    bytes: float  # a session, with all that belongs to it
    read: float  # microseconds of CPU time over a bare handler


def measure_memory(
    names: list[str],
    rounds: int,
    stores: Stores,
    missing: Container[str],
    step: Callable[[str], None],
) -> Iterator[Stored]:
    """Measure ever more sessions, in a process of its own each time."""
    for name in names:
        if name == "reference":
            continue
        for case in MEMORY:
            if case.storage in missing:
                continue
            contender = Contender(name, stores)
            try:
                timings = measure([contender], [case], rounds, step)[case]
                used = contender.ask("memory", **dataclasses.asdict(case))
            finally:
                contender.close()
            yield Stored(name, case.storage, case.stored, used / case.stored, timings[name].cost)


def count_memory_steps(names: list[str], rounds: int) -> int:
    """Return how often `measure_memory` calls its step."""
    return len(set(names) - {"reference"}) * count_steps(MEMORY, rounds)
