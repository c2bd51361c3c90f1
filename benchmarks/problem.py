"""Define what the head's benchmark computes: inputs, losses, and the float64 truth that every contestant is held to.

A loss is a formula over per-token fields of the n kept tokens (log-probs, divergences, distances). Contestants differ
in how they get at the fields and their gradients; the formula, and the inputs, are the same for all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Answer, Record

Fields = Mapping[str, Tensor]  # name -> (n,)

IGNORE_INDEX = -100
SEQUENCE = 256  # tokens: each sequence begins with its ignored ones, as a prompt before an answer does
SAMPLE = 64  # kept rows whose gradient is compared with float64
ORACLE_ROWS = 128  # rows of float64 logits at a time
CENTRES = 8
BETA = 2.5  # NPO's
MARGIN = 1.0  # the cosine distance's
P = ("flat", "memorised")
# ||error|| / ||gradient||: above it a result is flagged. Logits rounded to bfloat16 cost up to 4 % on memorised tokens.
LARGEST_ERROR = {torch.bfloat16: 0.08, torch.float32: 1e-3}


@dataclass(frozen=True)
class Setting:
    """One row of the benchmark."""

    loss: str = "nll"
    tokens: int = 8192
    hidden: int = 2048
    vocabulary: int = 50272
    ignored: float = 0.0  # share of the tokens whose label is -100
    p: str = "flat"  # or "memorised": each label's probability is about 0.999
    dtype: str = "bfloat16"
    device: str = "cuda"
    backend: str = "auto"  # of ours
    seed: int = 0
    sweep: str = ""  # "N" or "V" for a point of the scaling's lines, whichever the other points differ in

    @property
    def name(self) -> str:
        """Name the row as it is printed."""
        shape = f"N {self.tokens}, D {self.hidden}, V {self.vocabulary}, {self.dtype}"
        return f"{self.loss}, {shape}, {100 * (1 - self.ignored):.0f} % of the tokens, {self.p} p"


class Inputs:
    """A setting's tensors, on its device; what only some losses need is made when it is first asked for."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.device_name = setting, setting.device
        self.fields, self.formula = LOSSES[setting.loss]
        self.dtype: torch.dtype = getattr(torch, setting.dtype)
        count, width, vocabulary = setting.tokens, setting.hidden, setting.vocabulary
        self.device = torch.device(setting.device)
        self.generator = torch.Generator(self.device).manual_seed(setting.seed)
        drawn = torch.randn(vocabulary, width, generator=self.generator, device=self.device)
        self.weight = F.normalize(drawn, dim=1).to(self.dtype)  # with random states: logits of variance 1
        del drawn
        labels = torch.randint(vocabulary, (count,), generator=self.generator, device=self.device)
        # log V + 8 in the direction of the label's row leaves 1 - p_y near exp(-8), whatever the vocabulary
        towards = math.log(vocabulary) + 8.0 if setting.p == "memorised" else 0.0
        self.hidden = self.normal(count, width, towards=self.weight[labels], by=towards).requires_grad_()
        length = min(SEQUENCE, max(1, count // 2))
        place = torch.arange(count, device=self.device)
        ignored = place % length < round(length * setting.ignored)
        self.labels = labels.masked_fill(ignored, IGNORE_INDEX)
        self.positions = (~ignored).nonzero()[:, 0]
        self.kept_labels = labels[self.positions]
        self.sequence = place[self.positions] // length
        self.sequences = -(-count // length)

    def normal(self, *shape: int, scale: float = 1.0, towards: Tensor | None = None, by: float = 1.0) -> Tensor:
        """Draw normal numbers, add a multiple of another tensor, and round once to the setting's dtype."""
        drawn = torch.randn(*shape, generator=self.generator, device=self.device).mul_(scale)
        return (drawn if towards is None else drawn.add_(towards.float() * by)).to(self.dtype)

    @functools.cached_property
    def reference(self) -> Tensor:
        """(N, D): the frozen reference's states, a tenth away from the model's."""
        return self.normal(*self.hidden.shape, scale=0.1, towards=self.hidden.detach())

    @functools.cached_property
    def reference_logp(self) -> Tensor:
        """(n,): the reference's log-probs of the labels, which a training loop has cached."""
        return self.exact_fields(self.reference, ("logp",))["logp"].float()

    @functools.cached_property
    def centres(self) -> Tensor:
        """(K, D)."""
        return self.normal(CENTRES, self.hidden.shape[1])

    @functools.cached_property
    def exact_weight(self) -> Tensor:
        """(V, D) in float64; dropped once the truth is known."""
        return self.weight.double()

    def exact_fields(self, states: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Compute float64 fields of all kept tokens, a few at a time, without gradients."""
        with torch.no_grad():
            parts = [self.fields_at(states, rows) for rows in self.positions.split(ORACLE_ROWS)]
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def fields_at(self, states: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Compute float64 fields of a few rows of states."""
        logits = states[rows].double() @ self.exact_weight.T
        others = self.reference[rows].double() @ self.exact_weight.T if self.setting.loss == "kl" else None
        return self.fields_of(states, logits, others, rows, torch.arange(len(rows), device=self.device))

    def fields_of(
        self, states: Tensor, logits: Tensor, others: Tensor | None, rows: Tensor, places: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the loss's fields of the tokens `rows`, by their definitions, from all logits and the reference's.

        places: where the rows stand in the logits, (n, V), and others, (n, V); default: at `rows`.
        """
        where, dtype = rows if places is None else places, logits.dtype
        log_p = torch.log_softmax(logits, dim=1)
        fields = {"logp": log_p[where, self.labels[rows]]}
        if others is not None:
            log_q = torch.log_softmax(others, dim=1)
            fields["kl"] = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1)[where]
        if "distance" in self.fields:
            state, anchor = (F.normalize(each[rows].to(dtype), dim=1) for each in (states, self.reference))
            fields["distance"] = (1.0 - (state * anchor).sum(dim=1)).clamp(max=MARGIN)  # cosine, at most the margin
            fields["pull"] = (1.0 - state @ F.normalize(self.centres.to(dtype), dim=1).T).amin(dim=1)
        return fields

    @functools.cached_property
    def truth(self) -> tuple[float, Tensor, Tensor]:
        """(loss, sampled rows (k,), float64 gradient of those rows (k, D))."""
        fields = self.exact_fields(self.hidden, self.fields)
        places = torch.linspace(0, len(self.positions) - 1, min(SAMPLE, len(self.positions)), device=self.device)
        places = places.round().long()
        rows = self.positions[places]
        states = self.hidden.detach().clone().double().requires_grad_()
        sampled = self.fields_at(states, rows)
        merged = {name: fields[name].index_put((places,), sampled[name]) for name in self.fields}
        loss = self.formula(self, merged)
        (gradient,) = torch.autograd.grad(loss, states)
        del self.exact_weight
        return loss.item(), rows, gradient[rows]

    def errors(self, answer: Answer) -> Record:
        """Say how far an answer is from float64, and in "flags" what of that is too far."""
        value, rows, exact = self.truth
        loss, gradient = answer
        if gradient.shape != self.hidden.shape:
            return {"flags": [f"the gradient is {tuple(gradient.shape)}, not {tuple(self.hidden.shape)}"]}
        difference, lengths = (gradient[rows].double() - exact).norm(dim=1), exact.norm(dim=1)
        found: Record = {
            "value_error": abs(loss.item() - value),
            "gradient_error": (difference.norm() / lengths.norm()).item(),
            "worst_row": (difference / lengths).max().item(),
        }
        largest = LARGEST_ERROR[self.dtype]
        ignored = gradient[self.labels == IGNORE_INDEX]
        right = {  # NaN is too far, too
            "value": found["value_error"] <= largest * max(1.0, abs(value)),
            "gradient": found["gradient_error"] <= largest,
            "gradient of ignored tokens": bool((ignored == 0).all()),
        }
        return {**found, "flags": [name for name, near in right.items() if not near]}


def nll(inputs: Inputs, fields: Fields) -> Tensor:
    """Compute the mean NLL of the kept tokens."""
    return -fields["logp"].mean()


def npo(inputs: Inputs, fields: Fields) -> Tensor:
    """Compute NPO on each sequence's mean NLL of kept tokens: -(2/beta) mean_B log sigmoid(-beta mean(logp - ref))."""
    ratio = fields["logp"] - inputs.reference_logp
    total = ratio.new_zeros(inputs.sequences).index_add(0, inputs.sequence, ratio)
    count = ratio.new_zeros(inputs.sequences).index_add(0, inputs.sequence, torch.ones_like(ratio))
    return F.logsigmoid(-BETA * total / count).mean() * (-2.0 / BETA)


def kl(inputs: Inputs, fields: Fields) -> Tensor:
    """Compute the mean KL(reference || model) of the kept tokens."""
    return fields["kl"].mean()


def distance_cluster(inputs: Inputs, fields: Fields) -> Tensor:
    """Compute the NLL with the pull to the nearest centre and the push from the reference: one pass over both."""
    return (MARGIN - fields["distance"]).mean() + fields["pull"].mean() - fields["logp"].mean()


# name -> the fields that a loss needs, and the loss over them
LOSSES: dict[str, tuple[tuple[str, ...], Callable[[Inputs, Fields], Tensor]]] = {
    "nll": (("logp",), nll),
    "npo": (("logp",), npo),
    "kl": (("kl",), kl),
    "distance_cluster": (("logp", "distance", "pull"), distance_cluster),
}
