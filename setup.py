"""Builds `csrc/` into the package; everything else is in pyproject.toml.

`csrc/` is plain C++17 behind a C ABI. It includes neither Python's headers nor torch's and is loaded by path with
ctypes, so one library serves every Python and every torch: its file name carries no Python ABI suffix and the wheel is
tagged `py3-none-<platform>`. Without a compiler the package still installs, and `fastforget doctor` says so. With
FASTFORGET_PURE=1 it is left out, and the wheel is for any platform.
"""

import os
import sys
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

PURE = os.environ.get("FASTFORGET_PURE") == "1"
SUFFIX = ".dll" if sys.platform == "win32" else ".so"  # fastforget/backends/native/library.py knows them too


class BuildLibrary(build_ext):
    """Builds an extension as a plain shared library: its own name, its own exports, nothing of Python's linked in."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + SUFFIX

    def get_export_symbols(self, ext):
        return ext.export_symbols  # not PyInit_*, which Windows would demand

    def get_libraries(self, ext):
        return ext.libraries

    def build_extension(self, ext):
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args = ["/std:c++17", "/O2"]
            super().build_extension(ext)
            return
        # torch's threads are OpenMP's: with it, both share one pool. Without it (Apple's clang) threads are made anew.
        for threading in (["-fopenmp"], ["-pthread"]):
            # no contraction: a * s - b * s must be 0 where a is b; what may be fused is written as multiply_add
            ext.extra_compile_args = [
                "-std=c++17",
                "-O3",
                "-ffp-contract=off",
                "-g0",
                "-fvisibility=hidden",
                *threading,
            ]
            ext.extra_link_args = threading
            try:
                super().build_extension(ext)
                return
            except (CompileError, LinkError):
                if threading == ["-pthread"]:
                    raise


class PlatformWheel(bdist_wheel):
    """Tags the wheel for every Python 3 of one platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]  # "any" where there is no library


LIBRARY = Extension(
    "fastforget._csrc",
    sources=sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h")),
    include_dirs=["csrc"],
    language="c++",
    optional=True,
)

setup(
    packages=[*find_packages(include=["fastforget", "fastforget.*"]), "fastforget_kernels"],
    ext_modules=[] if PURE else [LIBRARY],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
