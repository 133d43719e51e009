"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import contenders, measuring, servers, table
from .cases import CASES, Stores

_OUT = Console()
_ERR = Console(stderr=True)


def main() -> int:
    """Run what the command line asks for, and return the exit status."""
    options = _parser().parse_args()
    cases = [case for case in CASES if fnmatch.fnmatch(case.name, options.cases)]
    if not cases:
        _ERR.print(
            f"No case is named {options.cases!r}; there are, for example: redis/read, step/*"
        )
        return 2
    with contextlib.ExitStack() as stack:
        stores, missing = stack.enter_context(_stores(options, {case.storage for case in cases}))
        not_run = {case: missing[case.storage] for case in cases if case.storage in missing}
        cases = [case for case in cases if case not in not_run]
        running = []
        for name in options.impl.split(","):
            contender = contenders.Contender(name, stores)
            stack.callback(contender.close)
            running.append(contender)
        progress = stack.enter_context(
            Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=_ERR,
                transient=True,
            )
        )
        task = progress.add_task("", total=measuring.count_steps(cases, options.rounds))

        def step(description: str) -> None:
            progress.update(task, advance=1, description=description)

        timings = measuring.measure(running, cases, options.rounds, step)
    _OUT.print(table.make_table(timings, not_run, [contender.name for contender in running]))
    for contender in running:
        _OUT.print(f"{contender.name}: {contender.description}")
    return 0


@contextlib.contextmanager
def _stores(
    options: argparse.Namespace, needed: set[str]
) -> Iterator[tuple[Stores, dict[str, str]]]:
    """Give the servers that storages need, and why those that are missing can't be had."""
    redis, memcached, missing = options.redis, options.memcached, {}
    with contextlib.ExitStack() as stack:
        if "redis" in needed and not redis:
            try:
                redis = f"redis://{servers.HOST}:{stack.enter_context(servers.redis()).port}"
            except servers.MissingServerError as error:
                missing["redis"] = f"not run: {error}"
        if "memcached" in needed and not memcached:
            try:
                memcached = f"{servers.HOST}:{stack.enter_context(servers.memcached()).port}"
            except servers.MissingServerError as error:
                missing["memcached"] = f"not run: {error}"
        yield Stores(redis, memcached), missing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--cases", default="*", metavar="GLOB", help="which cases, as in 'redis/*'")
    parser.add_argument("--impl", default=",".join(contenders.NAMES), help="which contenders")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--redis", metavar="URL", help="a Redis server to use")
    parser.add_argument("--memcached", metavar="HOST:PORT", help="a memcached server to use")
    return parser


if __name__ == "__main__":
    sys.exit(main())
