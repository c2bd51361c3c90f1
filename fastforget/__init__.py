"""fastforget: make causal language models forget chosen text, fast and in little memory."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from fastforget.batch import LabelCounts, count_labels
from fastforget.clusters import cluster_centres, load_centres
from fastforget.data.answers import mismatched, with_refusals
from fastforget.data.refusals import REFUSALS
from fastforget.divergences import divergence
from fastforget.errors import FastforgetError, NonFiniteLossError
from fastforget.fusing import FuseReport, fuse, unfuse
from fastforget.head import LMHead
from fastforget.jobs.unlearn import unlearn
from fastforget.loss import UnlearnLoss, UnlearnOutput
from fastforget.models import load, save_adapter
from fastforget.objectives import (
    CE,
    CEU,
    DPO,
    FLAT,
    KL,
    KTO,
    NPO,
    RMU,
    TNPO,
    UNDIAL,
    WGA,
    AnswerPreservation,
    ClusterPull,
    DualCE,
    EmbeddingDistance,
    HiddenMSE,
    JensUn,
    Linear,
    LogitMargin,
    MaxEntropy,
    NegatedCE,
    RandomMismatch,
    RefusalCE,
    SatImp,
    SimNPO,
    TaskVector,
    Term,
    TokenTerm,
    Unlikelihood,
    preset,
)
from fastforget.stats import TokenStats, hidden_stats, token_stats, token_stats_from_logits
from fastforget.step import UnlearnStep
from fastforget.task_vectors import task_vector

if TYPE_CHECKING:
    from fastforget.jobs.demo import demo
else:
    _LATE = {"demo": "fastforget.jobs.demo"}  # slow to import (transformers, rich): done at their first use

    def __getattr__(name):
        if name not in _LATE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(_LATE[name]), name)
        return value

    def __dir__():
        return sorted({*globals(), *_LATE})


try:
    __version__ = version("fastforget")
except PackageNotFoundError:  # run from its folder, not installed
    __version__ = "unknown"

__all__ = [
    "CE",
    "CEU",
    "DPO",
    "FLAT",
    "KL",
    "KTO",
    "NPO",
    "REFUSALS",
    "RMU",
    "TNPO",
    "UNDIAL",
    "WGA",
    "AnswerPreservation",
    "ClusterPull",
    "DualCE",
    "EmbeddingDistance",
    "FastforgetError",
    "FuseReport",
    "HiddenMSE",
    "JensUn",
    "LMHead",
    "LabelCounts",
    "Linear",
    "LogitMargin",
    "MaxEntropy",
    "NegatedCE",
    "NonFiniteLossError",
    "RandomMismatch",
    "RefusalCE",
    "SatImp",
    "SimNPO",
    "TaskVector",
    "Term",
    "TokenStats",
    "TokenTerm",
    "UnlearnLoss",
    "UnlearnOutput",
    "UnlearnStep",
    "Unlikelihood",
    "cluster_centres",
    "count_labels",
    "demo",
    "divergence",
    "fuse",
    "hidden_stats",
    "load",
    "load_centres",
    "mismatched",
    "preset",
    "save_adapter",
    "task_vector",
    "token_stats",
    "token_stats_from_logits",
    "unfuse",
    "unlearn",
    "with_refusals",
]
