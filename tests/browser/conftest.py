"""A browser, and applications that it reaches over HTTPS as any host of example.test."""

from __future__ import annotations

import datetime as dt
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.browser.driver import Browser, chromedriver, chromium

Serve: TypeAlias = Callable[[web.Application], Awaitable[int]]


@pytest.fixture(scope="session")
def driver() -> Iterator[str]:
    with chromedriver() as address:
        yield address


@pytest.fixture
async def browser(driver: str, serve: Serve) -> AsyncIterator[Browser]:
    # It ends before the servers do, and closes its connections.
    async with chromium(driver) as browser:
        yield browser


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a certificate for the hosts of example.test, and return it with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "*.example.test")])
    now = dt.datetime.now(dt.timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("*.example.test")]), False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    text = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(pem)
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(text)
    return path


@pytest.fixture
async def serve(certificate: Path) -> AsyncIterator[Serve]:
    """Serve an application over HTTPS on a free port, which is returned."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    runners = []

    async def start(app: web.Application, tls: ssl.SSLContext | None = tls) -> int:
        runner = web.AppRunner(app, shutdown_timeout=1)
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        port: int = runner.addresses[0][1]
        return port

    yield start
    for runner in runners:
        await runner.cleanup()
