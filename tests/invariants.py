"""The guarantees of `ServerStorage`, each written down once, and checked against a history.

They hold against a network that delivers a write at any later time, and against processes that are
killed. They do not hold against a server that loses data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from tests.history import MOVES, WRITES, Content, History, Lineage, Request, item_of

Problems: TypeAlias = Iterator[str]


def acknowledged_is_there(history: History) -> Problems:
    """What was acknowledged is there.

    It stays until a request replaces or ends it that was acknowledged later, or is concurrent. An
    acknowledged write is never undone by an earlier one. With ``on_conflict="merge"``, no
    acknowledged change is lost to a concurrent one. An acknowledged renewal leaves its new id alive
    unless the session was ended. Each request finds what was acknowledged before it began.
    """
    for lineage in history.lineages:
        last = lineage.ids[-1]
        is_needed = not history.may_be_over(lineage)
        is_needed = is_needed and not history.may_have_moved(lineage, last, None)
        if is_needed and not history.live_ids(lineage):
            yield f"the session {last} is not there"
        for i in history.live_ids(lineage):
            yield from _wrong(history, lineage, None, f"the session {i}", history.view.alive[i])
        for r in lineage.requests:
            if r.loaded is not None:
                yield from _wrong(history, lineage, r, f"the session that {r.name} found", r.loaded)
            elif r.has_loaded and r.kind != "visit after max_age":
                is_needed = not history.may_be_over(lineage, r)
                if is_needed and not history.may_have_moved(lineage, r.sent, r):
                    yield f"{r.name} did not find its session"


def _wrong(
    history: History, lineage: Lineage, reader: Request | None, what: str, content: Content
) -> Problems:
    if history.mode == "overwrite":
        values = history.values(lineage, lambda content: content, reader)
        if content not in values:
            yield f"{what} contains {content}, which is none of {values}"
        return
    names = {name for r in lineage.requests if r.saved is not None for name in r.saved.items}
    for name in (None, *sorted({*names, *content.items})):
        values = history.values(lineage, item_of(name), reader)
        if (value := item_of(name)(content)) not in values:
            yield f"{what} contains {name or 'owner'}={value!r}, which is none of {values}"


def ended_stays_ended(history: History) -> Problems:
    """A session that has ended stays ended under each id that it ever had.

    The session has ended when a logout, or a new session in its place, was acknowledged, when
    `end_session()` has returned True, and when `end_sessions()` has returned, if the session was
    saved before that call. Late writes do not revive it.
    """
    for lineage in history.lineages:
        if history.is_over(lineage):
            for i in history.live_ids(lineage):
                yield f"the session {lineage.ids[0]} has ended, and is alive under {i}"
        for r in lineage.requests:
            if r.loaded is not None and history.is_over(lineage, r):
                yield f"{r.name} found a session that had ended"


def one_renewal_wins(history: History) -> Problems:
    """Of several renewals of a session one wins.

    There are never two live ids of one session, and a renewed id stays dead.
    """
    for lineage in history.lineages:
        if len(history.live_ids(lineage)) > 1:
            yield f"a session is alive under several ids: {history.live_ids(lineage)}"
        won = [r for r in lineage.requests if r.kind in MOVES and r.cookie and r.loaded is not None]
        for r in won:
            if r.sent in history.view.alive:
                yield f"{r.name} has renewed {r.sent}, which is alive"
            for other in lineage.requests:
                if other.sent == r.sent and r.name in other.after and other.loaded is not None:
                    yield f"{r.name} has renewed {r.sent}, under which {other.name} found a session"
        if len({r.sent for r in won}) < len(won):
            yield f"several requests have renewed one id: {[r.name for r in won]}"


def dropped_changes_nothing(history: History) -> Problems:
    """A request sets no cookie and revives nothing if its changes were dropped.

    Changes are dropped only if another request has ended the session, or has renewed its id. The
    request removes what it has created.
    """
    for lineage in history.lineages:
        for r in lineage.requests:
            if r.kind not in WRITES or r.status != "acknowledged" or r.cookie:
                continue
            others = Lineage(lineage.ids, lineage.first, None, [*lineage.requests])
            others.requests.remove(r)
            is_reason = history.may_be_over(lineage, r) or any(
                history.may_have_moved(others, i, r) for i in lineage.ids
            )
            if r.loaded is not None and not is_reason:
                yield f"the changes of {r.name} were dropped without a reason"
    if history.is_well:
        ids = {i for lineage in history.lineages for i in lineage.ids}
        for i in sorted(history.view.alive.keys() - ids):
            yield f"a session is alive under {i}, which no client knows"


def ends_are_counted(history: History) -> Problems:
    """The end of sessions returns the true number.

    `end_session()` returns True if and only if it has ended the session, and `end_sessions()`
    returns how many sessions it has ended. If a fault occurred, this may include a record that a
    failed renewal left behind, whose id nobody knows.
    """
    counted = 0
    for r in history.requests:
        if not r.kind.startswith("end_") or r.status != "acknowledged" or r.result is None:
            continue
        counted += int(r.result)
        least = most = 0
        if not history.is_well:
            most = sum(other.kind in MOVES for other in history.requests)
        for lineage in history.lineages:
            enders = {e.name: is_certain for e, is_certain in history.enders(lineage)}
            if r.name not in enders or history.live_ids(lineage):
                continue
            most += 1
            is_alone = len(enders) == 1 and not history.expiring & {*lineage.ids}
            least += is_alone and enders[r.name] and history.most is None
        if not least <= int(r.result) <= most:
            yield f"{r.name} has ended {least} to {most} sessions, not {int(r.result)}"
        if r.result is False:
            yield from _not_ended(history, r)
    over = sum(not history.live_ids(lineage) for lineage in history.lineages)
    if history.is_well and counted > over:
        yield f"{over} sessions are over, but the results say {counted}"


def _not_ended(history: History, r: Request) -> Problems:
    for lineage in history.lineages:
        was_renewed = any(o.kind in MOVES and o.name in r.after for o in lineage.requests)
        was_there = not was_renewed and not history.may_be_over(lineage, r)
        if r.target in lineage.ids and was_there and history.owners(lineage, r) == {r.owner}:
            yield f"{r.name} has not ended a session that was alive"


def live_sessions_are_listed(history: History) -> Problems:
    """No live session of an owner is missing in the index once its login was acknowledged.

    `sessions_of()` lists the session, and lists it once. `end_sessions()` ends it.
    """
    for lineage in history.lineages:
        for i in history.live_ids(lineage):
            content = history.view.alive[i]
            if content.owner is None:
                continue
            count = history.view.listed[content.owner].count(content)
            if count != 1 and (history.is_well or count == 0):
                yield f"the live session {i} of {content.owner} is listed {count} times"
            if i in history.view.survivors[content.owner]:
                yield f"the live session {i} of {content.owner} is not ended with all others"
        for r in history.requests:
            if r.kind == "sessions_of" and r.status == "acknowledged":
                yield from _wrongly_listed(history, lineage, r)


def _wrongly_listed(history: History, lineage: Lineage, r: Request) -> Problems:
    device = lineage.first.items.get("device")
    if device is None:
        return
    owners = history.owners(lineage, r)
    count = sum(content.items.get("device") == device for content in r.result)
    if count and (r.owner not in owners or history.is_over(lineage, r)):
        yield f"{r.name} lists {device}, which is over, or belongs to another owner"
    if count > 1 and history.is_well:
        yield f"{r.name} lists {device} {count} times"
    has_failed = any(o.kind in MOVES and o.status != "acknowledged" for o in lineage.requests)
    is_needed = not has_failed and not history.may_be_over(lineage, r)
    if not count and owners == {r.owner} and is_needed:
        yield f"{r.name} does not list {device}"


def limit_is_kept(history: History) -> Problems:
    """With `max_per_owner` no device is logged out for a login that was dropped.

    There are never more live sessions than allowed once all logins have been acknowledged.
    """
    logins = [r for r in history.requests if r.kind == "login"]
    if history.most is None or any(r.status != "acknowledged" for r in logins):
        return
    for owner in {r.owner for r in logins}:
        live = [lineage for lineage in history.of_owner(owner) if history.live_ids(lineage)]
        if len(live) > history.most:
            yield f"{len(live)} sessions of {owner} are alive"
        allowed = min(history.most, len(history.of_owner(owner)))
        if history.is_well and len(live) < allowed and len(logins) == len(history.requests):
            yield f"{len(live)} sessions of {owner} are alive, though {allowed} are allowed"


def requests_end(history: History) -> Problems:
    """Each request ends, and no request fails without a fault."""
    for r in history.requests:
        if r.status == "running":
            yield f"{r.name} does not end"
        elif r.error and (history.is_well or r.error.startswith("unexpected")):
            yield f"{r.name} fails: {r.error}"


INVARIANTS: tuple[Callable[[History], Problems], ...] = (
    acknowledged_is_there,
    ended_stays_ended,
    one_renewal_wins,
    dropped_changes_nothing,
    ends_are_counted,
    live_sessions_are_listed,
    limit_is_kept,
    requests_end,
)


def check(history: History) -> list[str]:
    """Return which guarantees do not hold, and why."""
    return [f"{one.__name__}: {problem}" for one in INVARIANTS for problem in one(history)]
