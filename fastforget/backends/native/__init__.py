"""The tile passes in C++ on the CPU: `csrc/`, built into the package and loaded by path."""

from fastforget.backends.native.passes import NativePasses as NativePasses

__all__ = ["NativePasses"]
