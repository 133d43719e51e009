"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import (
    contenders,
    faults,
    load,
    machine,
    measuring,
    near,
    outage,
    owners,
    plot,
    results,
    scale,
    server_time,
    servers,
    table,
)
from .cases import CASES, MAIN, SERVER_CASES, SERVERS, STORAGES, Case, Stores
from .contenders import Contender, ContenderError

_ERRORS = Console(stderr=True)
_OUT = Console(width=None if sys.stdout.isatty() else 140)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for, and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _MODES[options.mode](options)
    except ContenderError as error:
        _ERRORS.print(f"[bold red]failed[/]: {error}", highlight=False)
        return 1


def _run_cases(options: argparse.Namespace) -> int:
    run = _saved(options) if options.show else _measured(options, _selected(options, CASES))
    _report(options, run, table.TITLE)
    if options.plot:
        plot.save(run, options.plot)
    return 0


def _run_server(options: argparse.Namespace) -> int:
    if options.show:
        run = _saved(options)
    else:
        run = _measured(options, _selected(options, SERVER_CASES), of_servers=True)
    _report(options, run, table.SERVER_TITLE)
    return 0


def _report(options: argparse.Namespace, run: results.Run, title: str) -> None:
    if options.json:
        run.save(options.json)
    old = results.load(options.compare) if options.compare else None
    rows = table.rows(run, old)
    _OUT.print(table.for_terminal(rows, title))
    _print_facts({**run.missing, **run.contenders, **run.machine})
    if options.rst:
        table.save_rst(rows, options.rst)


def _run_load(options: argparse.Namespace) -> int:
    seconds = options.seconds or load.SECONDS
    loader = load.Loader(options.connections, seconds, uvloop=options.uvloop)
    names, absent = contenders.available(options.impl)
    storages = _selected_storages(options)
    with _stores(options, storages) as (stores, missing):
        storages = [name for name in storages if name in STORAGES and name not in missing]
        with _progress(load.count_steps(names, storages, seconds)) as step:
            loads = loader.measure(names, storages, stores, step)
    _OUT.print(table.for_terminal(table.load_rows(loads), loader.describe()))
    _print_facts({**missing, **absent, **loader.loaded, **machine.describe()})
    if options.json:
        document = {"machine": machine.describe(), "load": loader.describe()}
        results_ = [dataclasses.asdict(entry) for entry in loads]
        options.json.write_text(json.dumps({**document, "results": results_}, indent=1) + "\n")
    return 0


def _run_scale(options: argparse.Namespace) -> int:
    cases = list(dict.fromkeys(case for axis in scale.AXES.values() for case in axis))
    run = _measured(options, _selected(options, cases))
    for axis, members in scale.AXES.items():
        title = f"Microseconds of CPU time over a bare handler, by {axis.replace('_', ' ')}"
        _OUT.print(table.for_terminal(table.scale_rows(run, axis, members), title))
    names = [name for name in run.contenders if name != "reference"]
    rounds = _rounds(options)
    storages = [case.storage for case in scale.MEMORY]
    with (
        _stores(options, storages) as (stores, missing),
        _progress(scale.count_memory_steps(names, rounds)) as step,
    ):
        found = list(scale.measure_memory(names, rounds, stores, missing, step))
    _OUT.print(table.for_terminal(table.memory_rows(found), "Sessions in the memory of a process"))
    _print_facts({**run.missing, **run.contenders, **run.machine})
    if options.json:
        run.save(options.json)
    return 0


def _run_outage(options: argparse.Namespace) -> int:
    names, absent = contenders.available(options.impl)
    storages = _selected_storages(options)
    runs = [(name, storage) for storage in storages if storage in SERVERS for name in names]
    with _progress(len(runs)) as step:
        seen = []
        for name, storage in runs:
            step(f"{name}: {storage} is stopped for {options.stopped:g} s")
            rate, stopped = options.rate, options.stopped
            seen.append(outage.measure(name, storage, rate, stopped, uvloop=options.uvloop))
    title = f"A store that is stopped for {options.stopped:g} s, {options.rate:g} requests/s"
    _OUT.print(table.for_terminal(table.outage_rows(seen), title))
    _print_facts({**absent, **machine.describe()})
    return 0


def _run_faults(options: argparse.Namespace) -> int:
    storages = _selected_storages(options)
    storages = [name for name in storages if name in faults.STORAGES]
    seconds = options.seconds or faults.SECONDS
    found = {}
    with _progress(len(storages)) as step:
        for name in storages:
            step(f"{name}: {seconds:g} s of faults")
            found[name] = faults.run(name, seconds, options.faults)
    title = f"{faults.USERS} users, {options.faults:g} faults/s in their network"
    _OUT.print(table.for_terminal(table.fault_rows(found), title))
    _print_facts({**_errors(found), **machine.describe()})
    return 0


def _errors(found: dict[str, faults.Outcome]) -> dict[str, str]:
    """Describe each error that was seen, the most frequent first."""
    return {
        f"{storage}, {count} times": what
        for storage, outcome in found.items()
        for what, count in outcome.errors.most_common()
    }


def _run_owners(options: argparse.Namespace) -> int:
    storages = _selected_storages(options)
    storages = [name for name in storages if name in {"memory", *SERVERS}]
    rounds = 1 if options.quick else min(options.rounds, 5)
    with _stores(options, storages) as (stores, missing), _progress(len(storages)) as step:
        found = [
            owners.measure(name, stores, rounds, step) for name in storages if name not in missing
        ]
    title = "Milliseconds of CPU time: the least of all rounds"
    _OUT.print(table.for_terminal(table.owner_rows(found), title))
    _print_facts({**missing, **machine.describe()})
    return 0


def _run_near(options: argparse.Namespace) -> int:
    with _stores(options, ["redis near"]) as (stores, missing), _progress(1) as step:
        found = [] if missing else [near.measure(stores, step)]
    title = "A log-out that another process sees: milliseconds after it was answered"
    _OUT.print(table.for_terminal(table.near_rows(found), title))
    _print_facts({**missing, **machine.describe()})
    return 0


_MODES = {
    "cases": _run_cases,
    "faults": _run_faults,
    "load": _run_load,
    "near": _run_near,
    "outage": _run_outage,
    "owners": _run_owners,
    "scale": _run_scale,
    "server": _run_server,
}


def _saved(options: argparse.Namespace) -> results.Run:
    run = results.load(options.show)
    run.timings = {case: run.timings[case] for case in _selected(options, run.timings)}
    return run


def _measured(
    options: argparse.Namespace, cases: list[Case], *, of_servers: bool = False
) -> results.Run:
    names, absent = contenders.available(options.impl)
    batch = server_time.BATCH if of_servers else measuring.BATCH
    rounds, batch = _rounds(options), 0.001 if options.quick else batch
    with contextlib.ExitStack() as stack:
        storages = [case.storage for case in cases]
        stores, missing = stack.enter_context(_stores(options, storages))
        not_run = {case: missing[case.storage] for case in cases if case.storage in missing}
        cases = [case for case in cases if case not in not_run]
        running = []
        for name in names:
            running.append(Contender(name, stores))
            stack.callback(running[-1].close)
        clock = stack.enter_context(server_time.clock(stores)) if of_servers else None
        with _progress(measuring.count_steps(cases, rounds) + 1) as step:
            timings = measuring.measure(running, cases, rounds, step, batch, clock)
            step("what saw slow moments only, once more")
            if not options.quick:
                measuring.catch_up(timings, running, batch, clock=clock)
    described = {contender.name: contender.describe() for contender in running} | absent
    return results.Run(timings, described, not_run, machine.describe())


def _rounds(options: argparse.Namespace) -> int:
    return 1 if options.quick else options.rounds


@contextlib.contextmanager
def _stores(
    options: argparse.Namespace, needed: list[str]
) -> Iterator[tuple[Stores, dict[str, str]]]:
    """Give the servers that storages need, and say why the missing ones can't be had."""
    found: dict[str, str | None] = {name: getattr(options, name) for name in Stores._fields}
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(SERVERS[storage] for storage in needed if storage in SERVERS):
            if found[name]:
                continue
            try:
                server = stack.enter_context(getattr(servers, name)())
            except servers.MissingServerError as error:
                missing |= {s: f"not run: {error}" for s in SERVERS if SERVERS[s] == name}
            else:
                scheme = "" if name == "memcached" else "redis://"
                found[name] = f"{scheme}{servers.HOST}:{server.port}"
        yield Stores(**found), missing


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    text = TextColumn("{task.description}")
    with Progress(*columns, text, console=_ERRORS, transient=True) as progress:
        task = progress.add_task("", total=steps)
        yield lambda description: progress.update(task, advance=1, description=description)


def _print_facts(facts: dict[str, str]) -> None:
    for name, text in facts.items():
        _OUT.print(f"{name}: {text}", highlight=False, soft_wrap=True)


def _selected(options: argparse.Namespace, cases: Iterable[Case]) -> list[Case]:
    globs = options.cases.split(",")
    cases = list(cases)
    selected = [case for case in cases if any(fnmatch.fnmatch(case.name, glob) for glob in globs)]
    if not selected:
        names = ", ".join(case.name for case in cases[:3])
        raise SystemExit(f"No case is named {options.cases!r}; names are like {names}")
    return selected


def _selected_storages(options: argparse.Namespace) -> list[str]:
    cases = [case for case in CASES if case.storage in MAIN]
    return list(dict.fromkeys(case.storage for case in _selected(options, cases)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("mode", nargs="?", default="cases", choices=_MODES, help="cases, if not given")
    add("--cases", default="*", metavar="GLOBS", help="which cases: 'redis/*', '*/read,step/*'")
    add("--impl", default=contenders.NAMES, type=_names, help="which of compiled,pure,reference")
    add("--rounds", default=20, type=int, help="of which the least counts")
    add("--quick", action="store_true", help="check every answer, and time next to nothing")
    add("--json", type=Path, metavar="FILE", help="write the results to")
    add("--show", type=Path, metavar="FILE", help="show an earlier run instead of measuring")
    add("--compare", type=Path, metavar="FILE", help="an earlier run to compare with")
    add("--rst", type=Path, metavar="FILE", help="write the table as reStructuredText")
    add("--plot", type=Path, metavar="FILE.svg", help="draw the results")
    add("--redis", metavar="URL", help="a Redis server to use, instead of one of our own")
    add("--memcached", metavar="HOST:PORT", help="the same for memcached")
    add("--valkey", metavar="URL", help="the same for Valkey")
    add("--connections", default=64, type=int, help="load: HTTP connections at a time")
    add("--seconds", type=float, help="load, faults: how long each measurement takes in all")
    add("--faults", default=10, type=float, help="faults: how many in a second")
    add("--rate", default=2000, type=float, help="outage: requests offered per second")
    add("--stopped", default=30, type=float, help="outage: for how many seconds")
    add("--uvloop", action="store_true", help="load, outage: run the server with uvloop")
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - set(contenders.NAMES)
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown} not among {', '.join(contenders.NAMES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
