"""Drive a headless Chromium by the W3C WebDriver protocol, which is JSON over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import aiohttp

from tests.waiting import PATIENCE

OPTIONS = [
    "--headless=new",
    "--no-sandbox",  # which refuses to run as root
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-component-update",  # it visits nothing but what it is told to
    "--ignore-certificate-errors",
    "--host-resolver-rules=MAP *.example.test 127.0.0.1",
]


@contextlib.contextmanager
def chromedriver() -> Iterator[str]:
    """Start chromedriver on a free port, and give its address."""
    command = ["chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if found := re.search(r"started successfully on port (\d+)", line):
                    yield f"http://127.0.0.1:{found[1]}"
                    return
            raise RuntimeError(f"{command} ended without a port: {process.wait()}")
        finally:
            process.terminate()


class Browser:
    """A Chromium with a profile of its own."""

    def __init__(self, http: aiohttp.ClientSession, session: str) -> None:
        self._http = http
        self._session = session

    async def open(self, url: str) -> str:
        """Visit a page, and return its text."""
        await self.call("POST", "/url", url=url)
        return str(await self.run("return document.body.innerText"))

    async def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page, and return what it returns."""
        return await self.call("POST", "/execute/sync", script=script, args=arguments)

    async def submit(self, form: str, fields: Mapping[str, str]) -> None:
        """Fill in the first form that a CSS selector finds, send it, and wait for what follows."""
        for name, text in fields.items():
            field = await self._find(f'{form} [name="{name}"]')
            await self.call("POST", f"{field}/value", text=text)
        await self.run("window.isLeft = false")
        await self.run("document.querySelector(arguments[0]).requestSubmit()", form)
        await asyncio.wait_for(self._leave(), PATIENCE)

    async def _leave(self) -> None:
        """Wait for another page than the one that was marked."""
        while await self.run("return window.isLeft === false || document.readyState != 'complete'"):
            pass

    async def _find(self, selector: str) -> str:
        found = await self.call("POST", "/element", using="css selector", value=selector)
        return f"/element/{next(iter(found.values()))}"

    async def cookies(self) -> dict[str, dict[str, Any]]:
        """Return what the browser keeps, by name, as the DevTools protocol has it."""
        kept = await self.call("POST", "/goog/cdp/execute", cmd="Storage.getCookies", params={})
        return {cookie["name"]: cookie for cookie in kept["cookies"]}

    async def call(self, method: str, path: str, **parameters: Any) -> Any:
        """Send a command of the protocol, and return the value of its answer."""
        return await _call(self._http, method, f"{self._session}{path}", parameters)


@contextlib.asynccontextmanager
async def chromium(driver: str) -> AsyncIterator[Browser]:
    """Start a browser by a chromedriver at this address."""
    wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": OPTIONS}}
    async with aiohttp.ClientSession(driver) as http:
        capabilities = {"capabilities": {"alwaysMatch": wanted}}
        answer = await _call(http, "POST", "/session", capabilities)
        session = f"/session/{answer['sessionId']}"
        try:
            yield Browser(http, session)
        finally:
            await _call(http, "DELETE", session, None)


async def _call(http: aiohttp.ClientSession, method: str, path: str, parameters: Any) -> Any:
    async with http.request(method, path, json=parameters) as response:
        value = (await response.json())["value"]
        assert response.status == 200, value
        return value
