"""OpenUnlearning as a host (arXiv 2506.12618): its methods by their names and arguments, computed by fastforget.

In its `src/trainer/__init__.py`, after its own trainers are registered, one line replaces those that are here:

    TRAINER_REGISTRY.update(open_unlearning.trainers(FinetuneTrainer))

Configurations, data sets, collators and evaluators stay as they are. Where its formulas are the papers', the losses are
equal; where its code does something else the papers' formulas are computed, and each method below says what differs.
It must run on the transformers that fastforget needs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from accelerate.utils import is_peft_model
from torch import nn

from fastforget import objectives
from fastforget.backbone import Backbone
from fastforget.batch import IGNORE_INDEX, Batch
from fastforget.errors import FastforgetError
from fastforget.head import base_causal_lm
from fastforget.integrations.trainer import UnlearnTrainerMixin
from fastforget.loss_plan import named_terms, plan_loss
from fastforget.objectives import Term

MODEL_INPUTS = ("input_ids", "attention_mask", "labels")  # what OpenUnlearning's trainers take of a batch


@dataclass(frozen=True, kw_only=True)
class Method:
    """What `method_args` of a configuration say, with OpenUnlearning's defaults; this one is its GradAscent."""

    def prepare(self, model: nn.Module) -> None:
        """Make of the model what the method trains."""

    def terms(self, model: nn.Module) -> list[Term]:
        """The loss."""
        return [objectives.NegatedCE()]

    def forget(self, batch: Mapping[str, Any]) -> Batch:
        """The forget batch of what the host's collator returned under that name."""
        return {key: batch[key] for key in MODEL_INPUTS}


@dataclass(frozen=True, kw_only=True)
class GradDiff(Method):
    """gamma × forget loss + alpha × retain loss, "NLL" or "KL"; a factor of 0 leaves its side out.

    OpenUnlearning's KL is a sum over prompt, answer and padding of a sequence, here it is the mean over label tokens.
    """

    term: ClassVar[type[Term]] = objectives.NegatedCE  # on the forget set; takes the method's own arguments
    gamma: float = 1.0
    alpha: float = 1.0
    retain_loss_type: str = "NLL"

    def terms(self, model: nn.Module) -> list[Term]:
        common = {each.name for each in fields(GradDiff)}
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in common}
        return [*([self.term(weight=self.gamma, **own)] if self.gamma else []), *self.retain_terms()]

    def retain_terms(self) -> list[Term]:
        """What keeps the retain set."""
        retain: dict[str, type[Term]] = {"NLL": objectives.CE, "KL": objectives.KL}
        if self.retain_loss_type not in retain:
            raise FastforgetError(f"retain_loss_type must be NLL or KL, not {self.retain_loss_type!r}")
        return [retain[self.retain_loss_type](weight=self.alpha)] if self.alpha else []


@dataclass(frozen=True, kw_only=True)
class NPO(GradDiff):
    """NPO."""

    term = objectives.NPO
    beta: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SimNPO(GradDiff):
    """SimNPO."""

    term = objectives.SimNPO
    delta: float = 0.0
    beta: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DPO(GradDiff):
    """DPO of the "alternate" over the "original" answer, both of which the forget batch holds."""

    term = objectives.DPO
    beta: float = 1.0

    def forget(self, batch: Mapping[str, Any]) -> Batch:
        return {**super().forget(batch["original"]), "refusal": super().forget(batch["alternate"])}


@dataclass(frozen=True, kw_only=True)
class UNDIAL(GradDiff):
    """UNDIAL; OpenUnlearning's mean is over prompt and padding too, here it is over the label tokens."""

    term = objectives.UNDIAL
    beta: float = 1.0


@dataclass(frozen=True, kw_only=True)
class WGA(GradDiff):
    """Weighted gradient ascent."""

    term = objectives.WGA
    beta: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SatImp(GradDiff):
    """SatImp."""

    term = objectives.SatImp
    alpha: float = 0.1
    beta1: float = 5.0
    beta2: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CEU(Method):
    """CE-U, which leaves the first tokens of each answer out (arXiv 2503.01224, footnote on its settings)."""

    ignore_first_n_answer_tokens: int = 1

    def terms(self, model: nn.Module) -> list[Term]:
        return [objectives.CEU()]

    def forget(self, batch: Mapping[str, Any]) -> Batch:
        labels = batch["labels"]
        labelled = labels != IGNORE_INDEX
        first = labelled & (labelled.cumsum(dim=-1) <= self.ignore_first_n_answer_tokens)
        return {**super().forget(batch), "labels": labels.masked_fill(first, IGNORE_INDEX)}


@dataclass(frozen=True, kw_only=True)
class RMU(GradDiff):
    """RMU, of the layer whose name `module_regex` matches; the weights that train are those that a pattern matches.

    A model with an adapter trains that, whatever the patterns say. Distances are means over the width, as in
    OpenUnlearning. It takes the states of the label tokens themselves, and over a batch mixes the lengths of all its
    sequences; here they are the states that predict label tokens, averaged over each answer and then over the answers.
    """

    retain_loss_type: str = "EMBED_DIFF"
    module_regex: str = r"model\.layers\.7"
    trainable_params_regex: tuple[str, ...] = (r"model\.layers\.(5|6|7)\.mlp\.down_proj\.weight",)
    steering_coeff: float = 20.0

    def prepare(self, model: nn.Module) -> None:
        if is_peft_model(model):
            return
        names = []
        for name, parameter in model.named_parameters():
            parameter.requires_grad = any(re.fullmatch(pattern, name) for pattern in self.trainable_params_regex)
            names += [name] if parameter.requires_grad else []
        if not names:
            raise FastforgetError(f"trainable_params_regex matches no weight: {list(self.trainable_params_regex)}")

    def terms(self, model: nn.Module) -> list[Term]:
        layer, width = self.layer(model), base_causal_lm(model).config.get_text_config().hidden_size
        mean: dict[str, Any] = {"layer": layer, "reduction": "sequence"}  # over the width: the terms are sums over it
        forget = objectives.RMU(c=self.steering_coeff, weight=self.gamma / width, **mean)
        if self.retain_loss_type != "EMBED_DIFF":
            retain = self.retain_terms()
        else:
            retain = [objectives.HiddenMSE(weight=self.alpha / width, **mean)] if self.alpha else []
        return [forget, *retain]

    def layer(self, model: nn.Module) -> int:
        """The number of the layer of that name."""
        stack = list(Backbone(model).stack())
        named = base_causal_lm(model).named_modules()
        layers = [
            stack.index(module) for name, module in named if re.fullmatch(self.module_regex, name) and module in stack
        ]
        if len(layers) != 1:
            raise FastforgetError(f"module_regex {self.module_regex!r} matches {len(layers)} layers: it must match one")
        return layers[0]


METHODS: dict[str, type[Method]] = {
    "GradAscent": Method,
    **{method.__name__: method for method in (GradDiff, NPO, SimNPO, DPO, UNDIAL, WGA, SatImp, CEU, RMU)},
}


class OpenUnlearningMixin(UnlearnTrainerMixin):
    """What makes OpenUnlearning's `FinetuneTrainer` run a method through fastforget.

    Its batches are taken as they are: {"forget": batch, "retain": batch}. The reference is the model with its adapter
    off, or for full fine-tuning a frozen copy; what it says of an example is computed once.

    Args:
        tokenizer, and a method's own arguments: as OpenUnlearning gives them. Others: as in `UnlearnTrainerMixin`.

    Raises:
        FastforgetError: arguments out of range; and, once training begins, what `UnlearnStep` raises: UNDIAL and "KL"
            need a head that does not train.
    """

    method_class: ClassVar[type[Method]]

    def __init__(self, model: nn.Module, args: Any = None, *, tokenizer: Any = None, **options: Any) -> None:
        names = {field.name for field in fields(self.method_class)} & options.keys()
        self.method = self.method_class(**{name: options.pop(name) for name in names})
        self.method.prepare(model)
        terms = self.method.terms(model)
        super().__init__(model, args, terms=terms, processing_class=tokenizer, **options)
        self.tokenizer = tokenizer  # for FinetuneTrainer's evaluators
        if not is_peft_model(model) and plan_loss(named_terms(terms)).asks_reference:
            self.step_options["reference"] = copy.deepcopy(self.model).requires_grad_(False).eval()

    def sides(self, batch: Mapping[str, Any]) -> tuple[Batch, Batch | None]:
        """The forget and the retain batch that the method looks at."""
        retain = batch.get("retain")
        return self.method.forget(batch["forget"]), None if retain is None else Method.forget(self.method, retain)


def trainers(base: type) -> dict[str, type]:
    """Return trainers by their names in OpenUnlearning's registry.

    Args:
        base: its `FinetuneTrainer`, whose evaluation they keep; or `transformers.Trainer`.
    """
    return {
        name: type(name, (OpenUnlearningMixin, base), {"method_class": method, "__doc__": method.__doc__})
        for name, method in METHODS.items()
    }
