"""The names, signatures and messages that applications and other storages rely on."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from aiohttp import web
from cryptography.fernet import Fernet
from nacl.secret import SecretBox
from redis.asyncio import Redis

import aiohttp_session
from aiohttp_session import AbstractStorage, Session, SimpleCookieStorage, _session_py
from aiohttp_session import redis_storage as redis_module
from aiohttp_session._core import TWINS
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.log import log
from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from aiohttp_session.redis_storage import RedisStorage
from tests.contract import KEY

STORAGES: list[tuple[type[Any], str | None]] = [
    # the class, and the name of its first argument
    (AbstractStorage, None),
    (SimpleCookieStorage, None),
    (EncryptedCookieStorage, "secret_key"),
    (NaClCookieStorage, "secret_key"),
    (RedisStorage, "redis_pool"),
    (MemcachedStorage, "memcached_conn"),
    (MemoryStorage, None),
]


@pytest.mark.parametrize(
    "name",
    [
        *("AbstractStorage", "Session", "SessionData", "SimpleCookieStorage", "get_session"),
        *("new_session", "session_middleware", "setup", "_CookieParams", "Handler", "recommended"),
    ],
)
def test_public_names(name: str) -> None:
    assert hasattr(aiohttp_session, name)
    assert name in aiohttp_session.__all__


def test_keys_are_these_strings() -> None:
    assert aiohttp_session.SESSION_KEY == "aiohttp_session"
    assert aiohttp_session.STORAGE_KEY == "aiohttp_session_storage"


def test_all_names_what_there_is() -> None:
    assert len(set(aiohttp_session.__all__)) == len(aiohttp_session.__all__)
    for name in aiohttp_session.__all__:
        assert hasattr(aiohttp_session, name)


def test_the_version_is_text() -> None:
    assert isinstance(aiohttp_session.__version__, str)
    assert aiohttp_session.__version__[0].isdigit()


def test_the_logger() -> None:
    assert log is logging.getLogger("aiohttp_session")


def test_cookie_params_and_session_data_are_typed_dicts() -> None:
    assert set(aiohttp_session._CookieParams.__annotations__) >= {
        *("domain", "max_age", "path", "secure", "httponly", "samesite", "expires"),
    }
    assert set(aiohttp_session.SessionData.__annotations__) >= {"created", "session"}
    assert aiohttp_session.SessionData(created=1, session={}) == {"created": 1, "session": {}}


@pytest.mark.parametrize(("cls", "first"), STORAGES)
def test_the_first_argument_of_a_storage(cls: type[Any], first: str | None) -> None:
    parameters = list(inspect.signature(cls).parameters.values())
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ([] if first is None else [first])


@pytest.mark.parametrize(("cls", "first"), STORAGES)
def test_every_storage_is_an_abstract_storage(cls: type[Any], first: str | None) -> None:
    assert issubclass(cls, AbstractStorage)
    for name in ("load_session", "save_session", "new_session", "load_cookie", "save_cookie"):
        assert callable(getattr(cls, name))


def test_load_and_save_must_be_implemented() -> None:
    with pytest.raises(TypeError, match="load_session"):
        AbstractStorage()  # type: ignore[abstract]


ALL_OPTIONS: dict[str, Any] = {
    "cookie_name": "sid",
    "domain": "example.org",
    "max_age": 5,
    "path": "/app",
    "secure": True,
    "httponly": False,
    "samesite": "Strict",
    "encoder": repr,
    "decoder": eval,
}


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (SimpleCookieStorage, {}),
        (EncryptedCookieStorage, {"secret_key": KEY}),
        (NaClCookieStorage, {"secret_key": KEY}),
        (MemoryStorage, {"key_factory": lambda: "id"}),
    ],
)
def test_every_option_is_a_keyword_that_subclasses_may_forward(
    cls: type[Any], arguments: dict[str, Any]
) -> None:
    class MyStorage(cls):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    storage = MyStorage(**arguments, **ALL_OPTIONS)
    assert storage.cookie_name == "sid"
    assert (storage._encoder, storage._decoder) == (repr, eval)
    assert storage.cookie_params == {
        "domain": "example.org",
        "max_age": 5,
        "path": "/app",
        "secure": True,
        "httponly": False,
        "samesite": "Strict",
    }


@pytest.mark.parametrize("cls", [EncryptedCookieStorage, NaClCookieStorage])
def test_the_key_may_be_positional(cls: type[Any]) -> None:
    class MyStorage(cls):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    assert MyStorage(KEY, max_age=5).max_age == 5


def test_keys_are_readable_and_assignable() -> None:
    assert isinstance(EncryptedCookieStorage(KEY)._fernet, Fernet)
    assert isinstance(NaClCookieStorage(KEY)._secretbox, SecretBox)


def test_defaults() -> None:
    storage = SimpleCookieStorage()
    assert storage.cookie_name == "AIOHTTP_SESSION"
    assert storage.max_age is None
    assert storage.cookie_params == {
        "domain": None,
        "max_age": None,
        "path": "/",
        "secure": None,
        "httponly": True,
        "samesite": None,
    }


async def test_a_storage_of_ones_own_needs_no_more_than_two_methods() -> None:
    class Own(AbstractStorage):
        async def load_session(self, request: web.Request) -> Session:
            return Session("own", data=None, new=False)

        async def save_session(
            self, request: web.Request, response: web.StreamResponse, session: Session
        ) -> None:
            self.save_cookie(response, self._encoder(self._get_session_data(session)))

    storage = Own(cookie_name="own")
    assert (await storage.new_session()).new
    assert {storage: 1}


# What is missing


def test_redis_that_is_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Redis()
    monkeypatch.setattr(redis_module, "REDIS_VERSION", (4, 2, 9))
    with pytest.raises(RuntimeError, match=r"redis<5\.0\.2"):
        RedisStorage(client)
    monkeypatch.setattr(redis_module, "aioredis", None)
    with pytest.raises(RuntimeError, match=r"install redis.*aiohttp-session\[aioredis\]"):
        RedisStorage(client)


def test_a_client_that_is_none() -> None:
    with pytest.raises(TypeError, match="Redis"):
        RedisStorage(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("cookie_storage", "cryptography.fernet", "secure"),
        ("nacl_storage", "nacl.secret", "pynacl"),
        ("memcached_storage", "aiomcache", "aiomcache"),
    ],
)
def test_a_missing_extra_is_named_at_import(
    module: str, missing: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    spec = importlib.util.find_spec(f"aiohttp_session.{module}")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=rf"pip install aiohttp-session\[{extra}\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    "code",
    [
        "import aiohttp_session",
        "from aiohttp_session import *",
        "import aiohttp_session.memory_storage",
    ],
)
def test_the_package_itself_needs_no_extra(code: str) -> None:
    extras = ("cryptography", "nacl", "redis", "aiomcache")
    script = f"import sys; {code}; print([m for m in {extras!r} if m in sys.modules])"
    command = [sys.executable, "-W", "error", "-c", script]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"


# The switch


@pytest.fixture
def load_switch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Load the switch anew, as if there were only these extensions."""

    def load(*extensions: str) -> ModuleType:
        monkeypatch.delenv("AIOHTTP_SESSION_NO_EXTENSIONS", raising=False)
        for name, twin in TWINS.items():
            monkeypatch.delattr(aiohttp_session, name, raising=False)
            there = twin if name in extensions else None
            monkeypatch.setitem(sys.modules, f"aiohttp_session.{name}", there)
        spec = importlib.util.find_spec("aiohttp_session._core")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_all_extensions_are_used(load_switch: Callable[..., ModuleType]) -> None:
    switch = load_switch(*TWINS)
    assert switch.IMPLEMENTATION == "cython"
    for twin in TWINS.values():
        for name in twin.__all__:
            assert getattr(switch, name) is getattr(twin, name)


def test_no_extensions_are_no_matter(load_switch: Callable[..., ModuleType]) -> None:
    switch = load_switch()
    assert switch.IMPLEMENTATION == "python"
    assert switch.Session is _session_py.Session


def test_half_of_the_extensions_are_worth_a_warning(
    load_switch: Callable[..., ModuleType],
) -> None:
    with pytest.warns(RuntimeWarning, match="runs in pure Python, since its extensions can't be"):
        assert load_switch("_cookies_c", "_session_c").IMPLEMENTATION == "python"
