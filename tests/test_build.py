"""What setup.py builds: with a compiler, without, and without Cython."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.once
CPYTHON = sys.implementation.name == "cpython"
BUILD = """
import sys
from setuptools import build_meta
hook, *missing = sys.argv[1:]
sys.modules.update(dict.fromkeys(missing))
getattr(build_meta, hook)("dist")
"""
COMPILES = "def answer():\n    return 42\n"
DOES_NOT_COMPILE = 'cdef extern from "there_is_no_such_header.h":\n    int answer\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a project with our build and small extensions."""
    for name in ("setup.py", "pyproject.toml", "README.rst", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("aiohttp_session/stores", "src_ext"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "aiohttp_session/__init__.py").write_text('__version__ = "1.0"\n')
    (tmp_path / "aiohttp_session/stores/__init__.py").touch()
    (tmp_path / "src_ext/_a_c.pyx").write_text(COMPILES)
    return tmp_path


def build(
    project: Path, *missing: str, hook: str = "build_wheel", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BUILD, hook, *missing],
        cwd=project,
        env={
            **os.environ,
            "AIOHTTP_SESSION_NO_EXTENSIONS": "",
            "AIOHTTP_SESSION_REQUIRE_EXTENSIONS": "",
            "CFLAGS": "-O0",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def wheel(project: Path) -> tuple[bool, bool]:
    """Return whether the wheel is for any platform, and whether something compiled is in it."""
    (path,) = (project / "dist").iterdir()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        metadata = archive.read("aiohttp_session-1.0.dist-info/WHEEL").decode()
    assert "aiohttp_session/stores/__init__.py" in names
    is_pure = path.name == "aiohttp_session-1.0-py3-none-any.whl"
    assert f"Root-Is-Purelib: {is_pure}".lower() in metadata.lower()
    return is_pure, any(Path(name).suffix in {".so", ".pyd"} for name in names)


def test_extensions_make_a_wheel_for_the_platform(project: Path) -> None:
    done = build(project, AIOHTTP_SESSION_REQUIRE_EXTENSIONS="1" if CPYTHON else "")
    assert done.returncode == 0, done.stderr
    assert wheel(project) == (not CPYTHON, CPYTHON)


def test_without_a_compiler_the_wheel_is_for_any_platform(project: Path) -> None:
    done = build(project, CC="false")
    assert done.returncode == 0, done.stderr
    assert ("warning: aiohttp-session will be pure Python, and slower" in done.stderr) is CPYTHON
    assert wheel(project) == (True, False)


def test_one_extension_that_does_not_compile_leaves_none(project: Path) -> None:
    (project / "src_ext/_b_c.pyx").write_text(DOES_NOT_COMPILE)
    done = build(project)
    assert done.returncode == 0, done.stderr
    assert wheel(project) == (True, False)


def test_extensions_that_are_not_wanted_make_a_wheel_for_any_platform(project: Path) -> None:
    done = build(project, AIOHTTP_SESSION_NO_EXTENSIONS="1")
    assert done.returncode == 0, done.stderr
    assert "will be pure Python" not in done.stderr
    assert wheel(project) == (True, False)


def test_without_cython_the_wheel_is_for_any_platform(project: Path) -> None:
    done = build(project, "Cython")
    assert done.returncode == 0, done.stderr
    assert ("will be pure Python, and slower: " in done.stderr) is CPYTHON
    assert wheel(project) == (True, False)


def test_extensions_that_are_required_and_do_not_compile_are_an_error(project: Path) -> None:
    done = build(project, CC="false", AIOHTTP_SESSION_REQUIRE_EXTENSIONS="1")
    assert (done.returncode != 0) is CPYTHON
    assert ("'false'" in done.stderr) is CPYTHON


def test_extensions_that_are_required_without_cython_are_an_error_that_says_what_to_do(
    project: Path,
) -> None:
    done = build(project, "Cython", AIOHTTP_SESSION_REQUIRE_EXTENSIONS="1")
    assert (done.returncode != 0) is CPYTHON
    assert ("pip install 'cython" in done.stderr) is CPYTHON
    assert "Traceback" not in done.stderr


def test_an_editable_install_is_a_path_for_type_checkers_too(project: Path) -> None:
    done = build(project, hook="build_editable", AIOHTTP_SESSION_NO_EXTENSIONS="1")
    assert done.returncode == 0, done.stderr
    (path,) = (project / "dist").iterdir()
    with zipfile.ZipFile(path) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert files == ["__editable__.aiohttp_session-1.0.pth"]
        assert archive.read(files[0]).decode().strip() == str(project)
