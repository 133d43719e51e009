"""Build the compiled core, or go without it; everything else is in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# Set, to anything but nothing, means yes; as at run time, see aiohttp_session/_core.py.
PURE, REQUIRED, DEBUG, TRACE = (
    bool(os.environ.get(f"AIOHTTP_SESSION_{name}"))
    for name in ("NO_EXTENSIONS", "REQUIRE_EXTENSIONS", "DEBUG_BUILD", "TRACE")
)
OPTIONS = {"define_macros": [("CYTHON_TRACE_NOGIL", "1")] if TRACE else []}
if DEBUG:
    OPTIONS["undef_macros"] = ["NDEBUG"]
    OPTIONS["extra_compile_args"] = ["/Od"] if sys.platform == "win32" else ["-O0", "-g"]
else:
    OPTIONS["define_macros"].append(("CYTHON_WITHOUT_ASSERTIONS", "1"))
# Directives at the head of a .pyx would win over these, so the checks are named only here.
CHECKS = dict.fromkeys(("boundscheck", "initializedcheck", "nonecheck", "wraparound"), DEBUG)


class BuildExt(build_ext):
    """Do without the extensions when they can't be compiled, unless they are required."""

    def run(self):  # noqa: D102
        try:
            super().run()
        except Exception as error:
            if REQUIRED:
                raise
            for compiled in self.get_outputs():  # those before the one that failed
                Path(compiled).unlink(missing_ok=True)
            self.extensions = self.distribution.ext_modules = []
            warn(error)


class BdistWheel(bdist_wheel):
    """Name the wheel after what was built: pip keeps it, and offers it to other interpreters."""

    def run(self):  # noqa: D102
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def warn(error):
    """Say why there will be no extensions; not by a Python warning, which pip 26.3 keeps quiet."""
    print(f"warning: aiohttp-session will be pure Python, and slower: {error}", file=sys.stderr)


def extensions():
    """Return the extensions to compile; none without Cython, unless they are required."""
    if PURE or sys.implementation.name != "cpython":
        return []
    try:
        from Cython.Build import cythonize  # noqa: PLC0415 - it may be missing, or not wanted
    except ImportError as error:
        if REQUIRED:
            raise SystemExit(
                f"AIOHTTP_SESSION_REQUIRE_EXTENSIONS is set, and there is no Cython: {error}. "
                "Install it (pip install 'cython >= 3.1'), or build without --no-build-isolation"
            ) from None
        warn(error)
        return []
    files = sorted(Path("src_ext").glob("*.pyx"))
    modules = [Extension(f"aiohttp_session.{p.stem}", [p.as_posix()], **OPTIONS) for p in files]
    directives = {**CHECKS, "linetrace": TRACE}
    return cythonize(modules, build_dir="build/cython", compiler_directives=directives)


setup(ext_modules=extensions(), cmdclass={"bdist_wheel": BdistWheel, "build_ext": BuildExt})
