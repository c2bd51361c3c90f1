"""Terms and presets: unlearning losses as a few lines over per-token statistics. Imports no kernel."""

from fastforget.objectives.flat import FLAT
from fastforget.objectives.kto import KTO
from fastforget.objectives.layers import RMU, HiddenMSE
from fastforget.objectives.other_tokens import OtherTokens
from fastforget.objectives.pdu import DualCE, LogitMargin
from fastforget.objectives.preference import DPO, AnswerPreservation
from fastforget.objectives.presets import PRESETS, preset, retain_terms
from fastforget.objectives.refusal import JensUn, RandomMismatch, RefusalCE
from fastforget.objectives.requests import (
    LOGP,
    REFERENCE_LOGP,
    CentreRequest,
    Divergence,
    Field,
    Request,
    StateDistances,
    StateRequest,
)
from fastforget.objectives.schedules import Linear, weight_at
from fastforget.objectives.states import ClusterPull, EmbeddingDistance
from fastforget.objectives.task_vector import TaskVector, subtraction
from fastforget.objectives.terms import (
    CE,
    KL,
    NPO,
    NegatedCE,
    SideStats,
    SimNPO,
    Term,
    TokenTerm,
    layers_of,
    reaches_head,
)
from fastforget.objectives.undial import UNDIAL
from fastforget.objectives.weighted import CEU, TNPO, WGA, MaxEntropy, SatImp, Unlikelihood

__all__ = [
    "CE",
    "CEU",
    "DPO",
    "FLAT",
    "KL",
    "KTO",
    "LOGP",
    "NPO",
    "PRESETS",
    "REFERENCE_LOGP",
    "RMU",
    "TNPO",
    "UNDIAL",
    "WGA",
    "AnswerPreservation",
    "CentreRequest",
    "ClusterPull",
    "Divergence",
    "DualCE",
    "EmbeddingDistance",
    "Field",
    "HiddenMSE",
    "JensUn",
    "Linear",
    "LogitMargin",
    "MaxEntropy",
    "NegatedCE",
    "OtherTokens",
    "RandomMismatch",
    "RefusalCE",
    "Request",
    "SatImp",
    "SideStats",
    "SimNPO",
    "StateDistances",
    "StateRequest",
    "TaskVector",
    "Term",
    "TokenTerm",
    "Unlikelihood",
    "layers_of",
    "preset",
    "reaches_head",
    "retain_terms",
    "subtraction",
    "weight_at",
]
