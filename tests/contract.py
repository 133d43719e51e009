"""What every storage does: one class of tests that each storage's tests inherit."""

from __future__ import annotations

import ast
import asyncio
import copy
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import Any, TypeVar

import aiomcache
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy
from redis.asyncio import Redis
from yarl import URL

from aiohttp_session import (
    AbstractStorage,
    Session,
    SimpleCookieStorage,
    get_session,
    new_session,
    session_middleware,
)
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from aiohttp_session.redis_storage import RedisStorage
from aiohttp_session.server_storage import ServerStorage
from benchmarks.servers import HOST, Server
from tests.conftest import Clock

NAME = "AIOHTTP_SESSION"
KEY = bytes(range(32))

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
T = TypeVar("T")


_TEMPLATE = make_mocked_request("GET", "/")


def make_request(cookie: str | None = None, path: str = "/") -> web.Request:
    """Make a request with this Cookie header, whatever is in it."""
    request = _TEMPLATE.clone(rel_url=path)
    if cookie is not None:
        request._headers = CIMultiDictProxy(CIMultiDict({"Cookie": cookie}))
    return request


class Browser:
    """Visits a handler through the middleware of a storage, and keeps the cookie."""

    def __init__(self, storage: AbstractStorage, cookie: str | None = None) -> None:
        self.storage = storage
        self.cookie = cookie  # the value, as it is written in headers

    async def visit(self, handler: Handler, path: str = "/") -> web.StreamResponse:
        """Return the response; ``set_cookie`` tells what it did to the cookie."""
        name = self.storage.cookie_name
        header = None if self.cookie is None else f"{name}={self.cookie}"
        middleware = session_middleware(self.storage)
        try:
            response = await middleware(make_request(header, path), handler)
        except web.HTTPException as error:
            self._keep(error)
            raise
        self._keep(response)
        return response

    def _keep(self, response: web.StreamResponse) -> None:
        morsel = response.cookies.get(self.storage.cookie_name)
        if morsel is not None:
            self.cookie = None if morsel.get("max-age") == "0" else morsel.coded_value

    async def do(self, action: Callable[[Session], T]) -> tuple[T, web.StreamResponse]:
        """Visit a handler that does this to its session, and return the action's result too."""
        results = []

        async def handler(request: web.Request) -> web.Response:
            results.append(action(await get_session(request)))
            return web.Response()

        response = await self.visit(handler)
        return results[0], response

    async def set(self, **items: Any) -> web.StreamResponse:
        """Set these items in the session."""
        _, response = await self.do(lambda session: session.update(items))
        return response

    async def load(self) -> Session:
        """Return the session of a request that only reads it."""
        session, response = await self.do(lambda session: session)
        assert not response.cookies
        return session


def is_deletion(response: web.StreamResponse, name: str = NAME) -> bool:
    morsel = response.cookies.get(name)
    return morsel is not None and (morsel.value, morsel.get("max-age")) == ("", "0")


_VERBS = {
    "read_latest": "read",
    "read": "read",
    "create": "create",
    "swap": "swap",
    "delete": "delete",
}


def spy(monkeypatch: pytest.MonkeyPatch, storage: ServerStorage, *verbs: str) -> list[str]:
    """Note the calls of these verbs of a storage, but not those that one verb makes of another."""
    calls: list[str] = []
    busy = False
    for verb in verbs or _VERBS:
        method = getattr(storage.store, verb)

        async def noted(*args: Any, verb: str = verb, method: Any = method) -> Any:
            nonlocal busy
            if busy:
                return await method(*args)
            calls.append(_VERBS[verb])
            busy = True
            try:
                return await method(*args)
            finally:
                busy = False

        monkeypatch.setattr(storage.store, verb, noted)
    return calls


class Simple:
    """Makes the storages under test, as each of the following classes does."""

    storage_class: type[Any] = SimpleCookieStorage

    def make(self, cls: type[Any] | None = None, **options: Any) -> Any:
        return (cls or self.storage_class)(**options)


class Encrypted(Simple):
    storage_class: type[Any] = EncryptedCookieStorage

    def make(self, cls: type[Any] | None = None, **options: Any) -> Any:
        return super().make(cls, **{"secret_key": KEY, **options})


class EncryptedSiv(Encrypted):
    def make(self, cls: type[Any] | None = None, **options: Any) -> Any:
        return super().make(cls, **{"cipher": "aes-256-gcm-siv", **options})


class NaCl(Encrypted):
    storage_class: type[Any] = NaClCookieStorage


class Memory(Simple):
    storage_class: type[Any] = MemoryStorage


class OnRedis:
    storage_class: type[Any] = RedisStorage

    @pytest.fixture(autouse=True)
    async def _redis(self, redis_server: Server) -> AsyncIterator[None]:
        self.client = Redis(host=HOST, port=redis_server.port)
        yield
        await self.client.aclose()

    def make(self, cls: type[Any] | None = None, **options: Any) -> Any:
        return (cls or self.storage_class)(self.client, **options)


class OnMemcached:
    storage_class: type[Any] = MemcachedStorage

    @pytest.fixture(autouse=True)
    async def _memcached(self, memcached_server: Server) -> AsyncIterator[None]:
        self.client = aiomcache.Client(HOST, memcached_server.port)
        yield
        await self.client.close()

    def make(self, cls: type[Any] | None = None, **options: Any) -> Any:
        return (cls or self.storage_class)(self.client, **options)


_texts = st.text(st.characters(exclude_categories=()), max_size=8)  # lone surrogates too
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _texts,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(_texts, values, max_size=4),
    max_leaves=12,
)
json_containers = st.lists(json_values, max_size=4) | st.dictionaries(
    _texts, json_values, max_size=4
)


def containers_in(values: Iterable[Any]) -> list[Any]:
    """List every list and dict among these values, and within them."""
    found = []
    for value in values:
        if isinstance(value, (dict, list)):
            found += [value, *containers_in(value.values() if isinstance(value, dict) else value)]
    return found


@st.composite
def mutations(draw: st.DrawFn, items: dict[str, Any]) -> Callable[[Any], None]:
    """Make a function that changes one thing somewhere below the top of a session."""
    number = draw(st.integers(0, len(containers_in(items.values())) - 1))
    target = containers_in(items.values())[number]
    keys = list(target) if isinstance(target, dict) else list(range(len(target)))
    key = draw(st.sampled_from(keys)) if keys else None
    how = draw(st.sampled_from(["add", "wrap", "remove"] if keys else ["add"]))
    value = draw(json_values)

    def mutate(items: Mapping[str, Any]) -> None:
        target = containers_in(items.values())[number]
        if how == "remove":
            del target[key]
        elif how == "wrap":
            target[key] = [target[key]]
        elif isinstance(target, dict):
            target["a key of more than eight"] = value
        else:
            target.insert(0, value)

    return mutate


class StorageContract:
    """Tests of a storage; the subclass says how to make one: ``make(cls=None, **options)``."""

    storage_class: type[Any]
    empty_is_deleted = True

    def make(self, cls: type[Any] | None = None, **options: Any) -> Any:
        raise NotImplementedError

    # A session's life

    async def test_a_first_request_has_a_new_empty_session_and_sets_no_cookie(self) -> None:
        session = await Browser(self.make()).load()
        assert session == {}
        assert (session.new, session.empty, session.identity) == (True, True, None)

    async def test_what_was_set_is_there_next_time(self) -> None:
        browser = Browser(self.make())
        await browser.set(text="ä\ud800", number=1, nested={"list": [1, None, {"x": 2.5}]})
        session = await browser.load()
        assert session == {
            "text": "ä\ud800",
            "number": 1,
            "nested": {"list": [1, None, {"x": 2.5}]},
        }
        assert not session.new

    async def test_created_is_stored(self, clock: Clock) -> None:
        browser = Browser(self.make())
        await browser.set(a=1)
        clock.now += 100.5
        assert (await browser.load()).created == 1_700_000_000

    async def test_a_change_moves_created(self, clock: Clock) -> None:
        browser = Browser(self.make())
        await browser.set(a=1)
        clock.now += 100.5
        await browser.set(a=2)
        assert (await browser.load()).created == 1_700_000_100

    async def test_a_deleted_key_is_gone(self) -> None:
        browser = Browser(self.make())
        await browser.set(a=1, b=2)
        await browser.do(lambda session: session.pop("a"))
        assert await browser.load() == {"b": 2}

    async def test_changed_has_it_saved(self) -> None:
        browser = Browser(self.make())
        await browser.set(a=1)
        _, response = await browser.do(lambda session: session.changed())
        assert NAME in response.cookies
        assert await browser.load() == {"a": 1}

    async def test_emptying_deletes_the_cookie(self) -> None:
        browser = Browser(self.make())
        await browser.set(a=1)
        _, response = await browser.do(lambda session: session.clear())
        assert is_deletion(response) is self.empty_is_deleted
        assert (await browser.load()).new

    async def test_invalidate_forgets_everything(self) -> None:
        browser = Browser(self.make())
        await browser.set(a=1)
        _, response = await browser.do(lambda session: session.invalidate())
        assert is_deletion(response) is self.empty_is_deleted
        session = await browser.load()
        assert session == {}
        assert session.new

    async def test_an_empty_session_that_was_changed_sets_no_cookie(self) -> None:
        _, response = await Browser(self.make()).do(lambda session: session.changed())
        assert not response.cookies

    async def test_new_session_replaces_the_old_one(self) -> None:
        async def handler(request: web.Request) -> web.Response:
            old = await get_session(request)
            assert old == {"a": 1}
            session = await new_session(request)
            assert await get_session(request) is session
            session["b"] = 2
            return web.Response()

        browser = Browser(self.make())
        await browser.set(a=1)
        await browser.visit(handler)
        assert await browser.load() == {"b": 2}

    async def test_users_do_not_meet(self) -> None:
        storage = self.make()
        browsers = [Browser(storage) for _ in range(8)]
        await asyncio.gather(*(b.set(user=number) for number, b in enumerate(browsers)))
        sessions = await asyncio.gather(*(browser.load() for browser in browsers))
        assert [session["user"] for session in sessions] == list(range(8))

    async def test_storages_with_other_cookie_names_do_not_meet(self) -> None:
        browser = Browser(self.make(cookie_name="one"))
        await browser.set(a=1)
        other = Browser(self.make(cookie_name="two"))
        await other.set(b=1)
        assert await browser.load() == {"a": 1}

    # Expiry

    async def test_a_session_is_over_max_age_seconds_after_its_last_change(
        self, clock: Clock
    ) -> None:
        browser = Browser(self.make(max_age=100))
        await browser.set(a=1)
        clock.now += 60
        await browser.set(a=2)
        clock.now += 99
        assert await browser.load() == {"a": 2}
        clock.now += 2
        assert await browser.load() == {}

    async def test_an_expired_session_can_be_used_again(self, clock: Clock) -> None:
        browser = Browser(self.make(max_age=100))
        await browser.set(a=1)
        clock.now += 101
        await browser.set(b=2)
        assert await browser.load() == {"b": 2}

    async def test_without_max_age_a_session_lasts(self, clock: Clock) -> None:
        browser = Browser(self.make())
        await browser.set(a=1)
        clock.now += 10 * 365 * 86400
        assert await browser.load() == {"a": 1}

    async def test_a_clock_that_jumps_back_harms_nobody(self, clock: Clock) -> None:
        browser = Browser(self.make(max_age=100))
        await browser.set(a=1)
        clock.now -= 50
        assert await browser.load() == {"a": 1}
        await browser.set(b=2)
        clock.now += 50
        assert await browser.load() == {"a": 1, "b": 2}

    # The cookie

    async def test_the_cookie_has_the_options_given(self, clock: Clock) -> None:
        storage = self.make(
            cookie_name="sid",
            domain="example.org",
            max_age=10,
            path="/app",
            secure=True,
            httponly=False,
            samesite="Lax",
        )
        response = await Browser(storage).set(a=1)
        tail = response.cookies["sid"].OutputString().partition(";")[2]
        assert tail == (
            " Domain=example.org; expires=Tue, 14-Nov-2023 22:13:30 GMT; Max-Age=10; Path=/app;"
            " SameSite=Lax; Secure"
        )

    async def test_the_cookie_has_these_options_by_default(self) -> None:
        response = await Browser(self.make()).set(a=1)
        assert response.cookies[NAME].OutputString().endswith("; HttpOnly; Path=/")
        assert response.cookies[NAME].OutputString().count("; ") == 2

    async def test_the_max_age_of_one_session(self, clock: Clock) -> None:
        def shorten(session: Session) -> None:
            session.max_age = 5
            session["a"] = 1

        _, response = await Browser(self.make(max_age=100)).do(shorten)
        assert response.cookies[NAME]["max-age"] == "5"
        assert response.cookies[NAME]["expires"] == "Tue, 14-Nov-2023 22:13:25 GMT"

    async def test_cookie_params_can_be_changed_at_run_time(self) -> None:
        storage = self.make()
        browser = Browser(storage)
        response = await browser.set(a=1)
        assert response.cookies[NAME]["samesite"] == ""
        storage.cookie_params["samesite"] = "Lax"
        response = await browser.set(a=2)
        assert response.cookies[NAME]["samesite"] == "Lax"
        del storage._cookie_params["samesite"]
        response = await browser.set(a=3)
        assert response.cookies[NAME].OutputString().endswith("Path=/")

    async def test_a_deletion_cookie_has_the_attributes_of_the_cookie(self) -> None:
        storage = self.make(
            cookie_name="sid", domain="example.org", path="/app", secure=True, samesite="Strict"
        )
        browser = Browser(storage)
        await browser.set(a=1)
        storage.save_cookie(response := web.Response(), "")
        assert response.cookies["sid"].OutputString() == (
            'sid=""; Domain=example.org; expires=Thu, 01 Jan 1970 00:00:00 GMT; HttpOnly;'
            " Max-Age=0; Path=/app; SameSite=Strict; Secure"
        )

    async def test_overrides_of_load_cookie_and_save_cookie_are_reached(self) -> None:
        base = self.storage_class

        class QueryStorage(base):  # type: ignore[misc, valid-type]
            def load_cookie(self, request: web.Request) -> str | None:
                return request.query.get("sid")

            def save_cookie(
                self, response: web.StreamResponse, data: str, *, max_age: int | None = None
            ) -> None:
                response.headers["X-Session"] = data

        async def handler(request: web.Request) -> web.Response:
            session = await get_session(request)
            session["count"] = session.get("count", 0) + 1
            return web.Response(text=str(session["count"]))

        browser = Browser(self.make(QueryStorage))
        response = await browser.visit(handler)
        assert not response.cookies
        path = str(URL("/").with_query(sid=response.headers["X-Session"]))
        response = await browser.visit(handler, path)
        assert isinstance(response, web.Response)
        assert response.text == "2"

    # Outcomes of a handler

    async def test_a_session_is_saved_when_an_http_exception_is_raised(self) -> None:
        error = web.HTTPFound("/elsewhere")

        async def handler(request: web.Request) -> web.Response:
            (await get_session(request))["a"] = 1
            raise error

        browser = Browser(self.make())
        with pytest.raises(web.HTTPFound) as caught:
            await browser.visit(handler)
        assert caught.value is error
        assert await browser.load() == {"a": 1}

    async def test_nothing_is_saved_when_another_exception_is_raised(self) -> None:
        async def handler(request: web.Request) -> web.Response:
            (await get_session(request))["a"] = 2
            raise LookupError

        browser = Browser(self.make())
        await browser.set(a=1)
        with pytest.raises(LookupError):
            await browser.visit(handler)
        assert await browser.load() == {"a": 1}

    async def test_a_value_that_json_cannot_hold_is_refused_and_nothing_is_set(self) -> None:
        def put(session: Session) -> None:
            session["cart"] = [1, 2, {"when": datetime(2026, 1, 1, tzinfo=timezone.utc)}]

        browser = Browser(self.make())
        with pytest.raises(TypeError) as caught:
            await browser.do(put)
        assert str(caught.value) == "session['cart'][2]['when']: datetime is not JSON serializable"
        assert browser.cookie is None

    # Nested changes

    @pytest.mark.parametrize(
        "change",
        [
            lambda s: s["list"].append(1),
            lambda s: s["list"].clear(),
            lambda s: s["dict"].update(a=1),
            lambda s: s["dict"]["deep"][0]["er"].pop(),
            lambda s: s["dict"]["deep"][0].__setitem__("er", True),
            lambda s: s["dict"]["deep"].sort(key=str),
        ],
    )
    async def test_a_nested_change_is_saved_without_changed(
        self, change: Callable[[Session], Any], clock: Clock
    ) -> None:
        items: dict[str, Any] = {"list": [1.0], "dict": {"deep": [{"er": [1]}, "a"]}}
        expected: Any = copy.deepcopy(items)
        change(expected)
        browser = Browser(self.make(max_age=100))
        await browser.set(**items)
        clock.now += 70

        def act(session: Session) -> None:
            change(session)
            assert not session._changed

        await browser.do(act)
        clock.now += 70  # the nested change counts as one for `created`
        session = await browser.load()
        assert session == expected
        assert session.created == 1_700_000_070

    @settings(parent=settings.get_profile("storages"))
    @given(data=st.data())
    async def test_any_nested_change_is_saved(self, data: st.DataObject) -> None:
        items = data.draw(st.dictionaries(_texts, json_containers, min_size=1, max_size=3))
        mutate = data.draw(mutations(items))
        browser = Browser(self.make())
        await browser.do(lambda session: session.update(items))
        _, response = await browser.do(mutate)
        assert response.cookies
        mutate(items)
        assert repr(dict(await browser.load())) == repr(items)

    @settings(parent=settings.get_profile("storages"))
    @given(items=st.dictionaries(_texts, json_values, min_size=1, max_size=4))
    async def test_reading_never_saves(self, items: dict[str, Any]) -> None:
        def read(session: Session) -> None:
            copy.deepcopy(dict(session))
            json.dumps(dict(session), sort_keys=True)
            for key, value in session.items():
                assert key in session
                assert session[key] is session.get(key) is value
            assert (session.empty, session != {}, bool(repr(session))) == (False, True, True)

        browser = Browser(self.make())
        await browser.do(lambda session: session.update(items))
        _, response = await browser.do(read)
        assert not response.cookies

    # Custom encoder and decoder

    async def test_a_custom_encoder_and_decoder_are_used(self) -> None:
        browser = Browser(self.make(encoder=repr, decoder=ast.literal_eval))
        await browser.set(nested=[{1, 2}, (3, b"4")])
        assert await browser.load() == {"nested": [{1, 2}, (3, b"4")]}
        await browser.do(lambda session: session["nested"][0].add(5))
        assert await browser.load() == {"nested": [{1, 2, 5}, (3, b"4")]}

    async def test_an_encoder_may_give_bytes(self) -> None:
        browser = Browser(self.make(encoder=lambda data: json.dumps(data).encode()))
        await browser.set(a="ä")
        assert await browser.load() == {"a": "ä"}

    async def test_a_decoder_is_given_text(self) -> None:
        given_texts = []

        def decoder(text: str) -> Any:
            given_texts.append(text)
            return json.loads(text)

        browser = Browser(
            self.make(encoder=lambda data: json.dumps(data, ensure_ascii=False), decoder=decoder)
        )
        await browser.set(a="ä")
        assert await browser.load() == {"a": "ä"}
        assert type(given_texts[-1]) is str
        assert json.loads(given_texts[-1])["session"] == {"a": "ä"}

    async def test_an_encoder_that_raises_stores_nothing(self) -> None:
        def encoder(data: object) -> str:
            raise LookupError("no room")

        browser = Browser(self.make(encoder=encoder))
        with pytest.raises(LookupError, match="no room"):
            await browser.set(a=1)
        assert browser.cookie is None

    @pytest.mark.parametrize("error", [ValueError, TypeError, AttributeError, RecursionError])
    async def test_a_decoder_that_finds_damage_gives_an_empty_session(
        self, error: type[Exception]
    ) -> None:
        def decoder(text: str) -> Any:
            raise error

        browser = Browser(self.make(decoder=decoder))
        await browser.set(a=1)
        assert await browser.load() == {}

    async def test_another_error_of_a_decoder_is_not_hidden(self) -> None:
        def decoder(text: str) -> Any:
            raise LookupError

        browser = Browser(self.make(decoder=decoder))
        await browser.set(a=1)
        with pytest.raises(LookupError):
            await browser.load()

    # The interface that subclasses and other people's code use

    def test_a_storage_is_hashable(self) -> None:
        storage = self.make()
        assert {storage: 1}[storage] == 1

    async def test_the_session_data_hold_the_live_mapping(self, clock: Clock) -> None:
        storage = self.make()
        session = await storage.new_session()
        assert isinstance(session, Session)
        assert storage._get_session_data(session) == {}
        session["a"] = 1
        data = storage._get_session_data(session)
        assert data == {"created": 1_700_000_000, "session": {"a": 1}}
        assert data["session"] is session._mapping

    async def test_new_session_has_the_max_age_of_the_storage(self) -> None:
        assert (await self.make(max_age=7).new_session()).max_age == 7

    def test_options_are_readable(self) -> None:
        def encoder(data: object) -> str:
            raise NotImplementedError

        storage = self.make(cookie_name="sid", max_age=7, encoder=encoder, decoder=repr)
        assert storage.cookie_name == storage._cookie_name == "sid"
        assert storage.max_age == storage._max_age == 7
        assert storage.cookie_params is storage._cookie_params
        assert storage.cookie_params.copy() == {
            "domain": None,
            "max_age": 7,
            "path": "/",
            "secure": None,
            "httponly": True,
            "samesite": None,
        }
        assert storage._encoder is encoder
        assert storage._decoder is repr

    def test_the_default_codec_is_that_of_json(self) -> None:
        storage = self.make()
        data = {"created": 1, "session": {"a": "ä", "b": [10**30, float("inf")]}}
        text = storage._encoder(data)
        assert type(text) is str
        assert text == json.dumps(data, separators=(",", ":"))
        assert storage._decoder(text) == data
        assert storage._decoder(text.encode()) == data

    def test_options_are_keywords_only(self) -> None:
        with pytest.raises(TypeError):
            self.make(no_such_option=1)

    async def test_save_session_by_hand(self) -> None:
        storage = self.make()
        session = await storage.new_session()
        session["a"] = 1
        response = web.WebSocketResponse()
        await storage.save_session(make_request(), response, session)
        browser = Browser(storage, response.cookies[NAME].coded_value)
        assert await browser.load() == {"a": 1}


class ServerContract(StorageContract):
    """Tests of a storage that keeps records under ids."""

    async def test_the_id_is_128_random_bits_in_hex(self, monkeypatch: pytest.MonkeyPatch) -> None:
        browser = Browser(self.make())
        monkeypatch.setattr("os.urandom", lambda size: bytes(range(size)))
        await browser.set(a=1)
        assert browser.cookie == "000102030405060708090a0b0c0d0e0f"
        assert (await browser.load()).identity == browser.cookie

    async def test_the_record_is_plain_json_under_name_and_id(self, clock: Clock) -> None:
        storage = self.make(cookie_name="sid")
        browser = Browser(storage)
        await browser.set(a={"b": "ä"})
        record = await storage.store.read(f"sid_{browser.cookie}")
        assert json.loads(record) == {"created": 1_700_000_000, "session": {"a": {"b": "ä"}}}

    async def test_records_of_others_are_read(self) -> None:
        storage = self.make()
        record = b' {"session": {"a": "\\u00e4"},\n"more": 1, "created": 1700000000.5} '
        await storage.store.create(f"{NAME}_from-php.7", record, None)
        session = await Browser(storage, "from-php.7").load()
        assert session == {"a": "ä"}
        assert (session.identity, session.new, session.created) == (
            "from-php.7",
            False,
            1700000000.5,
        )

    @pytest.mark.parametrize(
        "record",
        [b"", b"{", b"\xff\xfe", b"[1]", b"1", b"null", b'"text"', b'{"session": 1}', b"[" * 9999],
    )
    async def test_a_record_that_does_not_parse_is_an_empty_session_under_its_id(
        self, record: bytes
    ) -> None:
        storage = self.make()
        identity = uuid.uuid4().hex
        await storage.store.create(f"{NAME}_{identity}", record, None)
        browser = Browser(storage, identity)
        session = await browser.load()
        assert session == {}
        assert (session.identity, session.new) == (identity, False)
        await browser.set(a=1)
        assert browser.cookie == identity
        assert await browser.load() == {"a": 1}

    async def test_an_emptied_record_does_not_keep_its_id(self) -> None:
        storage = self.make()
        identity = uuid.uuid4().hex
        await storage.store.create(f"{NAME}_{identity}", b"{}", None)
        browser = Browser(storage, identity)
        session = await browser.load()
        assert (session.identity, session.new) == (None, True)
        await browser.set(a=1)
        assert browser.cookie != identity

    async def test_an_unknown_id_is_not_adopted(self) -> None:
        browser = Browser(self.make(), "planted-by-somebody")
        session = await browser.load()
        assert (session.identity, session.new) == (None, True)
        await browser.set(a=1)
        assert browser.cookie != "planted-by-somebody"

    async def test_an_expired_session_keeps_its_id(self, clock: Clock) -> None:
        storage = self.make(max_age=100)
        identity = uuid.uuid4().hex
        record = b'{"created": 1600000000, "session": {"a": 1}}'
        await storage.store.create(f"{NAME}_{identity}", record, None)
        session = await Browser(storage, identity).load()
        assert session == {}
        assert (session.identity, session.new) == (identity, False)

    async def test_a_request_reads_once_and_writes_only_what_changed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage = self.make()
        browser = Browser(storage)
        calls = spy(monkeypatch, storage)
        await browser.set(a=1)
        await browser.load()
        await browser.set(a=2)
        assert calls == ["create", "read", "read", "swap"]

    async def test_a_request_without_a_session_does_not_ask_the_store(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def handler(request: web.Request) -> web.Response:
            return web.Response()

        storage = self.make()
        calls = spy(monkeypatch, storage)
        await Browser(storage, "some-id").visit(handler)
        await Browser(storage).load()
        assert calls == []

    @pytest.mark.parametrize(
        "forget", [lambda session: session.clear(), lambda session: session.invalidate()]
    )
    async def test_the_record_of_an_emptied_session_is_deleted(
        self, forget: Callable[[Session], None]
    ) -> None:
        storage = self.make()
        browser = Browser(storage)
        await browser.set(a=1)
        key = f"{NAME}_{browser.cookie}"
        await browser.do(forget)
        assert await storage.store.read(key) is None

    @pytest.mark.parametrize("loaded_before", [True, False])
    async def test_new_session_deletes_the_old_record(self, loaded_before: bool) -> None:
        async def handler(request: web.Request) -> web.Response:
            if loaded_before:
                await get_session(request)
            (await new_session(request))["b"] = 2
            return web.Response()

        storage = self.make()
        browser = Browser(storage)
        await browser.set(a=1)
        old = browser.cookie
        await browser.visit(handler)
        assert browser.cookie != old
        assert await storage.store.read(f"{NAME}_{old}") is None
        assert await browser.load() == {"b": 2}

    async def test_key_factory_makes_the_ids(self) -> None:
        identity = uuid.uuid4().hex[:10]
        browser = Browser(self.make(key_factory=lambda: identity))
        await browser.set(a=1)
        assert browser.cookie == identity

    async def test_an_application_can_choose_the_id_of_a_new_session(self) -> None:
        identity = uuid.uuid4()

        def choose(session: Session) -> None:
            session.set_new_identity(identity)
            session["a"] = 1

        browser = Browser(self.make())
        await browser.do(choose)
        assert browser.cookie == str(identity)
        assert await browser.load() == {"a": 1}

    @pytest.mark.parametrize(
        "identity", ["", "a b", "a\n", "ä", "../a", "x" * 300, "x" * (250 - len(NAME))]
    )
    async def test_an_impossible_id_of_a_key_factory_is_refused(
        self, identity: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage = self.make(key_factory=lambda: identity)
        calls = spy(monkeypatch, storage)
        with pytest.raises(ValueError, match="printable ASCII without spaces, and at most 234"):
            await Browser(storage).set(a=1)
        assert calls == []

    async def test_the_longest_id(self) -> None:
        identity = uuid.uuid4().hex.ljust(249 - len(NAME), "x")
        browser = Browser(self.make(key_factory=lambda: identity))
        await browser.set(a=1)
        assert await browser.load() == {"a": 1}

    async def test_ids_are_hard_to_guess(self) -> None:
        browsers = [Browser(self.make()) for _ in range(20)]
        for browser in browsers:
            await browser.set(a=1)
        assert len({browser.cookie for browser in browsers}) == 20

    async def test_concurrent_requests_of_one_user_leave_one_of_their_states(self) -> None:
        storage = self.make()
        browser = Browser(storage)
        await browser.set(n=-1)
        others = [Browser(storage, browser.cookie) for _ in range(8)]
        await asyncio.gather(*(b.set(n=number, m=number) for number, b in enumerate(others)))
        session = await browser.load()
        assert session["n"] == session["m"] >= 0

    async def test_a_store_that_fails_fails_the_request(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def refuse(*args: object) -> None:
            raise ConnectionError("refused")

        storage = self.make()
        browser = Browser(storage)
        monkeypatch.setattr(storage.store, "create", refuse)
        with pytest.raises(ConnectionError, match="refused"):
            await browser.set(a=1)
        assert browser.cookie is None
        monkeypatch.undo()
        await browser.set(a=1)
        monkeypatch.setattr(storage.store, "read", refuse)
        with pytest.raises(ConnectionError, match="refused"):
            await browser.load()
