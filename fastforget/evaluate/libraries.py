"""The libraries of the field's standard measures, which are extras."""

from __future__ import annotations

import importlib
from typing import Any

from fastforget.errors import FastforgetError


def library(name: str, what: str, extra: str = "evaluate") -> Any:
    """Import a library of an extra; raise FastforgetError, which says what needs it, where it is missing.

    >>> library("math", "a sum").fsum([1, 2])
    3.0
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise FastforgetError(f'{what} needs {package}: pip install "fastforget[{extra}]" ({error})') from error
