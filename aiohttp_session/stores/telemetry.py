"""A store in front of a store that reports what each operation takes, to OpenTelemetry."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from time import perf_counter
from typing import Any, TypeVar

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.metrics import Histogram
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Status, StatusCode, Tracer

from . import Store

_T = TypeVar("_T")
# What the operations are on the wire. Others have the store's own names.
_COMMANDS: Mapping[str, Mapping[str, str]] = {
    "redis": {"read": "GET", "create": "SET", "swap": "EVALSHA", "delete": "DEL"},
    "memcached": {"read": "get", "create": "set", "swap": "cas"},
}


class TelemetryStore(Store):
    """Report each operation on a store: a span, and its duration in seconds.

    The attributes are those of the semantic conventions for database clients. There is never a
    key or a record among them.

    :param store: the one that does the operations.
    :param tracer: None for no spans.
    :param durations: None for none of them.
    """

    def __init__(self, store: Store, tracer: Tracer | None, durations: Histogram | None) -> None:
        self.store = store
        self._tracer = tracer
        self._durations = durations
        self._attributes = store.describe()
        system = str(self._attributes["db.system.name"])
        self._commands = _COMMANDS.get(system, {})
        self._batch: list[Span] = []  # begun in this turn of the event loop

    @property
    def timeout(self) -> float | None:  # type: ignore[override]
        """Seconds after which an operation fails."""
        return self.store.timeout

    @property
    def reads_locally(self) -> bool:  # type: ignore[override]
        """Whether reads may be answered in this process."""
        return self.store.reads_locally

    def describe(self) -> Mapping[str, str | int]:
        """Return what the store behind it says of itself."""
        return self._attributes

    async def read(self, key: str) -> bytes | None:
        """Return the record under a key, or None if there is none."""
        return await self._report("read", self.store.read(key))

    async def read_latest(self, key: str) -> bytes | None:
        """Return the record under a key as it is now."""
        return await self._report("read", self.store.read_latest(key))

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        """Store a record under a new key."""
        await self._report("create", self.store.create(key, payload, ttl))

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        """Replace a record if it still is the expected one; return whether it was."""
        return await self._report("swap", self.store.swap(key, expected, payload, ttl))

    async def delete(self, key: str) -> None:
        """Delete a record, if there is one."""
        await self._report("delete", self.store.delete(key))

    async def finish(self) -> None:
        """Wait for what is under way."""
        await self.store.finish()

    async def _report(self, operation: str, doing: Awaitable[_T]) -> _T:
        name = self._commands.get(operation, operation)
        span: Span = INVALID_SPAN
        if self._tracer is not None:
            span = self._tracer.start_span(name, kind=SpanKind.CLIENT)
        attributes: dict[str, str | int] = {**self._attributes, "db.operation.name": name}
        token = None
        if span.is_recording():
            span.set_attributes(attributes)
            token = contexts.attach(trace.set_span_in_context(span))
            self._note(span)
        start = perf_counter()
        try:
            return await doing
        except BaseException as error:
            fail(span, attributes, error)
            raise
        finally:
            if self._durations is not None:
                self._durations.record(perf_counter() - start, attributes)
            if token is not None:
                contexts.detach(token)
            span.end()

    def _note(self, span: Span) -> None:
        """Count the operations of one turn of the event loop, which share a round trip."""
        if not self._batch:
            asyncio.get_running_loop().call_soon(self._end_turn)
        self._batch.append(span)

    def _end_turn(self) -> None:
        batch, self._batch = self._batch, []
        if len(batch) > 1:
            for span in batch:
                span.set_attribute("db.operation.batch.size", len(batch))


def fail(span: Span, attributes: dict[str, Any], error: BaseException) -> None:
    """Say how something failed: by the kind of the error, since its text may hold anything."""
    kind = type(error)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    attributes["error.type"] = name
    span.set_attribute("error.type", name)
    span.set_status(Status(StatusCode.ERROR))
