"""Sessions in OpenTelemetry: spans, durations and outcomes, of any storage.

Needs the extra ``otel``: ``pip install aiohttp-session[otel]``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from aiohttp import web

try:
    from opentelemetry import context as contexts
    from opentelemetry import trace
    from opentelemetry.metrics import (
        CallbackOptions,
        MeterProvider,
        NoOpCounter,
        NoOpHistogram,
        Observation,
        get_meter,
    )
    from opentelemetry.trace import (
        INVALID_SPAN,
        TracerProvider,
        get_tracer,
        set_span_in_context,
    )
except ImportError as _error:
    raise ImportError(
        "Please install opentelemetry-api: pip install aiohttp-session[otel]"
    ) from _error

from ._core import Session
from .saving import ConflictError
from .server_storage import ServerStorage
from .storage import AbstractStorage
from .stores import Store
from .stores.outage import is_outage
from .stores.telemetry import TelemetryStore, fail

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ("instrument", "uninstrument")

_NAME = "aiohttp_session"
# Seconds, as the semantic conventions advise for database and HTTP operations.
_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)


class _Instruments(NamedTuple):
    """What is reported to; None in the place of what reports to nobody."""

    tracer: trace.Tracer | None
    loads: Any
    saves: Any
    outcomes: Any


_instrumented: WeakKeyDictionary[AbstractStorage, list[str]] = WeakKeyDictionary()


def instrument(
    storage: AbstractStorage,
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """Report what a storage does.

    - The spans ``session.load`` and ``session.save``, with the attribute ``session.outcome``:
      a load ends as ``loaded``, ``new``, ``expired``, ``damaged`` or ``missing``; a save as
      ``saved``, ``moved`` (to a new id), ``deleted``, ``dropped`` (since another request deleted
      the session) or ``conflict``; both as ``unavailable`` if the store was.
    - Under them a span for each operation on the store, after the semantic conventions for
      database clients.
    - The histograms ``aiohttp_session.load.duration``, ``aiohttp_session.save.duration`` and
      ``db.client.operation.duration``, in seconds; the counter ``aiohttp_session.outcomes``; the
      gauge ``aiohttp_session.store.down`` (0 or 1); and, with a near cache, the counters
      ``aiohttp_session.near_cache.hits`` and ``.misses``.

    None of them ever contains an id, a key, a cookie or the content of a session.

    :param tracer_provider: by default the global one.
    :param meter_provider: by default the global one.
    :raises ValueError: if the storage is instrumented already.
    """
    if storage in _instrumented:
        raise ValueError("The storage is instrumented already; see uninstrument")
    tracer = _unless(get_tracer(_NAME, tracer_provider=tracer_provider), trace.NoOpTracer)
    meter = get_meter(_NAME, meter_provider=meter_provider)

    def histogram(name: str, description: str) -> Any:
        made = meter.create_histogram(
            name, "s", description, explicit_bucket_boundaries_advisory=_BUCKETS
        )
        return _unless(made, NoOpHistogram)

    counter = meter.create_counter(
        "aiohttp_session.outcomes", "{session}", "Loads and saves of sessions, by outcome"
    )
    tools = _Instruments(
        tracer,
        histogram("aiohttp_session.load.duration", "Duration of the loading of a session"),
        histogram("aiohttp_session.save.duration", "Duration of the saving of a session"),
        _unless(counter, NoOpCounter),
    )
    wrapped: dict[str, object] = {
        "load_session": _wrap_load(storage, storage.load_session, tools),
        "save_session": _wrap_save(storage, storage.save_session, tools),
    }
    _instrumented[storage] = [*wrapped]
    for name, method in wrapped.items():
        setattr(storage, name, method)
    if isinstance(storage, ServerStorage):
        durations = histogram("db.client.operation.duration", "Duration of an operation on a store")
        if tracer is not None or durations is not None:
            _insert(storage, tracer, durations)
        _observe(storage, meter)


def uninstrument(storage: AbstractStorage) -> None:
    """Undo `instrument`.

    :raises ValueError: if the storage is not instrumented.
    """
    names = _instrumented.pop(storage, None)
    if names is None:
        raise ValueError("The storage is not instrumented")
    for name in names:
        delattr(storage, name)
    if isinstance(storage, ServerStorage):
        for holder, store in _layers(storage):
            if isinstance(store, TelemetryStore):
                holder.store = store.store


def _unless(instrument: Any, kind: type[Any]) -> Any:
    """Return None in the place of what does nothing, as where no SDK is wanted."""
    return None if isinstance(instrument, kind) else instrument


def _layers(storage: ServerStorage) -> Iterator[tuple[Any, Store]]:
    """List the stores in front of each other, each with what holds it, from the outside in."""
    holder: Any = storage
    while hasattr(holder, "store"):
        yield holder, holder.store
        holder = holder.store


def _insert(storage: ServerStorage, tracer: trace.Tracer | None, durations: Any) -> None:
    # Behind a near cache: what that answers is no operation on the store.
    holder, store = next(
        layer for layer in _layers(storage) if not hasattr(layer[1], "near_cache_info")
    )
    holder.store = TelemetryStore(store, tracer, durations)


def _observe(storage: ServerStorage, meter: Any) -> None:
    def down(options: CallbackOptions) -> Iterator[Observation]:
        is_down = _ask(storage, "is_down")
        if is_down is not None:
            yield Observation(int(is_down))

    def counted(name: str) -> Callable[[CallbackOptions], Iterator[Observation]]:
        def observe(options: CallbackOptions) -> Iterator[Observation]:
            info = _ask(storage, "near_cache_info")
            if info is not None:
                yield Observation(getattr(info(), name))

        return observe

    meter.create_observable_gauge(
        "aiohttp_session.store.down", [down], "1", "Whether the store is taken for down"
    )
    for name in ("hits", "misses"):
        meter.create_observable_counter(
            f"aiohttp_session.near_cache.{name}", [counted(name)], "{read}", f"Near cache {name}"
        )


def _ask(storage: ServerStorage, attribute: str) -> Any:
    """Return what one of the stores in front of each other has; None if it isn't watched."""
    if storage in _instrumented:
        for _, store in _layers(storage):
            if hasattr(store, attribute):
                return getattr(store, attribute)
    return None


def _wrap_load(
    storage: AbstractStorage,
    load: Callable[[web.Request], Awaitable[Session]],
    tools: _Instruments,
) -> Callable[[web.Request], Awaitable[Session]]:
    async def load_session(request: web.Request) -> Session:
        with _Reporting("session.load", tools.loads, tools) as reporting:
            session = await load(request)
            reporting.outcome = _load_outcome(storage, request, session)
        return session

    return load_session


def _wrap_save(
    storage: AbstractStorage,
    save: Callable[[web.Request, web.StreamResponse, Session], Awaitable[None]],
    tools: _Instruments,
) -> Callable[[web.Request, web.StreamResponse, Session], Awaitable[None]]:
    async def save_session(
        request: web.Request, response: web.StreamResponse, session: Session
    ) -> None:
        before = session.identity
        with _Reporting("session.save", tools.saves, tools) as reporting:
            await save(request, response, session)
            if session.empty:
                reporting.outcome = "deleted"
            elif session._changed and storage.cookie_name not in response.cookies:
                reporting.outcome = "dropped"
            elif before is not None and session.identity != before:
                reporting.outcome = "moved"

    return save_session


def _load_outcome(storage: AbstractStorage, request: web.Request, session: Session) -> str:
    if not session.new:
        if session._renew:
            return "expired"
        return "damaged" if session.empty else "loaded"
    if storage.load_cookie(request) is None:
        return "new"
    return "missing" if isinstance(storage, ServerStorage) else "damaged"


class _Reporting:
    """Reports on what is inside: a span, its duration and its outcome."""

    __slots__ = ("_duration", "_name", "_span", "_start", "_token", "_tools", "outcome")

    def __init__(self, name: str, duration: Any, tools: _Instruments) -> None:
        self._name = name
        self._duration = duration
        self._tools = tools
        self.outcome = "saved"

    def __enter__(self) -> Self:
        tracer = self._tools.tracer
        self._span = INVALID_SPAN if tracer is None else tracer.start_span(self._name)
        # Nobody needs to know of a parent that is not recorded.
        is_recorded = tracer is not None and self._span.is_recording()
        self._token = contexts.attach(set_span_in_context(self._span)) if is_recorded else None
        self._start = perf_counter()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        seconds = perf_counter() - self._start
        attributes: dict[str, str] = {}
        if error is not None:
            self.outcome = _failure(error)
            fail(self._span, attributes, error)
        attributes["session.outcome"] = self.outcome
        if self._duration is not None:
            self._duration.record(seconds, attributes)
        if self._tools.outcomes is not None:
            self._tools.outcomes.add(1, attributes)
        if self._token is not None:
            contexts.detach(self._token)
        if self._span is not INVALID_SPAN:
            self._span.set_attribute("session.outcome", self.outcome)
            self._span.end()


def _failure(error: BaseException) -> str:
    if isinstance(error, ConflictError):
        return "conflict"
    return "unavailable" if is_outage(error) else "failed"
