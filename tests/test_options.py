"""Options show in signatures, editors and errors though each is declared once."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest
from redis.asyncio import Redis

from aiohttp_session import AbstractStorage, CookieStorage, ServerStorage, SimpleCookieStorage
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiohttp_session.lifecycle import LifecycleStorage
from aiohttp_session.memcached_storage import MemcachedStorage
from aiohttp_session.memory_storage import MemoryStorage
from aiohttp_session.nacl_storage import NaClCookieStorage
from aiohttp_session.redis_storage import RedisStorage
from tests.contract import KEY

STORAGES = [
    *(AbstractStorage, LifecycleStorage, CookieStorage, ServerStorage, SimpleCookieStorage),
    *(EncryptedCookieStorage, NaClCookieStorage, RedisStorage, MemcachedStorage, MemoryStorage),
]


@pytest.mark.parametrize("cls", STORAGES)
def test_hints_can_be_resolved(cls: type[Any]) -> None:
    assert typing.get_type_hints(cls.__init__)["return"] is type(None)


@pytest.mark.parametrize("cls", STORAGES)
def test_the_signature_shows_every_option_with_its_default(cls: type[Any]) -> None:
    parameters = inspect.signature(cls).parameters
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    assert parameters["cookie_name"].default == "AIOHTTP_SESSION"
    assert parameters["httponly"].default is True
    if cls is not AbstractStorage:
        assert parameters["lifetime"].default is None
    if issubclass(cls, ServerStorage):
        assert parameters["on_conflict"].default == "overwrite"
    assert list(inspect.signature(cls.__init__).parameters) == ["self", *parameters]


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (SimpleCookieStorage, ()),
        (EncryptedCookieStorage, (KEY,)),
        (NaClCookieStorage, (KEY,)),
        (RedisStorage, (Redis(),)),
        (MemoryStorage, ()),
    ],
)
def test_a_misspelt_option_names_the_class_that_was_called(
    cls: type[Any], arguments: tuple[Any, ...]
) -> None:
    class MyStorage(cls):  # type: ignore[misc]
        pass

    for called in (cls, MyStorage):
        with pytest.raises(TypeError, match=rf"^{called.__name__} has no option 'htponly'$"):
            called(*arguments, htponly=False)


def test_a_constructor_of_ones_own_shows_what_it_says_itself() -> None:
    class MyStorage(SimpleCookieStorage):
        def __init__(self, prefix: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    assert list(inspect.signature(MyStorage).parameters) == ["prefix", "args", "kwargs"]
