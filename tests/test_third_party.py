"""Other people's storages, middleware and sessions see what they see on the reference package."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from benchmarks import reference
from benchmarks.servers import Server
from tests.interop import third_party
from tests.waiting import PATIENCE


@pytest.fixture(scope="session")
def ports(redis_server: Server, memcached_server: Server) -> dict[str, int]:
    return {"redis": redis_server.port, "memcached": memcached_server.port}


@pytest.fixture(scope="session")
def on_the_reference(ports: dict[str, int]) -> dict[str, Any]:
    """What each scenario sees there."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [reference.python(), third_party.__file__, json.dumps(ports)],
        stdout=subprocess.PIPE,
        check=True,
        env=env,
        timeout=10 * PATIENCE,
    )
    seen = json.loads(done.stdout)
    assert isinstance(seen, dict)
    assert seen.keys() == third_party.SCENARIOS.keys()
    return seen


@pytest.mark.parametrize("name", third_party.SCENARIOS)
async def test_sees_the_same(
    name: str, ports: dict[str, int], on_the_reference: dict[str, Any]
) -> None:
    seen = await third_party.SCENARIOS[name](ports)
    assert json.loads(json.dumps(seen)) == on_the_reference[name]
