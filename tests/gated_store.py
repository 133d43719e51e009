"""Processes that use a store in which a test can hold or lose a call, and apply the call late."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

from aiohttp import web

from aiohttp_session import Session, get_session
from aiohttp_session.saving import has_no_session
from aiohttp_session.server_storage import ServerStorage
from aiohttp_session.stores import Store
from tests.contract import Browser

if TYPE_CHECKING:
    from typing_extensions import Self

Act = Callable[[Session], object]


class Gate:
    """What happens to one call of a store."""

    def __init__(self, verb: str | None, skipped: int, *, is_applied: bool, is_lost: bool) -> None:
        self.verb = verb
        self.skipped = skipped
        self.is_applied = is_applied
        self.is_lost = is_lost
        self.is_reached = asyncio.Event()
        self.is_open = asyncio.Event()
        self.task: asyncio.Task[Any] | None = None

    async def reached(self, request: asyncio.Future[Any]) -> bool:
        """Wait until the call is made; return False if the request ends without it."""
        waiting = asyncio.ensure_future(self.is_reached.wait())
        await asyncio.wait({waiting, request}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        return self.is_reached.is_set()

    async def open(self) -> None:
        """Let the call be applied, and answered if its caller still waits."""
        self.is_open.set()
        if self.task is not None:
            await asyncio.wait({self.task})

    async def run(self, call: Callable[[], Awaitable[Any]]) -> Any:
        if self.is_applied:
            result = await call()
            self.is_reached.set()
            await self.is_open.wait()
            return result
        self.is_reached.set()
        await self.is_open.wait()
        return await call()


class Gated(Store):
    """A store in which a test can hold or lose a call. The store applies the call later."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.timeout = store.timeout
        self._gate: Gate | None = None
        self.created: list[str] = []
        """The keys of the records that were created."""

    def hold(self, verb: str | None = None, *, skipped: int = 0, is_applied: bool = False) -> Gate:
        """Hold a call to come.

        :param verb: of the call; None for any.
        :param skipped: how many such calls pass before.
        :param is_applied: whether the reply is held, and not the call.
        """
        self._gate = Gate(verb, skipped, is_applied=is_applied, is_lost=False)
        return self._gate

    def lose(self, verb: str) -> Gate:
        """Have the next call fail with TimeoutError, and apply it only when the gate is opened."""
        self._gate = Gate(verb, 0, is_applied=False, is_lost=True)
        return self._gate

    async def read(self, key: str) -> bytes | None:
        record: bytes | None = await self._pass("read", lambda: self._store.read(key))
        return record

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        self.created.append(key)
        await self._pass("create", lambda: self._store.create(key, payload, ttl))

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        is_done: bool = await self._pass(
            "swap", lambda: self._store.swap(key, expected, payload, ttl)
        )
        return is_done

    async def delete(self, key: str) -> None:
        await self._pass("delete", lambda: self._store.delete(key))

    async def finish(self) -> None:
        await self._store.finish()

    async def _pass(self, verb: str, call: Callable[[], Awaitable[Any]]) -> Any:
        gate = self._gate
        if gate is None or gate.verb not in {None, verb}:
            return await call()
        if gate.skipped:
            gate.skipped -= 1
            return await call()
        self._gate = None
        gate.task = asyncio.ensure_future(gate.run(call))
        if gate.is_lost:
            raise TimeoutError("the store did not answer")
        return await asyncio.shield(gate.task)


class Process:
    """A process: a storage with a client of its own."""

    def __init__(self, storage: ServerStorage) -> None:
        self.storage = storage
        storage.store = self.store = Gated(storage.store)

    def browser(self, cookie: str | None = None) -> Browser:
        return Browser(self.storage, cookie)

    async def load(self, cookie: str) -> Session:
        return await self.browser(cookie).load()

    def begin(self, cookie: str | None, act: Act) -> asyncio.Task[Any]:
        """Begin a request; its result is the cookie that the response sets, None if none."""
        return asyncio.ensure_future(self.do(cookie, act))

    async def do(self, cookie: str | None, act: Act) -> str | None:
        _, response = await self.browser(cookie).do(act)
        return self.cookie_in(response)

    def cookie_in(self, response: web.StreamResponse) -> str | None:
        """Return the cookie that a response sets; None if it sets none."""
        morsel = response.cookies.get(self.storage.cookie_name)
        return None if morsel is None else morsel.value

    async def make(self, owner: str | None = None, **items: Any) -> str:
        """Return the cookie of a new session."""

        def fill(session: Session) -> None:
            session.update(items)
            session.owner = owner

        cookie = await self.do(None, fill)
        assert cookie is not None
        return cookie

    async def live(self, *cookies: str | None) -> list[str]:
        """Return the cookies that lead to a session."""
        return [one for one in cookies if one is not None and not (await self.load(one)).empty]


class Visit:
    """A request that has loaded its session, and may save the session much later."""

    def __init__(self, process: Process, cookie: str) -> None:
        self._process = process
        self._act: Act = lambda session: None
        self._has_loaded, self._goes_on = asyncio.Event(), asyncio.Event()
        self._task = asyncio.ensure_future(self._run(cookie))

    @classmethod
    async def begin(cls, process: Process, cookie: str) -> Self:
        visit = cls(process, cookie)
        await visit._has_loaded.wait()
        return visit

    def go_on(self, act: Act) -> asyncio.Task[str | None]:
        """Let the handler act; the task returns the cookie that the response sets."""
        self._act = act
        self._goes_on.set()
        return self._task

    async def _run(self, cookie: str) -> str | None:
        async def handler(request: web.Request) -> web.Response:
            session = await get_session(request)
            self._has_loaded.set()
            await self._goes_on.wait()
            self._act(session)
            return web.Response()

        response = await self._process.browser(cookie).visit(handler)
        return self._process.cookie_in(response)


def moments() -> Iterator[dict[str, Any]]:
    """Yield how to hold each call of a request in turn, before it is applied and afterwards.

    The caller repeats the request until the request ends without being held.
    """
    for skipped in itertools.count():
        for is_applied in (False, True):
            yield {"skipped": skipped, "is_applied": is_applied}


async def records(process: Process, *others: Process) -> list[str]:
    """Return the ids under which processes have created records that still are sessions."""
    keys = [key for one in (process, *others) for key in one.store.created]
    found = [(key, await process.store.read(key)) for key in keys]
    return [
        key.partition("SESSION_")[2]
        for key, record in found
        if record is not None and not has_no_session(record)
    ]
