"""A pytest plugin (`-p benchmarks.tell_failures`): each failure is printed when it happens, not after the last test.

A run on a GPU that ends early has then said what failed. pytest-instafail does the same, but is not on those machines.
"""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failure, in the process that collects the reports of all workers."""
    if report.failed:
        print(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}", flush=True)
