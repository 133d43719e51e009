"""Checks of what RedisStore does to swap a record, whatever the server allows."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp_session.stores.redis import RedisStore


class Commands:
    """What a server was sent, since it was last asked."""

    def __init__(self, direct: Any) -> None:
        self._direct = direct

    async def reset(self) -> None:
        await self._direct.config_resetstat()

    async def seen(self) -> dict[str, tuple[int, int]]:
        """Return how many swaps were sent, and how many were refused, by the command's name."""
        stats = await self._direct.info("commandstats")
        found = {}
        for name in ("get", "set", "evalsha", "eval", "watch", "multi", "exec", "script|load"):
            one = stats.get(f"cmdstat_{name}")
            if one is not None:
                refused = one["rejected_calls"] + one["failed_calls"]
                found[name] = one["calls"] + one["rejected_calls"], refused
        await self.reset()
        return found


async def check_swaps(store: RedisStore, direct: Any, *, is_atomic: bool = True) -> None:
    """Check what a swap does, in whichever way."""
    await direct.set("s", b"\x00\xff\r\n$1")
    assert await store.swap("s", b"\x00\xff\r\n$1", b"", 100) is True
    assert 0 < await direct.ttl("s") <= 100
    assert await store.swap("s", b"other", b"2", None) is False
    assert await store.swap("s", b"", b"2", None) is True
    assert (await direct.get("s"), await direct.ttl("s")) == (b"2", -1)
    assert await store.swap("s", b"", b"3", None) is False
    assert await store.swap("gone", b"0", b"1", 100) is False
    assert await store.swap("gone", b"", b"1", 100) is False
    assert await direct.get("gone") is None
    assert await store.swap("gone", None, b"1", 100) is True
    assert await store.swap("gone", None, b"2", 100) is False
    assert await direct.get("gone") == b"1"
    large = b"x" * 50_000
    assert await store.swap("gone", b"1", large, None) is True
    assert await store.swap("gone", large, large[1:], 100) is True
    assert await direct.get("gone") == large[1:]
    won = await asyncio.gather(*(store.swap("s", b"2", b"w%d" % n, None) for n in range(20)))
    assert won.count(True) == 1 or not is_atomic
    assert await direct.get("s") in [b"w%d" % n for n in range(20) if won[n]]
    await store.finish()
