"""Helpers for testing applications: a session without logging in first.

Give a test client any session, and look into the one it has, whatever the storage. With
pytest-aiohttp::

    import pytest
    from aiohttp_session.test_utils import read_session, set_session

    @pytest.fixture
    async def ann(aiohttp_client):
        client = await aiohttp_client(make_app())  # which calls aiohttp_session.setup
        await set_session(client, {"user": "ann"})
        return client

    async def test_she_fills_her_cart(ann):
        await ann.post("/cart", data={"add": "tea"})
        assert await read_session(ann.app, ann) == {"user": "ann", "cart": ["tea"]}

    async def test_she_logs_out(ann):
        response = await ann.post("/logout")
        assert (await read_session(ann.app, response)).empty

Authors of stores inherit `StoreContract`, which contains the tests that every store must pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from http.cookies import BaseCookie, SimpleCookie
from typing import Any, TypeAlias

from aiohttp import ClientResponse, hdrs, web
from aiohttp.test_utils import TestClient, make_mocked_request

from ._contract_concurrency import Concurrency
from ._contract_expiry import Expiry
from ._contract_verbs import Verbs
from ._core import Session
from .middleware import installed
from .storage import AbstractStorage

__all__ = ("StoreContract", "read_session", "session_cookies", "set_session")

Sessions: TypeAlias = "AbstractStorage | web.Application"
Source: TypeAlias = "TestClient[Any, Any] | ClientResponse | web.StreamResponse | Mapping[str, str]"


class StoreContract(Verbs, Expiry, Concurrency):
    """Test that a store keeps the contract of `Store`, including its atomicity and its TTLs.

    Inherit this class in a test module, and implement `open_store`; pytest collects the tests::

        from aiohttp_session.test_utils import StoreContract

        class TestMyStore(StoreContract):
            async def open_store(self):
                async with Client("127.0.0.1") as client:
                    yield MyStore(client)

    Each test runs an event loop of its own, so the tests require no plugin. They pass beside
    pytest-asyncio in its auto mode, which most projects use, and in its strict mode. For the same
    reason, `open_store` must open the client: one that an asynchronous fixture has opened belongs
    to another event loop. A synchronous fixture can start a server and set its address.

    A test fails with AssertionError, and the message states what was expected. A test uses random
    keys and deletes its records, so that records of other programs are not affected. Three tests
    wait for a TTL of one second, and a fourth is skipped, unless `advance` is implemented.

    The tests use a store that works. They cannot lose a connection: a store must raise
    `UnsettledError`, or another error, for a write whose outcome is unknown.
    """


async def set_session(
    client: TestClient[Any, Any],
    data: Mapping[str, Any],
    sessions: Sessions | None = None,
    *,
    name: str | None = None,
    max_age: int | None = None,
) -> None:
    """Give a client a session, in place of the one it has.

    :param data: what the session holds.
    :param sessions: the storage, or an application that was given one by `setup`; by default
        the application that the client is for.
    :param name: which session of the application, if it has several.
    :param max_age: the session's own, in seconds; by default the storage's.
    :raises LookupError: if the application has no such session.
    """
    storage = find_storage(client.app if sessions is None else sessions, name)
    cookies = await _store(storage, data, max_age)
    for morsel in cookies.values():
        # The test server may speak plain HTTP, and under another name.
        morsel.update({"secure": "", "domain": ""})
        morsel.setdefault("max-age", "")  # aiohttp 3.10 leaves it out, and then misses it
    client.session.cookie_jar.update_cookies(cookies, client.make_url("/"))


async def session_cookies(
    sessions: Sessions,
    data: Mapping[str, Any],
    *,
    name: str | None = None,
    max_age: int | None = None,
) -> dict[str, str]:
    """Store a session, and return the cookies of a client that has it.

    They suit ``client.get(..., cookies=...)``.

    :param sessions: the storage, or an application that was given one by `setup`.
    :param data: what the session holds.
    :param name: which session of the application, if it has several.
    :param max_age: the session's own, in seconds; by default the storage's.
    :raises LookupError: if the application has no such session.
    """
    cookies = await _store(find_storage(sessions, name), data, max_age)
    return {key: morsel.value for key, morsel in cookies.items()}


async def read_session(sessions: Sessions, source: Source, *, name: str | None = None) -> Session:
    """Return the session that a client has now, or has after a response.

    A client without a session has a new, empty one. Only look at it: changes to it are not
    saved.

    :param sessions: the storage, or an application that was given one by `setup`.
    :param source: a client; a response that a client got; a response that a handler made, with
        the session's cookie; or the cookies themselves.
    :param name: which session of the application, if it has several.
    :raises LookupError: if the application has no such session.
    """
    headers = {}
    cookies: dict[str, str] = {}
    if isinstance(source, TestClient):
        cookies = {morsel.key: morsel.value for morsel in source.session.cookie_jar}
    elif isinstance(source, ClientResponse):
        headers = dict(source.request_info.headers)
        cookies = dict(_request(headers).cookies)
    if isinstance(source, (ClientResponse, web.StreamResponse)):
        for key, morsel in source.cookies.items():
            cookies[key] = morsel.value
            if str(morsel.get("max-age")) == "0":
                del cookies[key]
    elif not isinstance(source, TestClient):
        cookies = dict(source)
    written = [morsel.OutputString([]) for morsel in SimpleCookie(cookies).values()]
    headers[hdrs.COOKIE] = "; ".join(written)
    return await find_storage(sessions, name).load_session(_request(headers))


def find_storage(sessions: Sessions, name: str | None = None) -> AbstractStorage:
    """Return the storage that an application was given for its sessions of that name.

    :raises LookupError: if there is none.
    """
    if isinstance(sessions, AbstractStorage):
        return sessions
    found = [storage for other, storage in installed(sessions) if other == name]
    if not found:
        raise LookupError(
            f"The application has no session {name!r}: aiohttp_session.setup(app, storage)"
        )
    return found[-1]


async def _store(
    storage: AbstractStorage, data: Mapping[str, Any], max_age: int | None
) -> BaseCookie[str]:
    session = await storage.new_session()
    session.update(data)
    if max_age is not None:
        session.max_age = max_age
    response = web.Response()
    await storage.save_session(_request({}), response, session)
    return response.cookies


def _request(headers: Mapping[str, str]) -> web.Request:
    return make_mocked_request(hdrs.METH_GET, "/", headers=headers)
