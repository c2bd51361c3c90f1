"""fastforget: make causal language models forget chosen text, fast and in little memory."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from fastforget.adapters import save_adapter, task_vector
from fastforget.batch import LabelCounts, count_labels
from fastforget.clusters import cluster_centres, load_centres
from fastforget.compiling import compile_layers
from fastforget.data.answers import mismatched, with_refusals
from fastforget.data.batches import batches
from fastforget.data.examples import collate
from fastforget.data.refusals import REFUSALS
from fastforget.data.sources import examples
from fastforget.errors import DivergenceError, FastforgetError, NonFiniteLossError, RetainNLLError
from fastforget.fusing import FuseReport, fuse, unfuse
from fastforget.guard import GuardSettings
from fastforget.head import LMHead
from fastforget.loss import UnlearnLoss
from fastforget.merging import merge
from fastforget.models import load
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
    OtherTokens,
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
from fastforget.output import UnlearnOutput
from fastforget.plan import plan
from fastforget.stats import TokenStats, divergence, hidden_stats, token_stats, token_stats_from_logits
from fastforget.step import UnlearnStep
from fastforget.vocabulary import VocabularyShard

if TYPE_CHECKING:
    from fastforget.integrations.trainer import UnlearnTrainer, UnlearnTrainerMixin
    from fastforget.jobs.demo import demo
    from fastforget.jobs.memorise import tiny_model
    from fastforget.jobs.unlearn import unlearn
else:
    # slow to import (transformers, rich): done at their first use
    _LATE = {
        "UnlearnTrainer": "integrations.trainer",
        "UnlearnTrainerMixin": "integrations.trainer",
        "demo": "jobs.demo",
        "tiny_model": "jobs.memorise",
        "unlearn": "jobs.unlearn",
    }

    def __getattr__(name):
        if name not in _LATE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(f"fastforget.{_LATE[name]}"), name)
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
    "DivergenceError",
    "DualCE",
    "EmbeddingDistance",
    "FastforgetError",
    "FuseReport",
    "GuardSettings",
    "HiddenMSE",
    "JensUn",
    "LMHead",
    "LabelCounts",
    "Linear",
    "LogitMargin",
    "MaxEntropy",
    "NegatedCE",
    "NonFiniteLossError",
    "OtherTokens",
    "RandomMismatch",
    "RefusalCE",
    "RetainNLLError",
    "SatImp",
    "SimNPO",
    "TaskVector",
    "Term",
    "TokenStats",
    "TokenTerm",
    "UnlearnLoss",
    "UnlearnOutput",
    "UnlearnStep",
    "UnlearnTrainer",
    "UnlearnTrainerMixin",
    "Unlikelihood",
    "VocabularyShard",
    "batches",
    "cluster_centres",
    "collate",
    "compile_layers",
    "count_labels",
    "demo",
    "divergence",
    "examples",
    "fuse",
    "hidden_stats",
    "load",
    "load_centres",
    "merge",
    "mismatched",
    "plan",
    "preset",
    "save_adapter",
    "task_vector",
    "tiny_model",
    "token_stats",
    "token_stats_from_logits",
    "unfuse",
    "unlearn",
    "with_refusals",
]
