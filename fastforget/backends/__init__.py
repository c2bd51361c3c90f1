"""Who computes the statistics: `eager` (the oracle) or `chunked`, and which of them `auto` picks.

A backend is a module with three functions over *kept* rows (no ignored label among them):

    label_stats(hidden (n, D), labels (n,), head, outputs) -> {field: (n,) or (n, D)}
    divergence(hidden (n, D), ref_hidden (n, D), head, kind) -> (n,)
    state_stats(hidden (n, D), anchor (n, D) or (D,), centres (K, D), metric) -> (distance (n,), pull (n,))

all differentiable with respect to `hidden`, and the first, where it trains, to the head.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from fastforget.errors import FastforgetError

BACKENDS = ("eager", "chunked")
OUTPUTS = (
    "logp",
    "lse",
    "label_logit",
    "log_not_label",
    "max_logit",
    "logit_mean",
    "entropy",
    "logp_mean",
    "logp_var",
    "argmax",
    "expected_embedding",
)  # the fields of label_stats


def explain_auto(device: torch.device) -> tuple[str, str]:
    """The backend that `auto` picks on a device, and why."""
    return (
        "chunked",
        f"GEMM, rows, GEMM in plain torch; the only backend for {device.type} that never holds N x V logits",
    )


def pick(backend: str, device: torch.device) -> ModuleType:
    """The module of a backend named by the user.

    Raises:
        FastforgetError: an unknown name; the known ones are listed.
    """
    name = explain_auto(device)[0] if backend == "auto" else backend
    if name not in BACKENDS:
        raise FastforgetError(f"unknown backend {backend!r}: choose one of auto, {', '.join(BACKENDS)}")
    return importlib.import_module(f"fastforget.backends.{name}")
