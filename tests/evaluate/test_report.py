"""What is printed of a job's measures."""

import io

from rich.console import Console

from fastforget.evaluate.leakage import Continuation, LeakageReport
from fastforget.evaluate.memorisation import Memorisation, MemorisationReport
from fastforget.evaluate.report import MEASURES, print_table


def report_of(passages, leak, nll, fluency):
    memorised = MemorisationReport(nll, [Memorisation(exact=leak, extraction=leak, probability=leak)] * passages)
    continuations = [Continuation("prompt", "truth", "output", leak, leak > 0.5, False)] * passages
    return LeakageReport(leak, leak, 0.0, 0.0, 0.5, fluency, memorised, continuations)


def test_table_is_whole_in_80_columns():
    sets = {"forget": 100, "retain": 48, "unseen": 24}
    before = {name: report_of(count, 1.0, 10.125, None) for name, count in sets.items()}
    after = {name: report_of(count, 0.25, 12.5, 11.5) for name, count in sets.items()}
    file = io.StringIO()
    print_table(Console(file=file, width=80), before, after)
    text = file.getvalue()
    assert all(f"{name} ({count})" in text for name, count in sets.items())
    for measure, (_, style) in MEASURES.items():
        (line,) = (line for line in text.splitlines() if measure in line)
        nll, share = "10.125 → 12.500", f"{1.0:{style}} → {0.25:{style}}"
        cell = {"NLL (nats/token)": nll, "fluency (nats/token)": "- → 11.50", "degenerate": "0% → 0%"}.get(
            measure, share
        )
        assert line.count(cell) == 3, line
