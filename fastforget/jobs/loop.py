"""An unlearning job: batches, steps, guards and stopping. What `fastforget demo` and `fastforget unlearn` both run."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastforget.adapters import save_adapter, task_vector
from fastforget.backbone import training_flags_restored, without_dropout
from fastforget.batch import Batch
from fastforget.clusters import fit_centres, save_centres
from fastforget.data.batches import Cycle
from fastforget.data.examples import Example, ExampleStream
from fastforget.data.refusals import REFUSALS
from fastforget.errors import FastforgetError, NonFiniteLossError
from fastforget.jobs.companions import Companions, check_sets
from fastforget.jobs.options import JobSettings
from fastforget.jobs.until import ForgetUntilGone, level_of
from fastforget.loss import UnlearnOutput, add_outputs
from fastforget.objectives import Term, reaches_head, subtraction
from fastforget.reference import DEFAULT_CACHE_BYTES
from fastforget.step import MicroBatch, UnlearnStep

WARMUP_STEPS = 10
STREAM_EXAMPLES_FOR_CENTRES = 1024
MAX_GRAD_NORM = 1.0
Progress = Callable[[int, int, UnlearnOutput], None]  # (step, of how many, its output)


@dataclass
class JobResult:
    """What happened, step by step; NLLs are means per label token of that step's batch, before its update."""

    stopped: str = ""  # why the job ended
    steps: int = 0  # updates taken
    seconds: float = 0.0
    forget_nll: list[float] = field(default_factory=list)
    retain_nll: list[float] = field(default_factory=list)


def run_job(
    model: Any,
    tokenizer: Any,
    forget: Sequence[Example] | ExampleStream,
    retain: Sequence[Example] | ExampleStream | None,
    terms: Sequence[Term],
    settings: JobSettings,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
    refusals: Sequence[str] = REFUSALS,
    max_length: int | None = None,
    never_trained: float | None = None,
) -> JobResult:
    """Unlearn `forget` in the model's adapter, in place.

    Each step takes `batch_size` forget and, where a term wants them, as many retain examples; both sets are shuffled
    and cycled independently. Of streams the reference's cache is off, and only `max_steps` counts. A cluster pull
    without centres gets its own first, in place, computed from the retain set. Terms that need refusals or other
    prompts' answers get them fresh at each step, from `refusals` and from the retain set, in rows of at most
    `max_length` tokens (default: the model's context). A task vector is subtracted at the end, and in every checkpoint.
    With `save_steps` checkpoints go to `out/checkpoint-STEP`. With `until` a step's forget passages are those that are
    still known (`jobs/until.py`), measured by `never_trained`, the exact memorisation of passages that the model never
    saw, where there are any.

    An update is known to be good by the loss of the next step; the last one, and one that is saved, by the loss of its
    own batch once more.

    Raises:
        NonFiniteLossError: the loss, its gradient or a weight is no finite number. The model then holds the last
            adapter whose loss was finite, and no checkpoint is of a later one.
        FastforgetError: no terms, terms on the retain set without one, an adapter that the reference forbids, an NLL to
            stop at that these terms do not raise, or `until` with a stream or a task vector.
    """
    check_stopping(terms, settings)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    uses_retain = any(term.on == "retain" for term in terms)
    if uses_retain and not retain:
        raise FastforgetError("these terms keep a retain set, and there is none: give one, or leave the terms out")
    check_sets(terms, bool(retain), settings.stop_forget_nll)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = min((length for length in (max_length, context) if length is not None), default=None)
    companions = Companions(terms, tokenizer, retain, refusals, max_length=longest, seed=settings.seed + 2)
    streamed = isinstance(forget, ExampleStream) or isinstance(retain, ExampleStream)
    total = settings.steps(None if isinstance(forget, ExampleStream) else len(forget))
    pad = tokenizer.pad_token_id
    fit_centres(terms, model, expected_outputs(retain, settings.batch_size, pad, settings.seed), settings.seed)
    until = None
    if settings.until is not None:
        if isinstance(forget, ExampleStream):
            raise FastforgetError("until needs a forget set that is no stream: leave --streaming or --until out")
        level = level_of(settings.until, never_trained)
        until = ForgetUntilGone(forget, tokenizer, level, terms, batch_size=settings.batch_size, seed=settings.seed)
    step = UnlearnStep(
        model,
        torch.optim.AdamW,
        terms=[*terms, *([until.watched] if until and until.watched else [])],
        reference_cache_bytes=0 if streamed else DEFAULT_CACHE_BYTES,
        combine=settings.combine,
        first_micro_batch=settings.micro_batch,
        lr=settings.learning_rate,
        weight_decay=0.0,
    )
    pace = Pace(total, settings.decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(step, pace.factor)
    forget_batches = until or Cycle(forget, settings.batch_size, pad, settings.seed)
    retain_batches = Cycle(retain, settings.batch_size, pad, settings.seed + 1) if retain and uses_retain else None
    micro_batch: MicroBatch = "auto" if settings.auto_micro_batch else settings.micro_batch
    result = JobResult()
    start = time.perf_counter()
    with contextlib.ExitStack() as afterwards:
        afterwards.enter_context(training_flags_restored(model))
        afterwards.callback(step.zero_grad)
        model.train()
        good = snapshot(trainable)
        for number in pace:
            batches = (
                companions.attach("forget", next(forget_batches)),
                companions.attach("retain", next(retain_batches)) if retain_batches else None,
            )
            out_step = step.backward(*batches, micro_batch=micro_batch)
            if until is not None:
                until.note()
            norm = torch.nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)
            what = first_not_finite({**numbers_of(out_step), "gradient": norm})
            if what is not None:  # the last update led here, and is taken back
                result.steps = max(0, number - 2)
                raise take_back(model, terms, trainable, good, f"the {what} at step {number} of {total}", result.steps)
            for side in ("forget", "retain"):
                if f"{side}_nll" in out_step.stats:
                    getattr(result, f"{side}_nll").append(float(out_step.stats[f"{side}_nll"]))
            if settings.stop_forget_nll is not None and result.forget_nll[-1] >= settings.stop_forget_nll:
                result.stopped = (
                    f"forget NLL {result.forget_nll[-1]:.2f} >= {settings.stop_forget_nll:g} at step {number}"
                )
                break
            good = snapshot(trainable)
            step.step()
            step.zero_grad()
            scheduler.step()
            if until is not None:
                if number >= pace.decays_from:
                    until.take_all()
                elif until.finished(model, number):
                    pace.decay_from(number)
                    until.take_all()
            saves = out is not None and settings.save_steps is not None and number % settings.save_steps == 0
            if saves or number == pace.last:
                what = what_the_update_broke(model, step, batches, step.rows_at_once(micro_batch), trainable)
                if what is not None:
                    result.steps = number - 1
                    where = f"the {what} after the update of step {number} of {total}"
                    raise take_back(model, terms, trainable, good, where, result.steps)
            result.steps = number
            if progress is not None:
                progress(number, pace.last, out_step)
            if out is not None and saves:
                values = snapshot(trainable)
                subtract(model, terms)
                save_adapter(model, tokenizer, out / f"checkpoint-{number}")
                save_centres(terms, out / f"checkpoint-{number}")
                restore(trainable, values)
        subtract(model, terms)
        result.stopped = result.stopped or f"all {result.steps} steps taken"
        if until is not None:
            result.stopped = f"{until.final(model)}; {result.stopped}"
    result.seconds = time.perf_counter() - start
    return result


class Pace:
    """The steps of a job, numbered from 1, and the learning rate's factor: it rises, stays, and falls to 0 at the end.

    Args:
        steps: at most so many.
        decay: the share of the steps over which it falls; what is before may turn out to be shorter (`decay_from`).
    """

    def __init__(self, steps: int, decay: float) -> None:
        self.last, self.decay = steps, decay
        self.decays_from = steps - round(decay * steps)

    def __iter__(self) -> Iterator[int]:
        number = 0
        while number < self.last:
            number += 1
            yield number

    def decay_from(self, step: int) -> None:
        """Let the rate fall from this step on, over as many as `decay` makes of the steps so far."""
        self.decays_from = step
        self.last = min(self.last, step + round(step * self.decay / (1.0 - self.decay)))

    def factor(self, done: int) -> float:
        """Return the factor of the step after `done` steps."""
        falling = (self.last - done) / max(1, self.last - self.decays_from)
        return min(1.0, (done + 1) / WARMUP_STEPS, max(0.0, falling))


def numbers_of(output: UnlearnOutput) -> dict[str, Tensor]:
    """Return the loss and the NLLs of a step by the names that messages give them."""
    nlls = {name.removesuffix("_nll").replace("_", " ") + " NLL": value for name, value in output.stats.items()}
    return {"loss": output.loss, **nlls}


def first_not_finite(numbers: Mapping[str, Tensor]) -> str | None:
    """Say what became no finite number ("loss became nan"); None where all are finite."""
    values = ((name, float(number)) for name, number in numbers.items())
    return next((f"{name} became {value}" for name, value in values if not math.isfinite(value)), None)


@torch.no_grad()
def what_the_update_broke(
    model: Any,
    step: UnlearnStep,
    batches: tuple[Batch, Batch | None],
    micro_batch: int | None,
    trainable: Sequence[Tensor],
) -> str | None:
    """Say what is no finite number since the last update; None where it broke nothing.

    Weights that are finite may still be too large to compute with: one more forward of the step's own batch shows it.
    """
    if not all(bool(parameter.isfinite().all()) for parameter in trainable):
        return "adapter's weights became NaN or infinite"
    taken = step.param_groups[0]["unlearn_steps"] - 1
    with without_dropout(model):  # nothing is drawn: a job does not depend on how often it is saved
        parts = list(step.loss.passes(*batches, micro_batch=micro_batch, step=taken))
    return first_not_finite(numbers_of(add_outputs(parts)))


def take_back(
    model: Any, terms: Sequence[Term], trainable: Sequence[Tensor], good: Sequence[Tensor], what: str, steps: int
) -> NonFiniteLossError:
    """Put the last good adapter back; return the error to raise, which says what happened and where."""
    restore(trainable, good)
    subtract(model, terms)
    advice = f"the adapter is as it was after {steps} steps (a lower --learning-rate may help)"
    return NonFiniteLossError(f"{what}; {advice}", steps)


def expected_outputs(
    retain: Sequence[Example] | ExampleStream | None, batch_size: int, pad_token_id: int, seed: int
) -> Iterator[dict[str, Tensor]] | None:
    """Yield the retain set once, shuffled, in batches: what cluster centres are computed from."""
    if not retain:
        return None
    if isinstance(retain, ExampleStream):
        retain = retain.head(STREAM_EXAMPLES_FOR_CENTRES)
    batches = Cycle(retain, batch_size, pad_token_id, seed)
    return itertools.islice(batches, math.ceil(len(retain) / batch_size))


def check_stopping(terms: Sequence[Term], settings: JobSettings) -> None:
    """Raise where the job is to stop at a forget NLL that is not computed, or that falls."""
    if settings.until is not None and subtraction(terms) is not None:
        raise FastforgetError("until: a task vector forgets only when it is subtracted, at the end; give max-steps")
    if settings.stop_forget_nll is None:
        return
    if subtraction(terms) is not None:
        raise FastforgetError("stop-forget-nll: a task vector is learned by lowering the forget NLL; give max-steps")
    if not reaches_head(term for term in terms if term.on == "forget"):
        names = ", ".join(term.name for term in terms if term.on == "forget")
        raise FastforgetError(f"stop-forget-nll: the forward of {names} ends before the head, so no NLL is known")


def subtract(model: Any, terms: Sequence[Term]) -> None:
    """Negate the adapter where the terms are those of a task vector."""
    alpha = subtraction(terms)
    if alpha is not None:
        task_vector(model, alpha)


def snapshot(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Copy the adapter's weights."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Put a snapshot back."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
