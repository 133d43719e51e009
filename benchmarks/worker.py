"""A contender's process: runs cases on command, one JSON object a line."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import json
import logging
import sys
import time
import timeit
import tracemalloc
import uuid
import warnings
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any, TextIO

from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict, CIMultiDictProxy

import aiohttp_session

from .cases import (
    IS_REFERENCE,
    MERGING,
    OPERATIONS,
    SERVERS,
    STEPS,
    STORAGES,
    Case,
    Meeting,
    Stores,
    bare,
    cookie_header,
    meet,
    session_data,
    step_names,
)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_SEEDS = 128  # sessions that requests take turns with, at least;
_SEEDED = 512 * 1024  # bytes of them, at the most, or memcached would drop some


class WrongAnswerError(Exception):
    """A case that does not do what it claims to do."""


class App:
    """An application without the network: requests go straight to its middlewares."""

    def __init__(self, storage: aiohttp_session.AbstractStorage | None) -> None:
        app = web.Application()
        if storage is not None:
            aiohttp_session.setup(app, storage)
        app.freeze()
        self._middlewares = list(app.middlewares)
        self._on_prepare = app.on_response_prepare
        self._loop = asyncio.get_running_loop()
        self._message = make_mocked_request("GET", "/", loop=self._loop)._message
        transport = SimpleNamespace(get_extra_info=lambda name, default=None: default)
        self._protocol: Any = SimpleNamespace(
            ssl_context=None, peername=None, sockname=None, transport=transport
        )

    def requests(
        self, session_cookies: list[str | None], cookies: int = 4, meeting: Meeting | None = None
    ) -> list[web.Request]:
        """Make requests that carry sessions' cookies among others, so many in all."""
        messages = {
            cookie: self._message._replace(
                headers=CIMultiDictProxy(CIMultiDict(Cookie=cookie_header(cookie, cookies)))
            )
            for cookie in set(session_cookies)
        }
        rest: tuple[Any, ...] = (None, self._protocol, None, None, self._loop)
        requests = [web.Request(messages[cookie], *rest) for cookie in session_cookies]
        for request in requests if meeting else ():
            request["meeting"] = meeting
        return requests

    async def run(self, handler: _Handler, requests: list[web.Request], at_once: int = 1) -> float:
        """Answer requests, so many at a time, and return the seconds of CPU time taken.

        The list is emptied on the way: a server doesn't keep requests either, and memory that was
        used a moment ago is the quickest.
        """
        chained = self._chain(handler)
        tasks = [self._answer_all(chained, requests[i::at_once][::-1]) for i in range(at_once)]
        requests.clear()
        start = time.process_time()
        await asyncio.gather(*tasks)
        return time.process_time() - start

    async def answer(self, handler: _Handler, request: web.Request) -> web.StreamResponse:
        """Answer a request."""
        return await self._answer(self._chain(handler), request)

    def _chain(self, handler: _Handler) -> _Handler:
        for middleware in reversed(self._middlewares):
            handler = functools.partial(middleware, handler=handler)
        return handler

    async def _answer_all(self, handler: _Handler, requests: list[web.Request]) -> None:
        while requests:
            await self._answer(handler, requests.pop())

    async def _answer(self, handler: _Handler, request: web.Request) -> web.StreamResponse:
        # What aiohttp does with every response, as far as a session can have to do with it.
        response = await handler(request)
        if self._on_prepare:
            await self._on_prepare.send(request, response)
        if response._cookies:
            for cookie in response._cookies.values():
                response.headers.add("Set-Cookie", cookie.output(header="")[1:])
        return response


class RequestCase:
    """A case of whole requests."""

    def __init__(self, case: Case, stores: Stores) -> None:
        self._case = case
        self._operation = OPERATIONS[case.operation]
        self._storage = STORAGES[case.storage](stores)
        self._app = App(self._storage)
        self._seeds: Iterator[str] = iter(())
        self._seconds = 0.0
        self.count = 0
        """The requests that were timed the last time."""
        self.stored_bytes = 0
        """The memory that `Case.stored` sessions take."""

    async def check(self) -> None:
        """Check every session before and after the operation, and make the case ready."""
        case = self._case
        if case.stored:
            await self._fill(case.stored)
        await (self._check_one_session() if case.is_one_session else self._check_sessions())
        seeds = min(_SEEDS, _SEEDED // case.size)
        self._seeds = itertools.cycle(await self._seed(max(seeds, case.at_once)))
        await self.time(0.0)

    async def _check_sessions(self) -> None:
        """Check that every session is the one that it should be."""
        case, operation = self._case, self._operation
        before = await self._seed(case.at_once)
        responses = await self._answers(before)
        for user, (cookie, response) in enumerate(zip(before, responses, strict=True)):
            expected = session_data(case.size, user)
            answer = operation.answer(expected)
            if not (isinstance(response, web.Response) and response.text == answer):
                raise WrongAnswerError(f"{case.name}: the handler did not answer {answer!r}")
            operation.effect(expected)
            found = await self._load(kept_cookie(cookie, response))
            if found != expected:
                raise WrongAnswerError(f"{case.name}: expected {expected!r}, found {found!r}")
            if case.operation in {"untouched", "read"} and "Set-Cookie" in response.headers:
                raise WrongAnswerError(f"{case.name}: a cookie was set")
            if case.operation == "logout" and case.storage in {"memory", *SERVERS}:
                found = await self._load(cookie)
                if found:
                    raise WrongAnswerError(f"{case.name}: the record is still there: {found!r}")

    async def _check_one_session(self) -> None:
        """Check that a session keeps the items of all its requests, or else those of the last."""
        case = self._case
        [cookie] = await self._seed(1)
        await self._answers([cookie] * case.at_once)
        found = await self._load(cookie)
        items = [name for name in found if name.startswith("item")]
        rest = {name: value for name, value in found.items() if name not in items}
        kept = case.at_once if case.storage in MERGING and not IS_REFERENCE else 1
        if len(items) != kept or rest != session_data(case.size):
            raise WrongAnswerError(f"{case.name}: expected {kept} items, found {found!r}")

    async def _answers(self, cookies: list[str]) -> list[web.StreamResponse]:
        """Answer a request with each cookie, all at once."""
        handler = self._operation.handler
        requests = self._requests(cookies)
        return await asyncio.gather(*(self._app.answer(handler, request) for request in requests))

    async def time(self, seconds: float) -> float:
        """Return the microseconds of CPU time of a request, of as many as fit into the seconds."""
        at_once = self._case.at_once
        count = max(at_once, 8, min(5000, int(seconds / self._seconds) if seconds else 0))
        count -= count % at_once
        if self._case.operation == "logout":
            cookies = await self._seed(count)
        elif self._case.is_one_session:
            visitors = itertools.islice(self._seeds, count // at_once)
            cookies = [cookie for cookie in visitors for _ in range(at_once)]
        else:
            cookies = list(itertools.islice(self._seeds, count))
        self.count = count
        requests = self._requests(cookies)
        self._seconds = await self._app.run(self._operation.handler, requests, at_once) / count
        return self._seconds * 1e6

    def _requests(self, cookies: list[str]) -> list[web.Request]:
        if self._case.operation == "new session":
            return self._app.requests([None] * len(cookies), self._case.cookies)
        meeting = Meeting(self._case.at_once) if self._case.is_one_session else None
        return self._app.requests([*cookies], self._case.cookies, meeting)

    async def _seed(self, count: int) -> list[str]:
        """Store sessions of different users, and return their cookies."""
        return [await self._seed_user(user) for user in range(count)]

    async def _seed_user(self, user: int) -> str:
        async def seed(request: web.Request) -> web.Response:
            session = await aiohttp_session.new_session(request)
            session.update(session_data(self._case.size, user))
            return web.Response()

        [request] = self._app.requests([None])
        cookie = kept_cookie(None, await self._app.answer(seed, request))
        if cookie is None:
            raise WrongAnswerError(f"{self._case.name}: a new session got no cookie")
        return cookie

    async def _fill(self, count: int) -> None:
        """Store sessions that nobody asks for."""
        assert isinstance(self._storage, aiohttp_session.ServerStorage)
        prefix = self._storage.cookie_name
        data = {"created": int(time.time()), "session": session_data(self._case.size)}
        tracemalloc.start()
        for _ in range(count):
            payload = json.dumps(data).encode("utf-8")
            await self._storage.store.create(f"{prefix}_{uuid.uuid4().hex}", payload, None)
        self.stored_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    async def _load(self, cookie: str | None) -> dict[str, Any]:
        found: dict[str, Any] = {}

        async def load(request: web.Request) -> web.Response:
            found.update(await aiohttp_session.get_session(request))
            return web.Response()

        [request] = self._app.requests([cookie])
        await self._app.answer(load, request)
        return found


def kept_cookie(before: str | None, response: web.StreamResponse) -> str | None:
    """Return the session's cookie that a browser has after a response, as it sends it."""
    line = response.headers.get("Set-Cookie")
    if line is None:
        return before
    return None if "Max-Age=0" in line else line.partition("; ")[0]


class StepCase:
    """A case of one step."""

    def __init__(self, case: Case, stores: Stores) -> None:
        self._case = case
        self._step = STEPS[case.operation]
        self._app = App(None)
        self._names = step_names()
        self._timer = timeit.Timer(
            self._step.statement, timer=time.process_time, globals=self._names
        )
        self._bare = timeit.Timer(self._step.bare, timer=time.process_time, globals=self._names)
        self.count = 500
        """How often the statement is run, at a time."""
        self._least_bare = float("inf")

    async def check(self) -> None:
        """Check that the step does what it is to do."""
        self._make_requests(1)
        names = dict(self._names)
        exec(self._step.statement, names)
        if not eval(self._step.holds, names):
            raise WrongAnswerError(f"{self._case.name}: {self._step.holds} does not hold")
        await self.time(0.0)

    async def time(self, seconds: float) -> float:
        """Return the microseconds of CPU time of the statement."""
        count = self.count
        self._make_requests(count)
        bare = self._bare.timeit(count) / count
        self._make_requests(count)
        taken = self._timer.timeit(count) / count
        self.count = max(100, min(5000, int(seconds / taken)))
        self._least_bare = min(self._least_bare, bare)
        return (taken - self._least_bare) * 1e6

    def _make_requests(self, count: int) -> None:
        if "requests" in self._step.statement:
            cookies = int(self._case.operation.rpartition(" ")[2])
            requests = self._app.requests(["AIOHTTP_SESSION=c3d4"] * count, cookies)
            self._names["requests"] = {cookies: iter(requests)}


class Worker:
    """Keeps the cases that were checked, and times them."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._cases: dict[Case, RequestCase | StepCase] = {}
        self._bare: App | None = None

    async def describe(self) -> dict[str, str]:
        """Say which package this is."""
        return describe()

    async def memory(self, **case: Any) -> int:
        """Return the bytes that the stored sessions of a case take."""
        made = self._cases[Case(**case)]
        assert isinstance(made, RequestCase)
        return made.stored_bytes

    async def check(self, **case: Any) -> None:
        """Check a case, and make it ready to be timed."""
        made = Case(**case)
        kind = StepCase if made.storage == "step" else RequestCase
        self._cases[made] = kind(made, self._stores)
        await self._cases[made].check()

    async def time(self, seconds: float, **case: Any) -> tuple[float, float, int]:
        """Return the microseconds of a request or step, and of a bare one just before and after.

        The last number says how many requests were timed.
        """
        made = self._cases[Case(**case)]
        before = await self._pace()
        taken = await made.time(seconds)
        return taken, (before + await self._pace()) / 2, made.count

    async def _pace(self) -> float:
        return await self._run_bare(256, 1)

    async def bare(self, seconds: float, at_once: int, one_session: bool) -> float:
        """Return the microseconds of a request without sessions."""
        gc.collect()
        count = max(at_once, 64, int(seconds / 5e-6))
        return await self._run_bare(count, at_once, one_session=one_session)

    async def _run_bare(self, count: int, at_once: int, *, one_session: bool = False) -> float:
        if self._bare is None:
            self._bare = App(None)
        count -= count % at_once
        cookies: list[str | None] = ["AIOHTTP_SESSION=c3d4"] * count
        meeting = Meeting(at_once) if one_session else None
        requests = self._bare.requests(cookies, meeting=meeting)
        handler = meet if one_session else bare
        return await self._bare.run(handler, requests, at_once) / count * 1e6


def describe() -> dict[str, str]:
    """Say which package this is."""
    return {
        "version": aiohttp_session.__version__,
        "implementation": getattr(aiohttp_session, "IMPLEMENTATION", "reference"),
        "file": str(aiohttp_session.__file__),
    }


def main() -> None:
    """Serve commands from standard input until it ends."""
    warnings.simplefilter("ignore")  # aiohttp's advice about keys of requests
    logging.disable()
    gc.disable()  # collections are made between measurements
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    worker = Worker(Stores(*json.loads(sys.argv[-1])))
    _serve(worker, loop, sys.stdin, sys.stdout)


def _serve(
    worker: Worker, loop: asyncio.AbstractEventLoop, commands: TextIO, answers: TextIO
) -> None:
    for line in commands:
        command, arguments = json.loads(line)
        try:
            result = loop.run_until_complete(getattr(worker, command)(**arguments))
            answer = {"result": result}
        except Exception as error:  # noqa: BLE001 - the parent process reports it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
