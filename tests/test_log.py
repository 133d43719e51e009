"""Lines that anybody can cause are logged once in a while."""

from __future__ import annotations

import logging
import time

import pytest

from aiohttp_session.log import RateLimited
from aiohttp_session.nacl_storage import NaClCookieStorage
from tests.contract import KEY, Browser


def test_the_lines_held_back_are_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    line = RateLimited(logging.WARNING, "%d sheep", seconds=2)
    for now in (0.0, 1.0, 1.9, 2.0, 3.9, 10.0, 20.0):  # noqa: B007 - the clock reads it
        line.log(3)
    assert [record.getMessage() for record in caplog.records] == [
        "3 sheep",
        "3 sheep (and 2 times more since the last such line)",
        "3 sheep (and 1 times more since the last such line)",
        "3 sheep",
    ]
    assert {record.filename for record in caplog.records} == {"test_log.py"}


async def test_cookies_that_cannot_be_read_do_not_flood_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    browser = Browser(NaClCookieStorage(KEY), "garbage")
    for now in (0.0, 0.5, 0.9, 1.0):  # noqa: B007 - the clock reads it
        assert (await browser.load()).new
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "and 2 times more" in caplog.text
    assert "garbage" not in caplog.text
