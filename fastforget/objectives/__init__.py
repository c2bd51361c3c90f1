"""Terms and presets: unlearning losses as a few lines over per-token statistics. Imports no kernel."""

from fastforget.objectives.presets import PRESETS, preset
from fastforget.objectives.states import ClusterPull, EmbeddingDistance
from fastforget.objectives.terms import CE, KL, NPO, NegatedCE, SideStats, SimNPO, StateDistances, StateRequest, Term

__all__ = [
    "CE",
    "KL",
    "NPO",
    "PRESETS",
    "ClusterPull",
    "EmbeddingDistance",
    "NegatedCE",
    "SideStats",
    "SimNPO",
    "StateDistances",
    "StateRequest",
    "Term",
    "preset",
]
