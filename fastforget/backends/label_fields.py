"""The fields of the CPU library's label passes, and which of them ask for moments."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

FIELDS = (
    "logp",
    "lse",
    "label_logit",
    "log_not_label",
    "max_logit",
    "logit_mean",
    "logp_mean",
    "logp_var",
    "label_slope",
    "row_scale",
    "lse_others",
    "others_entropy",
)  # rows of the float32 result; label_slope: of the softcap at z_y; row_scale: what the written row was multiplied with
MEASURED = ("max_logit", "logit_mean", "logp_mean", "logp_var", "others_entropy")  # by the pass with moments alone
MOMENTS = {*MEASURED, "argmax", "entropy"}


class LabelFields:
    """Where a label pass writes its fields: `values` (12, n), and `argmax` (n,), which asks for the moments too."""

    def __init__(self, labels: Tensor, names: Collection[str]) -> None:
        self.values = torch.empty(len(FIELDS), len(labels), dtype=torch.float32)
        self.argmax = torch.empty_like(labels) if MOMENTS & set(names) else None

    def __getitem__(self, name: str) -> Tensor:
        return self.values[FIELDS.index(name)]

    def told(self) -> dict[str, Tensor]:
        """Those that are statistics, by name."""
        names = ["logp", "lse", "label_logit", "log_not_label"]
        if self.argmax is None:
            return {name: self[name] for name in names}
        found = {name: self[name] for name in (*names, *MEASURED)}
        return {**found, "entropy": -found["logp_mean"], "argmax": self.argmax}
