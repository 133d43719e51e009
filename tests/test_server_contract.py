"""The contract over real Redis and memcached servers, and their stored formats."""

from __future__ import annotations

import json

import pytest

from tests.conftest import Clock
from tests.contract import NAME, Browser, OnMemcached, OnRedis, ServerContract

PAYLOAD = {"created": 1_700_000_000, "session": {"a": "\xe4"}}


class TestRedisStorage(OnRedis, ServerContract):
    async def test_the_record_as_other_programs_see_it(self, clock: Clock) -> None:
        browser = Browser(self.make())
        await browser.set(a="\xe4")
        key = f"{NAME}_{browser.cookie}"
        record = await self.client.get(key)
        assert record is not None
        assert json.loads(record) == PAYLOAD
        assert await self.client.ttl(key) == -1

    async def test_the_ttl_is_max_age(self) -> None:
        browser = Browser(self.make(max_age=1000))
        await browser.set(a=1)
        key = f"{NAME}_{browser.cookie}"
        assert 900 <= await self.client.ttl(key) <= 1000
        await self.client.expire(key, 10)
        await browser.set(a=2)
        assert 900 <= await self.client.ttl(key) <= 1000


class TestMemcachedStorage(OnMemcached, ServerContract):
    async def test_the_record_as_other_programs_see_it(self, clock: Clock) -> None:
        browser = Browser(self.make())
        await browser.set(a="\xe4")
        record = await self.client.get(f"{NAME}_{browser.cookie}".encode())
        assert record is not None
        assert json.loads(record) == PAYLOAD

    @pytest.mark.parametrize("max_age", [1000, 30 * 86400, 30 * 86400 + 1, 400 * 86400])
    async def test_a_record_that_lives_for_a_time(self, max_age: int) -> None:
        browser = Browser(self.make(max_age=max_age))
        await browser.set(a=1)
        assert await browser.load() == {"a": 1}
        await browser.set(a=2)
        assert await browser.load() == {"a": 2}
