"""Build the compiled core, or go without it; everything else is in pyproject.toml."""

import os
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
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
            self.extensions = self.distribution.ext_modules = []
            warnings.warn(f"aiohttp-session will be pure Python, and slower: {error}", stacklevel=1)


if PURE or sys.implementation.name != "cpython":
    setup()
else:
    from Cython.Build import cythonize

    files = sorted(Path("src_ext").glob("*.pyx"))
    modules = [Extension(f"aiohttp_session.{p.stem}", [p.as_posix()], **OPTIONS) for p in files]
    directives = {**CHECKS, "linetrace": TRACE}
    modules = cythonize(modules, build_dir="build/cython", compiler_directives=directives)
    setup(ext_modules=modules, cmdclass={"build_ext": BuildExt})
