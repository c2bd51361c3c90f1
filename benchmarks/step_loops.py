"""The training loops that are measured: two as others write them, and ours with the same terms.

The peers are written from the papers' descriptions, the fair plain way: means over label tokens only (published code
averages its KL over prompt and padding, too), reference forwards without gradients, no key-value cache, one forward
for each thing that is needed, one backward over the sum of the terms. Each comes in two forms: `loop` takes the
softmaxes of its KL over all tokens and then masks, as loops are written; `loop_selected` selects the label tokens
first, which nobody does and which is a little faster. Goals are set against whichever is faster.

* `mismatch`, the method of arXiv 2310.10683: gradient ascent on the forget answers (eq. 2), cross-entropy on random
  answers to the forget prompts (eq. 3), KL(reference || model) on the retain set (eq. 5); the reference is a second
  full model. The answers are those of retain examples; the paper allows several a prompt, here it is one.
* `grad_diff`, GradDiff with a KL retain term as unlearning frameworks write it: ascent and KL; the reference is a deep
  copy of the model.

Weights of terms are 1.
The reference of 8-bit models stays in training mode as the policy does: bitsandbytes computes something else in
evaluation mode, and then the KL of a model with itself is not 0. There is no dropout anywhere (`ff.load` removes it).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastforget as ff
from benchmarks.floors import floor_together, floor_unchunked
from benchmarks.head_problem import Problem, Setting
from benchmarks.step_problem import IGNORE_INDEX, SHAPES, Batches, StepSetting
from fastforget.models import load_base

METHODS = {"mismatch": "arXiv 2310.10683", "grad_diff": "GradDiff + KL"}
LEARNING_RATE = 1e-4
LoadReference = Callable[[], Any]


class Loop:
    """A training loop: `backward` adds gradients and returns the loss, a call also takes the optimizer's step."""

    optimizer: torch.optim.Optimizer

    def backward(self, batches: Batches) -> Tensor:
        """The whole loss, detached."""
        raise NotImplementedError

    def __call__(self, batches: Batches) -> None:
        self.backward(batches)
        self.optimizer.step()
        self.optimizer.zero_grad()


class MaterialisedLoop(Loop):
    """Both peers: full logits of every sequence, and a reference with weights of its own."""

    def __init__(self, model: Any, reference: Any, *, mismatch: bool, select: bool) -> None:
        self.model, self.reference, self.mismatch, self.select = model, reference, mismatch, select
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def backward(self, batches: Batches) -> Tensor:
        loss = -self.cross_entropy(batches.forget)
        if self.mismatch:
            loss = loss + self.cross_entropy(batches.mismatch)
        loss = loss + self.kl(batches.retain)
        loss.backward()
        return loss.detach()

    def cross_entropy(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean NLL of the label tokens, as transformers computes it: all logits, ignored labels."""
        labels = next_labels(batch).to(self.device)
        return F.cross_entropy(self.logits(self.model, batch).flatten(0, 1), labels.flatten())

    def kl(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean KL(reference || model) over the label tokens."""
        kept = (next_labels(batch) != IGNORE_INDEX).to(self.device)
        with torch.no_grad():
            log_q = self.log_probabilities(self.reference, batch, kept)
        divergence = F.kl_div(
            self.log_probabilities(self.model, batch, kept), log_q, reduction="none", log_target=True
        ).sum(dim=-1)
        return (divergence if self.select else divergence[kept]).mean()

    def log_probabilities(self, model: Any, batch: Mapping[str, Tensor], kept: Tensor) -> Tensor:
        """(B, T, V), or (n, V) of the tokens whose next one is labelled."""
        logits = self.logits(model, batch)
        return torch.log_softmax(logits[kept] if self.select else logits, dim=-1)

    def logits(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, T, V), in float32 or more."""
        logits: Tensor = model(**without_labels(batch, self.device), use_cache=False).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def next_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T): the label that each token predicts."""
    return F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)


def without_labels(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What the model takes, on the device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items() if name != "labels"}


class OurLoop(Loop):
    """`UnlearnStep`. `cached`: later epochs; otherwise what the reference said is forgotten before each step."""

    def __init__(self, model: Any, *, mismatch: bool, cached: bool) -> None:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE)
        terms = [ff.NegatedCE(), *([ff.RandomMismatch()] if mismatch else []), ff.KL()]
        self.step = ff.UnlearnStep(model, self.optimizer, terms=terms)
        self.mismatch, self.cached = mismatch, cached

    def backward(self, batches: Batches) -> Tensor:
        reference = self.step.loss.reference
        if not self.cached and reference is not None:
            reference.clear()
        forget = {**batches.forget, "mismatch": batches.mismatch} if self.mismatch else batches.forget
        return self.step.backward(forget, batches.retain).loss

    def __call__(self, batches: Batches) -> None:
        self.backward(batches)
        self.step.step()
        self.step.zero_grad()


class Floor(Loop):
    """What a loop with frozen head and cached reference cannot leave out: the backbone's forwards and backwards, and
    (`products`) the bare products with the head. Its gradients are those of nothing."""

    def __init__(self, model: Any, setting: StepSetting, *, mismatch: bool, products: bool) -> None:
        self.backbone = model.get_base_model().base_model
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
        self.mismatch = mismatch
        self.products = products_of(setting, model, mismatch) if products else []

    def backward(self, batches: Batches) -> Tensor:
        for batch in (batches.forget, batches.retain, *([batches.mismatch] if self.mismatch else [])):
            states = self.backbone(**without_labels(batch, self.device), use_cache=False).last_hidden_state
            states.backward(torch.ones_like(states))
        for product in self.products:
            product()
        return torch.zeros(())


def products_of(setting: StepSetting, model: Any, mismatch: bool) -> list[Callable[[], Any]]:
    """Two products for each batch with a cross-entropy, three for the KL: policy, reference, gradient."""
    shape = SHAPES[setting.shape]
    count = setting.sequences * round(setting.length * setting.labelled)
    dtype = str(model.get_output_embeddings().weight.dtype).removeprefix("torch.")
    found = []
    for loss in ("nll", "kl", *(["nll"] if mismatch else [])):
        problem = Problem(Setting(loss, count, shape.hidden, shape.vocabulary, dtype=dtype, device=setting.device))
        build = floor_together if setting.device == "cpu" else floor_unchunked
        found.append(build(problem, known=loss == "kl"))  # the reference's embedding is cached in later epochs
    return found


@dataclass(frozen=True)
class LoopKind:
    """A row of the table. role: "floor", "ours" or "peer"."""

    about: str
    role: str


LOOPS = {
    "loop": LoopKind("the method's loop", "peer"),
    "loop_selected": LoopKind("the same, label tokens selected before the KL", "peer"),
    "ours_first": LoopKind("UnlearnStep, first epoch", "ours"),
    "ours_later": LoopKind("UnlearnStep, later epochs", "ours"),
    "floor": LoopKind("backbone and bare products", "floor"),
    "backbone": LoopKind("backbone alone", "floor"),
}


def build_loop(name: str, method: str, setting: StepSetting, model: Any, load_reference: LoadReference) -> Loop:
    """A loop around a model; only the peers ask for a reference."""
    mismatch = method == "mismatch"
    if LOOPS[name].role == "peer":
        return MaterialisedLoop(model, load_reference(), mismatch=mismatch, select=name == "loop_selected")
    if name in ("floor", "backbone"):
        return Floor(model, setting, mismatch=mismatch, products=name == "floor")
    return OurLoop(model, mismatch=mismatch, cached=name == "ours_later")


def second_model(setting: StepSetting, folder: Path, model: Any, method: str) -> LoadReference:
    """How a method gets its reference: the base once more, or a deep copy of the model."""
    if method == "grad_diff":
        return lambda: copy.deepcopy(model).requires_grad_(False)
    return lambda: load_base(str(folder), setting.bits, torch.device(setting.device)).train()
