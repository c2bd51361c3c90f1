"""fastforget: make causal language models forget chosen text, fast and in little memory."""

from importlib.metadata import PackageNotFoundError, version

from fastforget.batch import LabelCounts, count_labels
from fastforget.errors import FastforgetError, NonFiniteLossError
from fastforget.head import LMHead
from fastforget.models import load, save_adapter
from fastforget.objectives import CE, KL, NPO, NegatedCE, Term, preset
from fastforget.stats import TokenStats, divergence, token_stats, token_stats_from_logits
from fastforget.step import UnlearnLoss, UnlearnOutput, UnlearnStep

try:
    __version__ = version("fastforget")
except PackageNotFoundError:  # run from its folder, not installed
    __version__ = "unknown"

__all__ = [
    "CE",
    "KL",
    "NPO",
    "FastforgetError",
    "LMHead",
    "LabelCounts",
    "NegatedCE",
    "NonFiniteLossError",
    "Term",
    "TokenStats",
    "UnlearnLoss",
    "UnlearnOutput",
    "UnlearnStep",
    "count_labels",
    "divergence",
    "load",
    "preset",
    "save_adapter",
    "token_stats",
    "token_stats_from_logits",
]
