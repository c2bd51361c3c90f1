"""UnlearnTrainer: unlearning in the Trainer of transformers, or in one derived from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from fastforget.backbone import without_dropout
from fastforget.batch import Batch, LabelCounts, count_labels, rows_of, sides_of
from fastforget.integrations.rows import PairedRows, flat_rows, row_collator
from fastforget.loss import UnlearnLoss
from fastforget.objectives import Term
from fastforget.output import UnlearnOutput, add_outputs, add_to
from fastforget.processes import sum_counts, sum_outputs, without_buffer_broadcast
from fastforget.shards import is_sharded
from fastforget.step import UnlearnStep

LOSS_OPTIONS = (  # of an UnlearnStep's arguments, those that are an UnlearnLoss's too
    "backend",
    "reference_cache_bytes",
    "reference_cache_folder",
    "reference_cache_folder_bytes",
    "reference",
)
TrainerBase: Any = transformers.Trainer if TYPE_CHECKING else object


class EpochOfPairs(transformers.TrainerCallback):
    """Tells pairs which epoch begins: Trainer tells its sampler, and the data set only where that has no epochs."""

    def __init__(self, pairs: PairedRows) -> None:
        self.pairs = pairs

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Deal this epoch's retain rows; in the middle of an epoch that is resumed too."""
        self.pairs.set_epoch(int(state.epoch or 0))


class UnlearnTrainerMixin(TrainerBase):
    """What makes a Trainer unlearn: `class UnlearnSFTTrainer(UnlearnTrainerMixin, trl.SFTTrainer)` is another one.

        trainer = ff.UnlearnTrainer(model, args, terms="npo", forget_dataset=forget, retain_dataset=retain)
        trainer.train()

    The optimizer is an `UnlearnStep` around the one that Trainer makes or is given, so checkpoints hold the scalars of
    terms' own and the number of steps, and a resumed run goes on as one that was not interrupted. Means are over all
    that one optimizer step sees: micro-batches and processes are counted together, forget and retain apart. Beside
    "loss" the value of each term and the mean NLL of each side are logged.

    Args:
        terms: as in `UnlearnStep`; step_options: its other arguments by name (backend, combine, ...).
        forget_dataset, retain_dataset: rows with `input_ids` and `labels` (and companions), or examples of
            `fastforget.data`; a batch has as many pairs as Trainer's batch size says, an epoch is one pass over the
            forget set. Or `train_dataset`: rows with a `role` each, or pairs; a `data_collator` of yours returns flat
            batches, or {"forget": batch, "retain": batch}.
        eval_dataset: rows with a `role`, or (forget rows, retain rows). `evaluate` reports the loss, its terms and the
            NLLs over the whole set.
        measure: called with the model at each evaluation, dropout and gradients off; the figures that it returns are
            among the metrics.
        micro_batch: as in `UnlearnStep.__call__`; Trainer's own accumulation works too.

    Other arguments go to the Trainer.

    Raises:
        FastforgetError: as `UnlearnStep` raises, once training begins.
    """

    control: Any  # Trainer's own

    def __init__(
        self,
        model: nn.Module | str,
        args: Any = None,
        *,
        terms: Sequence[Term] | str,
        forget_dataset: Sequence[Any] | None = None,
        retain_dataset: Sequence[Any] | None = None,
        measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
        micro_batch: int | None = None,
        step_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if forget_dataset is not None:
            options["train_dataset"] = PairedRows(forget_dataset, retain_dataset)
        if isinstance(options.get("eval_dataset"), tuple):
            options["eval_dataset"] = flat_rows(*options["eval_dataset"])
        padding = getattr(options.get("processing_class"), "pad_token_id", None)
        options.setdefault("data_collator", row_collator(0 if padding is None else padding))
        self.terms, self.measure, self.micro_batch = terms, measure, micro_batch
        self.step_options = dict(step_options or {})
        self.unlearn_step: UnlearnStep | None = None
        self._own_loss: UnlearnLoss | None = None
        self._begin_log()
        super().__init__(model=model, args=args, **options)
        self.args.remove_unused_columns = False  # which would remove `role`
        if isinstance(self.train_dataset, PairedRows):
            self.add_callback(EpochOfPairs(self.train_dataset))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, as the base of an `UnlearnStep`."""
        optimizer = super().create_optimizer(model)
        if not isinstance(optimizer, UnlearnStep):
            optimizer = UnlearnStep(self.model, optimizer, self.terms, **self.step_options)
        self.optimizer = self.unlearn_step = optimizer
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, LabelCounts | None]:
        """The batches of one optimizer step, and what they count in this process."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        assert self.unlearn_step is not None
        self.unlearn_step.zero_grad()  # Trainer clears the model's gradients, of which the step knows nothing
        self._logged_steps += 1
        return batches, count_labels(self.sides(batch) for batch in batches) if batches else None

    def sides(self, batch: Mapping[str, Any]) -> tuple[Batch, Batch | None]:
        """The forget and the retain batch of what the collator returned: a flat batch, or one with both by name."""
        return (batch["forget"], batch.get("retain")) if "forget" in batch else sides_of(batch, None)

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: LabelCounts | None = None
    ) -> Tensor:
        """Add one batch's gradients; returns its share of the loss of the optimizer step's whole batch."""
        step, accelerator = self.unlearn_step, self.accelerator
        assert step is not None
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        # Trainer has wrapped it since the optimizer was made, or sharded it, which leaves it the same object
        if step.model is not model or step.loss.backbone.sharded != is_sharded(model):
            step.attach(model, self.step_options.get("reference"))
        out = step.backward(
            *self.sides(self._prepare_inputs(inputs)),
            backward=lambda loss: accelerator.backward(loss * accelerator.gradient_accumulation_steps),
            counts=num_items_in_batch,
            micro_batch=self.micro_batch,
        )
        add_to(self._logged, {**out.terms, **out.stats})
        return out.loss.to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: LabelCounts | None = None,
    ) -> Any:
        """The loss of one batch with its graph, for those who call it themselves."""
        sides = self.sides(self._prepare_inputs(inputs))
        loss = self._loss_of(model)(*sides, counts=num_items_in_batch, step=self._steps_taken)
        return (loss.loss, {}) if return_outputs else loss.loss

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The loss, its terms and the NLLs, with means over the whole set; and what `measure` returns."""
        loss = self._loss_of(self.model if self.unlearn_step is None else self.unlearn_step.model)
        counts = sum_counts(count_labels(map(self.sides, self._without_repeats(dataloader))), self.args.device)
        parts: list[UnlearnOutput] = []
        with torch.no_grad(), without_dropout(self.model), without_buffer_broadcast(loss.backbone.outer):
            for batch in self._without_repeats(dataloader):
                sides, step = self.sides(self._prepare_inputs(batch)), self._steps_taken
                parts += loss.passes(*sides, counts=counts, step=step, shared=True)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        out = sum_outputs(add_outputs(parts), loss.terms, self.args.device)
        metrics = {"loss": float(out.loss), **self.figures({**out.terms, **out.stats})}
        if self.measure is not None:
            with torch.no_grad(), without_dropout(self.model):
                metrics |= self.measure(self.model)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        number = self.num_examples(dataloader)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=number)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each term and NLL since the last log to a log of training."""
        if "loss" in logs and self._logged_steps:
            logs |= self.figures(self._logged, self._logged_steps)
            self._begin_log()
        super().log(logs, start_time)

    def figures(self, totals: Mapping[str, Tensor], steps: int = 1) -> dict[str, float]:
        """What is reported of terms and NLLs that so many optimizer steps (or an evaluation) added up to `totals`."""
        return {name: float(total) / steps for name, total in totals.items()}

    def _without_repeats(self, dataloader: Any) -> Iterator[Mapping[str, Any]]:
        """The batches of this process; of the last ones without the rows that Accelerate repeats to fill them up."""
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes
        for batch in dataloader:
            if processes > 1 and state.end_of_dataloader and state.remainder > 0:
                batch = own_rows(batch, state.remainder, self.accelerator.process_index)
            yield batch

    def _begin_log(self) -> None:
        self._logged: dict[str, Tensor] = {}
        self._logged_steps = 0

    @property
    def _steps_taken(self) -> int:
        """Optimizer steps, of which scheduled weights are functions."""
        return 0 if self.unlearn_step is None else self.unlearn_step.param_groups[0]["unlearn_steps"]

    def _loss_of(self, model: nn.Module) -> UnlearnLoss:
        """The loss over a model, the step's own where it is that of the step; else one that is made once."""
        if self.unlearn_step is not None and self.unlearn_step.model is model:
            return self.unlearn_step.loss
        if self._own_loss is None or self._own_loss.backbone.outer is not model:
            options = {key: self.step_options[key] for key in LOSS_OPTIONS if key in self.step_options}
            self._own_loss = UnlearnLoss(model, self.terms, **options)
        return self._own_loss


def own_rows(batch: Mapping[str, Any], rows: int, place: int) -> Mapping[str, Any]:
    """Return of a process's last batch (or the batches in it) the rows that are its own.

    Args:
        rows: of the last batches of all processes in their order; what is behind them has been repeated.
        place: of the process among them.
    """
    if "input_ids" not in batch:
        sides = {name: part for name, part in batch.items() if isinstance(part, Mapping)}
        return {**batch, **{name: own_rows(part, rows, place) for name, part in sides.items()}}
    size = len(batch["input_ids"])
    return rows_of(batch, slice(min(max(rows - place * size, 0), size)), size)


class UnlearnTrainer(UnlearnTrainerMixin, transformers.Trainer):
    """`transformers.Trainer` that unlearns; see `UnlearnTrainerMixin`."""
