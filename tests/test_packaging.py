"""What an installation is made of, seen from fresh interpreters."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aiohttp_session
from aiohttp_session._core import TWINS

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
IMPLEMENTATION = "import aiohttp_session; print(aiohttp_session.IMPLEMENTATION)"
EXTENSIONS = tuple(f"aiohttp_session.{name}" for name in TWINS)
SETUP_TWICE = """
import logging, sys
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(levelname)s %(name)s %(message)s")
from aiohttp import web
from aiohttp_session import SimpleCookieStorage, setup
for _ in range(2):
    setup(web.Application(), SimpleCookieStorage())
"""
JSON_ROUND_TRIP = """
from aiohttp_session._core import decode, encode, dumps
data = {"created": 1, "session": {"a": [1.5, None, True, "é\\ud800", 2**70, float("inf")]}}
print(decode(encode(data)) == decode(dumps(data)) == data, dumps(data).isascii())
"""


def run(code: str, *, missing: tuple[str, ...] = (), **environment: str) -> str:
    """Run code in an interpreter in which some modules can't be imported; return its output."""
    code = f"import sys; sys.modules.update(dict.fromkeys({missing!r}))\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_the_environment_asks_for_pure_python() -> None:
    assert run(IMPLEMENTATION, AIOHTTP_SESSION_NO_EXTENSIONS="1") == "python"


def test_without_extensions_it_is_pure_python() -> None:
    assert run(IMPLEMENTATION, missing=EXTENSIONS) == "python"


@pytest.mark.parametrize("name", EXTENSIONS)
def test_an_incomplete_set_of_extensions_gives_pure_python_and_a_warning(name: str) -> None:
    code = f"import warnings\nwith warnings.catch_warnings(record=True) as caught: {IMPLEMENTATION}"
    printed = run(f"{code}\nprint(*[w.category.__name__ for w in caught])", missing=(name,))
    warns = not os.environ.get("AIOHTTP_SESSION_NO_EXTENSIONS")
    assert printed.split() == ["python", *(["RuntimeWarning"] if warns else [])]


def test_another_interpreter_gives_pure_python() -> None:
    assert run(f"sys.implementation.name = 'pypy'; {IMPLEMENTATION}") == "python"


def test_a_log_line_tells_of_missing_extensions_once() -> None:
    printed = run(SETUP_TWICE, missing=EXTENSIONS, AIOHTTP_SESSION_NO_EXTENSIONS="")
    assert printed.startswith("INFO aiohttp_session aiohttp-session runs in pure Python")
    assert printed.count("\n") == 0


def test_pure_python_that_was_asked_for_is_worth_no_line() -> None:
    assert run(SETUP_TWICE, missing=EXTENSIONS, AIOHTTP_SESSION_NO_EXTENSIONS="1") == ""


def test_pure_python_on_another_interpreter_is_worth_no_line() -> None:
    code = f"sys.implementation.name = 'pypy'\n{SETUP_TWICE}"
    assert run(code, missing=EXTENSIONS, AIOHTTP_SESSION_NO_EXTENSIONS="") == ""


@pytest.mark.parametrize("pure", ["", "1"])
def test_the_standard_json_serves_where_orjson_is_missing(pure: str) -> None:
    printed = run(JSON_ROUND_TRIP, missing=("orjson",), AIOHTTP_SESSION_NO_EXTENSIONS=pure)
    assert printed == "True True"


@pytest.mark.parametrize(
    ("module", "requirement", "extra"),
    [
        ("cookie_storage", "cryptography", "secure"),
        ("nacl_storage", "nacl", "pynacl"),
        ("memcached_storage", "aiomcache", "aiomcache"),
    ],
)
def test_a_missing_requirement_is_an_import_error_that_names_the_extra(
    module: str, requirement: str, extra: str
) -> None:
    code = f"try: import aiohttp_session.{module}\nexcept ImportError as error: print(error)"
    assert run(code, missing=(requirement,)).endswith(f"pip install aiohttp-session[{extra}]")


def test_a_missing_redis_is_an_error_at_construction_that_names_the_extra() -> None:
    code = (
        "from aiohttp_session.redis_storage import RedisStorage\n"
        "try: RedisStorage(None)\nexcept RuntimeError as error: print(error)"
    )
    assert run(code, missing=("redis",)).endswith("pip install aiohttp-session[aioredis]")


def test_the_package_alone_needs_no_optional_requirement() -> None:
    code = (
        "import aiohttp_session, aiohttp_session.memory_storage\n"
        "print({'cryptography', 'nacl', 'redis', 'aiomcache'} & sys.modules.keys())"
    )
    assert run(code) == "set()"


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(
        r"^(\S+) \(.*\)\n-+$", (ROOT / "CHANGES.rst").read_text("utf-8"), re.MULTILINE
    )
    assert headings[0] == aiohttp_session.__version__


@pytest.mark.parametrize("name", ["tests", "wheels"])
def test_workflows_run_only_what_they_name_and_keep_no_credentials(name: str) -> None:
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text("utf-8")
    used = re.findall(r"uses: (\S+)", text)
    assert used
    for action in used:
        assert action.startswith("./") or re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action)
    checkouts = re.findall(r"uses: actions/checkout@.*\n(.*\n.*)\n", text)
    assert len(checkouts) == text.count("actions/checkout")
    assert all(lines.split() == ["with:", "persist-credentials:", "false"] for lines in checkouts)
    assert re.search(r"^permissions:\n  contents: read\n\n", text, re.MULTILINE)
    assert re.findall(r"^ +permissions:\n((?: +[\w-]+: write\n)+)", text, re.MULTILINE) == (
        ["      id-token: write\n"] if name == "wheels" else []
    )
