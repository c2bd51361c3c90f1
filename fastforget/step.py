"""UnlearnStep: an unlearning objective in one call of an existing training loop."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastforget import fusing
from fastforget.batch import Batch, LabelCounts, check_counts, count_labels, sides_of
from fastforget.collectives import most, process_count
from fastforget.combine import SideGradients, SummedGradients, check_sides, warn_of_standstill
from fastforget.complete_reference import Batches, CompleteReference
from fastforget.errors import FastforgetError
from fastforget.guard import Guard, GuardSettings
from fastforget.loss import UnlearnLoss
from fastforget.loss_plan import named_terms
from fastforget.memory import FittingRows, check_micro_batch, let_inputs_require_grad, row_count
from fastforget.objectives import Term, preset
from fastforget.output import UnlearnOutput, add_outputs
from fastforget.processes import accelerated, check_parallel, run_together
from fastforget.reference import DEFAULT_CACHE_BYTES
from fastforget.reference_folder import DEFAULT_FOLDER_BYTES
from fastforget.rollback import gradients_as_before
from fastforget.shards import check_engine, reshard
from fastforget.term_state import TermStates

MicroBatch = int | Literal["auto"] | None


class UnlearnStep(torch.optim.Optimizer):
    """An optimizer over the trainable parameters that also computes the unlearning loss and its gradients.

        step = UnlearnStep(model, torch.optim.AdamW, terms=preset("npo"), lr=1e-4)
        for forget, retain in loader:
            out = step(forget, retain)

    Args:
        model: a Hugging Face causal LM, with a PEFT adapter where a term needs the reference.
        optimizer: an optimizer class, made here over the trainable parameters with `optimizer_arguments`, or an
            optimizer that exists, which is taken over. Parameter groups may be given as `params`.
        terms, backend, reference_cache_bytes, reference_cache_folder, reference_cache_folder_bytes, reference, passes:
            as in `UnlearnLoss`. Sides that are combined need passes of their own.
        combine: how the gradient of the forget terms and that of the retain terms become one: "sum", "mgda" (the
            shortest vector between them) or "pcgrad" (each without what it has against the other); see
            `fastforget.combine`. `.grad` then holds the combination after each `backward`, also under accumulation.
        fuse: let the model's adapted and quantised layers run fused (`fastforget.fuse`), for good.
        first_micro_batch: what `micro_batch="auto"` begins with; default the whole batch.
        guard: skips a step whose loss or gradient is NaN or infinite, takes back the update that led there, counts it
            in `step.guard.skipped`, and gives up after some in a row (`fastforget/guard.py`). It keeps one more copy of
            the trainable weights; None: no guard.

    Everything that `torch.optim.Optimizer` promises is the base optimizer's: `param_groups`, `state`, `state_dict`.
    A copied or unpickled step has no model; `attach` gives it one. The number of steps taken after a `backward` lies in
    `param_groups[0]["unlearn_steps"]`, where `state_dict` carries it, and so do terms' own scalars (`term_state.py`),
    updated after each of these steps by the values that its whole batch had.

    Raises:
        FastforgetError: nothing trains, or `combine` is unknown or lacks a side.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer,
        terms: Sequence[Term] | str,
        *,
        backend: str = "auto",
        reference_cache_bytes: int = DEFAULT_CACHE_BYTES,
        reference_cache_folder: str | os.PathLike[str] | None = None,
        reference_cache_folder_bytes: int = DEFAULT_FOLDER_BYTES,
        reference: nn.Module | Literal["cache"] | None = None,
        passes: str = "sequential",
        combine: str = "sum",
        fuse: bool = True,
        first_micro_batch: int | None = None,
        guard: GuardSettings | None = GuardSettings(),  # noqa: B008 (it is frozen)
        **optimizer_arguments: Any,
    ) -> None:
        check_engine(model, optimizer)
        reshard(model)  # an optimizer's parameters are the shards
        if isinstance(optimizer, torch.optim.Optimizer):
            if optimizer_arguments:
                unexpected = next(iter(optimizer_arguments))
                raise FastforgetError(f"the optimizer exists already: {unexpected} cannot be set here; set it there")
            self.base = optimizer
        else:
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            if not trainable:
                raise FastforgetError("no parameter of the model requires a gradient: add an adapter (fastforget.load)")
            self.base = optimizer(optimizer_arguments.pop("params", trainable), **optimizer_arguments)
        self._options: dict[str, Any] = {
            "backend": backend,
            "reference_cache_bytes": reference_cache_bytes,
            "reference_cache_folder": reference_cache_folder,
            "reference_cache_folder_bytes": reference_cache_folder_bytes,
            "passes": passes,
        }
        self._terms = preset(terms) if isinstance(terms, str) else list(terms)
        check_sides(combine, self._terms, passes)
        warn_of_standstill(combine, self._terms)
        self._combine = combine
        self._fuse = fuse
        check_micro_batch(first_micro_batch)
        self._first_micro_batch = first_micro_batch
        self._guard_settings = guard
        if guard is not None:
            guard.check(self._terms)
        self._start()
        own = {id(parameter) for parameter in model.parameters()}
        if not any(id(parameter) in own for parameter in self._held()):
            raise FastforgetError("none of the optimizer's parameters belong to the model: a step would train nothing")
        self.attach(model, reference)

    def _start(self) -> None:
        """What torch.optim.Optimizer keeps for itself, with the groups and the state left to the base optimizer."""
        defaults = self.base.defaults
        torch.optim.Optimizer.__setstate__(self, {})  # hooks, and the wrapper that runs them around step()
        self.base.defaults = defaults
        self.param_groups[0].setdefault("unlearn_steps", 0)
        self._states = TermStates(named_terms(self._terms), self.base)
        self.guard = Guard(self._guard_settings, self.base)
        self._backward_pending = False
        self._gradients = SummedGradients() if self._combine == "sum" else SideGradients(self._combine)
        self._fitting = FittingRows(self._first_micro_batch)
        self._loss: UnlearnLoss | None = None
        self._accelerator: Any = None
        self._parameters: list[Tensor] = []  # whose gradients a failed `backward` puts back, and their ids
        self._own: set[int] = set()

    param_groups = property(
        lambda self: self.base.param_groups, lambda self, groups: setattr(self.base, "param_groups", groups)
    )
    state = property(lambda self: self.base.state, lambda self, state: setattr(self.base, "state", state))
    defaults = property(
        lambda self: self.base.defaults, lambda self, defaults: setattr(self.base, "defaults", defaults)
    )

    def attach(self, model: nn.Module, reference: nn.Module | Literal["cache"] | None = None) -> None:
        """Give a step its model, and a reference of its own: at the start, or after copying or unpickling it."""
        self._adopt(model)
        if self._fuse:
            fusing.fuse(model)
        let_inputs_require_grad(model)
        self._reference = reference
        before = None if self._loss is None else self._loss.reference
        self._loss = UnlearnLoss(model, self._terms, reference=reference, **self._options)
        now = self._loss.reference
        if isinstance(before, CompleteReference) and isinstance(now, CompleteReference):
            if before.backbone.model is now.backbone.model:  # of another one it knows nothing
                now.take_over(before)
        self._loss.term_states = self._states
        self._parameters = list(model.parameters())
        self._own = set(map(id, self._parameters))

    def _held(self) -> list[Tensor]:
        """The parameters of all groups."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _adopt(self, model: nn.Module) -> None:
        """A copied step holds copies of the parameters: put the model's own in their places, with their state."""
        own = {id(parameter) for parameter in model.parameters()}
        held = self._held()
        if any(id(parameter) in own for parameter in held):
            return
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if [parameter.shape for parameter in held] != [parameter.shape for parameter in trainable]:
            raise FastforgetError("the model's trainable parameters do not match those of the copied step")
        new = dict(zip(map(id, held), trainable, strict=True))
        state = [(new.get(id(key), key), value) for key, value in self.state.items()]
        self.state.clear()
        self.state.update(state)
        for group in self.param_groups:
            group["params"] = [new[id(parameter)] for parameter in group["params"]]

    @property
    def model(self) -> nn.Module:
        """The model that each forward calls, as it was given or as Accelerate wrapped it."""
        return self.loss.backbone.outer

    @property
    def loss(self) -> UnlearnLoss:
        """The loss that `backward` differentiates, with the model and the reference's cache."""
        if self._loss is None:
            raise FastforgetError("this UnlearnStep was copied or unpickled and has no model: call attach(model) first")
        return self._loss

    def cache_reference(self, batches: Batches, *, micro_batch: int | None = None) -> int:
        """As `UnlearnLoss.cache_reference`: before the first step, and before weights that have trained are loaded."""
        if self.param_groups[0]["unlearn_steps"]:
            raise FastforgetError("cache_reference: the model has been trained already; call it before the first step")
        return self.loss.cache_reference(batches, micro_batch=micro_batch)

    def __call__(self, forget: Batch, retain: Batch | None = None, *, micro_batch: MicroBatch = None) -> UnlearnOutput:
        """Backward, `step()` and `zero_grad()` in one call.

        Args:
            forget, retain: as in `UnlearnLoss.__call__`.
            micro_batch: at most so many sequences are in memory at once (a row and a companion that it is compared with
                are two, and stay together); the gradients are those of the whole batch. "auto": all at first, and from
                a step on in which memory runs out, which is taken again, half as many, with a warning.
        """
        out = self.backward(forget, retain, micro_batch=micro_batch)
        self.step()
        self.zero_grad()
        return out

    def backward(
        self,
        forget: Batch,
        retain: Batch | None = None,
        *,
        micro_batch: MicroBatch = None,
        backward: Callable[[Tensor], None] | None = None,
        counts: LabelCounts | None = None,
    ) -> UnlearnOutput:
        """Add the batch's gradients to `.grad`: of both sides one after the other, or in one pass (`passes`).

        Where anything fails, an exception of the model or of `backward` included, every `.grad` is as it was before.

        Args:
            backward: called with each pass's loss instead of `loss.backward()`: `accelerator.backward`, or `lambda
                loss: scaler.scale(loss).backward()`.
            counts: the denominators of the whole accumulated batch, by `fastforget.count_labels`. Without them each
                call's means are its own: over calls of different sizes those do not add up to the mean of the whole.
        """
        processes = self._process_count(micro_batch)
        if micro_batch == "auto":
            together = len(self.loss.plan.forwards) if self.loss.joint else 1

            def rows() -> int:
                own = together * row_count(forget, retain)
                return own if processes == 1 else most(own, self.loss.backbone.device)

            return self._fitting.find(
                lambda fitting: self.backward(forget, retain, micro_batch=fitting, backward=backward, counts=counts),
                rows,
            )
        check_micro_batch(micro_batch)
        if backward is None:
            backward = torch.Tensor.backward if self._accelerator is None else self._accelerator_backward(counts)
        taken, held = self.param_groups[0]["unlearn_steps"], self._held()

        def begin() -> LabelCounts:
            self._gradients.begin(held)
            check_counts(counts)
            return counts or count_labels([sides_of(forget, retain)])

        def run(whole: LabelCounts | None) -> UnlearnOutput:
            parts = []
            for part in self.loss.passes(forget, retain, whole, micro_batch, taken, shared=True):
                with self._gradients.side_pass(part.side, held):
                    backward(part.loss * processes if processes > 1 else part.loss)
                part.loss = part.loss.detach()
                parts.append(part)
            return add_outputs(parts)

        parameters = [*self._parameters, *(each for each in held if id(each) not in self._own)]
        trained = [each for each in parameters if each.requires_grad]
        finish = functools.partial(self._gradients.finish, held, trained)
        with gradients_as_before(parameters), self._gradients.undone_where_it_fails():
            if processes == 1:
                with self.loss.backbone.failures_told():
                    self._gradients.begin(held)
                    out = run(counts)
                    finish()
            else:
                device = self.loss.backbone.device
                out = run_together(self.model, self.loss.terms, begin, run, finish, device)
        self._backward_pending = True
        self._states.note(out.terms, is_part=counts is not None)
        self.guard.note(out, is_part=counts is not None)
        return out

    def _process_count(self, micro_batch: MicroBatch) -> int:
        """How many processes have parts of one batch; raises for what they cannot do."""
        backbone = self.loss.backbone
        check_parallel(self.model, backbone, self._combine, micro_batch)
        return 1 if backbone.shares_batches else process_count()

    def prepare(self, accelerator: Any) -> None:
        """Hand the model and the optimizer over to an `accelerate.Accelerator`; the step itself stays what is called.

        The model is then placed, wrapped and run in Accelerate's precision (`step.model` is the wrapped one), and
        `step`, `zero_grad` and `backward` follow its accumulation and its scaler: within
        `accelerator.accumulate(step.model)` an update comes after every so many calls. Each call's means are its own,
        and the update takes their mean, unless `counts` are given, of all these calls' batches: then it is the mean of
        the whole. `accelerator.save_state` and `load_state` include the step.

        Raises:
            FastforgetError: it was prepared before, or the accelerator would shard the model otherwise than by FSDP2.
        """
        if self._accelerator is not None:
            raise FastforgetError("this step was prepared already: prepare it once")
        model, self.base = accelerated(accelerator, self.model, self.base)
        self._accelerator = accelerator
        accelerator.register_load_state_pre_hook(lambda *_: self.guard.begin())
        self.attach(model, self._reference)

    def _accelerator_backward(self, counts: LabelCounts | None) -> Callable[[Tensor], None]:
        """Accelerate's backward; with `counts` losses are shares already, and are not divided once more."""
        accelerator = self._accelerator
        factor = 1 if counts is None else accelerator.gradient_accumulation_steps
        return lambda loss: accelerator.backward(loss * factor)

    def rows_at_once(self, micro_batch: MicroBatch) -> int | None:
        """The number that a `micro_batch` is by now; None: there is no limit."""
        return self._fitting.rows if micro_batch == "auto" else micro_batch

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """The base optimizer's step. Without a `backward` before it no counter moves, and nothing is guarded.

        Raises:
            NonFiniteLossError, RetainNLLError: the guard gives up, by what the step before computed. The weights are
                the last good ones.
        """
        accelerator = self._accelerator
        if accelerator is not None and not accelerator.sync_gradients:
            return None  # the gradients of more calls are to come
        if self._backward_pending:
            # a scaler looks for infinite gradients itself, to lower its scale
            self.guard.before_update(scaled=accelerator is not None and accelerator.scaler is not None)
        result = self.base.step() if closure is None else self.base.step(self.guard.around(closure))
        if self._backward_pending:
            stands = self.guard.after_update()
            if accelerator is None or not accelerator.optimizer_step_was_skipped:
                if self.loss.adalora is not None:
                    self.loss.adalora.allocate(self.param_groups[0]["unlearn_steps"])
                self.param_groups[0]["unlearn_steps"] += 1
                self._states.update(stands)
            self._backward_pending = False
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's; a `step` after it has no `backward` before it."""
        self.base.zero_grad(set_to_none=set_to_none)
        if self._accelerator is not None and not self._accelerator.sync_gradients:
            return
        self._gradients.cleared(self._held())
        self._backward_pending = False  # a scaler may have skipped the step
        self.guard.without_update()
        self._states.forget()

    def train(self) -> None:
        """Put a schedule-free base optimizer, which has modes, into its training mode."""
        if callable(switch := getattr(self.base, "train", None)):
            switch()

    def eval(self) -> None:
        """Put a schedule-free base optimizer into its evaluation mode: the weights are then those to be used."""
        if callable(switch := getattr(self.base, "eval", None)):
            switch()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The base optimizer's."""
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, with `unlearn_steps` and terms' own scalars in its first group."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; one saved by the bare optimizer counts from 0, and terms begin anew.

        The guard takes the weights that the next `backward` finds for good ones, as at the start.
        """
        self.base.load_state_dict(state_dict)
        self.param_groups[0].setdefault("unlearn_steps", 0)
        self._states.begin()
        self.guard.begin()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_terms", "_options", "_combine", "_fuse", "_first_micro_batch", "_guard_settings")
        return {"base": self.base, **{name: vars(self)[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __deepcopy__(self, memo: dict[int, Any]) -> UnlearnStep:
        other = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return other
