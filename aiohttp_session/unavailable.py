"""Requests whose session's store can't be reached: answered 503 instead of 500."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.typedefs import Middleware

from .log import log
from .stores.outage import is_outage

_RETRY_AFTER = "1"  # seconds: a store that is down is asked once a second
_NOTED = "_aiohttp_session_failed"
_ANSWERS = "answers_unavailable"


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Note errors that say that the store can't be reached, as `note` does."""
    try:
        yield
    except Exception as error:
        note(error)
        raise


def note(error: BaseException) -> None:
    """Remember that an error is a session's, and not one of the handler's own."""
    if is_outage(error):
        # On the error, not in the request: middlewares may hand on another one.
        with contextlib.suppress(AttributeError):
            setattr(error, _NOTED, True)


def answers_in(app: web.Application) -> bool:
    """Tell whether a middleware of the application answers these errors already."""
    return any(getattr(middleware, _ANSWERS, False) for middleware in app.middlewares)


def mark(middleware: object, *, answers: bool) -> None:
    """Mark a middleware as one that answers these errors, or doesn't."""
    setattr(middleware, _ANSWERS, answers)


def guard(app: web.Application) -> Middleware:
    """Make a middleware that does nothing else."""

    @web.middleware
    async def middleware(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as error:
            answer(error, request, app)
            raise

    mark(middleware, answers=True)
    return middleware


class _Unavailable(web.HTTPServiceUnavailable):
    """An answer that is given up when it was sent, and not by the garbage collector.

    A frame of aiohttp's holds it, and the tracebacks of it and of its cause lead to that frame.
    """

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        try:
            return await super().prepare(request)
        finally:
            self.__traceback__ = self.__cause__ = self.__context__ = None


def answer(error: BaseException, request: web.Request, app: web.Application | None) -> None:
    """Raise HTTPServiceUnavailable in place of an error that was noted.

    :param app: whose outermost middleware has caught it; None for any other. An application around
        it that has sessions as well has middlewares that may want the error itself, and answers
        it after them.
    """
    if app is None or not hasattr(error, _NOTED) or request.writer.output_size != 0:
        return
    apps = request.match_info.apps
    if any(answers_in(outer) for outer in apps[: apps.index(app)]):
        return
    log.debug("A session could not be loaded or saved: answered 503", exc_info=error)
    response = _Unavailable(headers={hdrs.RETRY_AFTER: _RETRY_AFTER})
    if getattr(request.writer, "chunked", False):
        # Set up for a stream that could not be started: aiohttp goes on as if it had been.
        response.enable_chunked_encoding()
        response.force_close()
    raise response from error
