"""What has happened to the sessions of a storage, as the clients know it.

A history consists of requests and of what the store contains afterwards. Two requests are in order
only if one had ended before the other began; otherwise they are concurrent, and either may count as
the earlier one. A request that failed was applied at any time since it began, also after its
failure, or never. But a failed request never undoes a request that began after the failure and was
acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

Mode: TypeAlias = Literal["overwrite", "merge"]

WRITES = frozenset(
    {"write", "nested write", "renewal", "login", "change of owner", "visit after max_age"}
)
"""Requests that change the session of their cookie."""
MOVES = frozenset({"renewal", "login"})
"""Requests that give the session a new id."""
REPLACES = frozenset({"logout", "new session"})
"""Requests that end the session of their cookie."""


class Content(NamedTuple):
    """What a session contains."""

    owner: str | None
    items: Mapping[str, Any]


@dataclass
class Request:
    """A request, or a call of a method of the storage, as the client knows it."""

    name: str
    kind: str
    sent: str | None = None
    """The session id in the request's cookie."""
    owner: str | None = None
    """The owner whose sessions the request lists or ends, or whom the request makes the owner."""
    target: str | None = None
    """The id of the session that the handle names."""
    handle: str = ""
    after: frozenset[str] = frozenset()
    """The names of the requests that had ended when this request began."""
    status: Literal["running", "acknowledged", "failed"] = "running"
    error: str = ""
    has_loaded: bool = False
    loaded: Content | None = None
    """What the session contained at first; None for no session."""
    saved: Content | None = None
    """What the session contained when the handler returned."""
    cookie: str | None = None
    """The session id that the response set; "" if the response deleted the cookie."""
    result: Any = None


class View(NamedTuple):
    """What a store contains, as a process sees it that asks after all requests."""

    alive: Mapping[str, Content]
    """The live sessions by their ids, including ids that no client knows."""
    listed: Mapping[str, Sequence[Content]]
    """What `sessions_of` returns for each owner."""
    survivors: Mapping[str, frozenset[str]]
    """The ids that are still alive after `end_sessions` for each owner."""


@dataclass
class Lineage:
    """A session under all the ids that clients have received for it, the first id first."""

    ids: list[str]
    first: Content
    maker: Request | None = None
    """The request that made the session; None if the session is older than all requests."""
    requests: list[Request] = field(default_factory=list)
    """The requests that sent one of the ids in their cookie."""


@dataclass
class History:
    """What has happened.

    :param initial: the sessions that were saved before all requests, by their ids.
    :param expiring: the ids under which a record may have expired.
    :param most: the storage's ``max_per_owner``.
    :param is_well: whether no fault occurred.
    """

    mode: Mode
    initial: Mapping[str, Content]
    requests: Sequence[Request]
    view: View
    expiring: frozenset[str] = frozenset()
    most: int | None = None
    is_well: bool = True
    lineages: list[Lineage] = field(init=False)

    def __post_init__(self) -> None:
        self.lineages = [Lineage([i], content) for i, content in self.initial.items()]
        left = list(self.requests)
        while left:
            by_id = {i: lineage for lineage in self.lineages for i in lineage.ids}
            request = next((r for r in left if r.sent is None or r.sent in by_id), left[0])
            left.remove(request)
            lineage = by_id.get(request.sent or "")
            if lineage is not None:
                lineage.requests.append(request)
            if not request.cookie or request.cookie == request.sent:
                continue
            if lineage is not None and request.kind in MOVES and request.loaded is not None:
                lineage.ids.append(request.cookie)
            elif request.saved is not None:
                self.lineages.append(Lineage([request.cookie], request.saved, request))

    def live_ids(self, lineage: Lineage) -> list[str]:
        return [i for i in lineage.ids if i in self.view.alive]

    def was_saved(self, r: Request) -> bool:
        """Tell whether a request's changes were acknowledged: the response set the cookie."""
        return r.kind in WRITES and r.status == "acknowledged" and bool(r.cookie)

    def may_be_saved(self, r: Request) -> bool:
        """Tell whether a request's changes may have been applied.

        If a reply was lost, a write may have been applied before the session ended or moved. The
        changes then are dropped as far as anybody can tell.
        """
        if r.kind not in WRITES or r.loaded is None or r.saved is None:
            return False
        return not self.is_well or r.status != "acknowledged" or bool(r.cookie)

    def may_be_before(self, r: Request, reader: Request | None) -> bool:
        """Tell whether a request may count as earlier than another; None is the end."""
        return reader is None or (r is not reader and reader.name not in r.after)

    def values(
        self, lineage: Lineage, item: Callable[[Content], Any], reader: Request | None = None
    ) -> list[Any]:
        """Return the values of an item that a request may find, or that may be there at the end.

        A request writes the whole session (overwrite) or the items that it changes (merge). The
        value is that of a write for which there is no acknowledged write in between: none that
        began after the former had ended, and that had ended before the reader began.
        """
        writers = [
            (r, r.saved)
            for r in lineage.requests
            if r.saved is not None
            and self.may_be_saved(r)
            and (self.mode == "overwrite" or r.loaded is None or item(r.saved) != item(r.loaded))
        ]
        seen = [
            r
            for r, _ in writers
            if self.was_saved(r) and (reader is None or r.name in reader.after)
        ]
        found = [] if seen else [item(lineage.first)]
        for writer, saved in writers:
            is_undone = any(writer.name in other.after for other in seen)
            if self.may_be_before(writer, reader) and not is_undone:
                found.append(item(saved))
        return found

    def owners(self, lineage: Lineage, reader: Request | None = None) -> set[str | None]:
        return {*self.values(lineage, lambda content: content.owner, reader)}

    def enders(self, lineage: Lineage) -> Iterator[tuple[Request, bool]]:
        """Return the requests that may have ended a session, and whether each certainly has."""
        for r in self.requests:
            was_acknowledged = r.status == "acknowledged"
            is_own = r in lineage.requests
            if lineage.maker is not None and not self.may_be_before(lineage.maker, r):
                continue
            if r.kind in REPLACES and is_own:
                yield r, was_acknowledged
            elif r.kind == "visit after max_age" and is_own and r.loaded is None:
                yield r, False  # a session that is over by its age may be ended, or stay
            elif r.kind == "end_session" and r.target in lineage.ids and r.result is not False:
                yield r, was_acknowledged
            elif r.kind == "end_sessions" or (
                r.kind == "end_sessions(keep)" and r.loaded is not None and not is_own
            ):
                owners = self.owners(lineage, r)
                was_there = lineage.maker is None or lineage.maker.name in r.after
                if r.owner is not None and r.owner in owners:
                    yield r, was_acknowledged and was_there and len(owners) == 1

    def may_be_over(self, lineage: Lineage, reader: Request | None = None) -> bool:
        """Tell whether a session may have ended before a request; None is the end."""
        if self.expiring & {*lineage.ids} or self._may_be_excess(lineage):
            return True
        return any(self.may_be_before(r, reader) for r, _ in self.enders(lineage))

    def is_over(self, lineage: Lineage, reader: Request | None = None) -> bool:
        """Tell whether a session certainly has ended before a request; None is the end."""
        return any(
            is_certain and (reader is None or r.name in reader.after)
            for r, is_certain in self.enders(lineage)
        )

    def may_have_moved(self, lineage: Lineage, i: str | None, reader: Request | None) -> bool:
        """Tell whether a session may have got another id than this before a request."""
        return any(
            r.kind in MOVES and r.sent == i and self.may_be_saved(r)
            for r in lineage.requests
            if self.may_be_before(r, reader)
        )

    def of_owner(self, owner: str | None) -> list[Lineage]:
        """Return the sessions that may be an owner's at the end."""
        return [lineage for lineage in self.lineages if owner in self.owners(lineage)]

    def _may_be_excess(self, lineage: Lineage) -> bool:
        """Tell whether a session may have been ended for later logins."""
        if self.most is None:
            return False
        own = self._logins(lineage)

        def is_later(login: Request) -> bool:
            return not any(login.name in mine.after for mine in own)

        failed = [r for r in self.requests if r.kind == "login" and r.status == "failed"]
        for owner in self.owners(lineage) - {None}:
            others = (self._logins(other) for other in self.of_owner(owner) if other is not lineage)
            later = sum(any(map(is_later, logins)) for logins in others)
            if later + sum(r.owner == owner and is_later(r) for r in failed) >= self.most:
                return True
        return False

    def _logins(self, lineage: Lineage) -> list[Request]:
        """Return the requests that may have logged a session in."""
        makers = [] if lineage.maker is None else [lineage.maker]
        return [
            r
            for r in (*makers, *lineage.requests)
            if r.kind == "login" and (r is lineage.maker or r.loaded is not None)
        ]


def item_of(name: str | None) -> Callable[[Content], Any]:
    return lambda content: content.owner if name is None else content.items.get(name)
