"""An unlearning job: batches, steps, guards and stopping. What `fastforget demo` and `fastforget unlearn` both run."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastforget.adapters import save_adapter, task_vector
from fastforget.backbone import training_flags_restored, without_dropout
from fastforget.batch import Batch, count_labels
from fastforget.clusters import fit_centres, save_centres
from fastforget.collectives import is_first
from fastforget.data.batches import Cycle
from fastforget.data.examples import Example, ExampleStream
from fastforget.data.refusals import REFUSALS
from fastforget.errors import FastforgetError, RetainNLLError
from fastforget.guard import copy
from fastforget.head import context_length
from fastforget.jobs.checkpoints import Checkpoints
from fastforget.jobs.companions import Companions, check_sets
from fastforget.jobs.launched import in_parallel, own_share
from fastforget.jobs.options import JobSettings
from fastforget.jobs.state import JobResult, JobState, Pace
from fastforget.jobs.until import ForgetUntilGone, level_of
from fastforget.objectives import Term, reaches_head, subtraction
from fastforget.output import UnlearnOutput, add_outputs
from fastforget.processes import sum_counts, sum_outputs, without_buffer_broadcast
from fastforget.reference import DEFAULT_CACHE_BYTES
from fastforget.step import MicroBatch, UnlearnStep

STREAM_EXAMPLES_FOR_CENTRES = 1024
MAX_GRAD_NORM = 1.0
Progress = Callable[[int, int, UnlearnOutput], None]  # (step, of how many, its output)


def run_job(
    model: Any,
    tokenizer: Any,
    forget: Sequence[Example] | ExampleStream,
    retain: Sequence[Example] | ExampleStream | None,
    terms: Sequence[Term],
    settings: JobSettings,
    *,
    progress: Progress | None = None,
    refusals: Sequence[str] = REFUSALS,
    max_length: int | None = None,
    never_trained: float | None = None,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
) -> JobResult:
    """Unlearn `forget` in the model's adapter, in place.

    Each step takes `batch_size` forget and, where a term wants them, as many retain examples; both sets are shuffled
    and cycled independently. Of streams the reference's cache is off, and only `max_steps` counts. A cluster pull
    without centres gets its own first, in place, computed from the retain set. Terms that need refusals or other
    prompts' answers get them fresh at each step, from `refusals` and from the retain set, in rows of at most
    `max_length` tokens (default: the model's context). A task vector is subtracted at the end, and in every checkpoint.
    With `save_steps` a checkpoint is written every so many steps (where that fails, on a full disk say, there is a
    warning), and with `resume` the job goes on from the last one, if there is any, and ends as if it had never stopped
    (`jobs/checkpoints.py`). With `until` a step's forget passages are those that are still known (`jobs/until.py`),
    measured by `never_trained`, the exact memorisation of passages that the model never saw, where there are any.

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
    context = context_length(model)
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
    saved = checkpoints.to_resume() if checkpoints is not None and resume else None
    step = UnlearnStep(
        in_parallel(model),
        torch.optim.AdamW,
        terms=[*terms, *([until.watched] if until and until.watched else [])],
        reference_cache_bytes=0 if streamed else DEFAULT_CACHE_BYTES,
        reference_cache_folder=settings.reference_cache,
        combine=settings.combine,
        first_micro_batch=settings.micro_batch if saved is None else saved.job["rows"],
        guard=settings.guard,
        lr=settings.learning_rate,
        weight_decay=0.0,
    )
    pace = Pace(total, settings.decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(step, pace.factor)
    micro_batch: MicroBatch = "auto" if settings.auto_micro_batch else settings.micro_batch
    result = JobResult()
    state = JobState(model, step, scheduler, pace, companions, until, result)
    if saved is not None:
        state.restore(saved.job)
        if step.loss.reference is not None and saved.reference is not None:
            step.loss.reference.fill(**saved.reference)
    forget_batches = until or Cycle(forget, settings.batch_size, pad, settings.seed, skip=pace.number)
    retain_batches = (
        Cycle(retain, settings.batch_size, pad, settings.seed + 1, skip=pace.number) if retain and uses_retain else None
    )
    start = time.perf_counter() - result.seconds
    with contextlib.ExitStack() as afterwards:
        afterwards.enter_context(training_flags_restored(model))
        afterwards.callback(step.zero_grad)
        afterwards.enter_context(subtracted_at_last(model, terms))
        afterwards.enter_context(stopped_at_the_bound(result))
        model.train()
        for number in pace:
            whole = (
                companions.attach("forget", next(forget_batches)),
                companions.attach("retain", next(retain_batches)) if retain_batches else None,
            )
            batches = own_share(whole[0]), None if whole[1] is None else own_share(whole[1])
            out_step = step.backward(*batches, micro_batch=micro_batch)
            if until is not None:
                until.note(step.loss.backbone.device)
            torch.nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)
            step.guard.check()
            for side in ("forget", "retain"):
                if f"{side}_nll" in out_step.stats:
                    getattr(result, f"{side}_nll").append(float(out_step.stats[f"{side}_nll"]))
            if settings.stop_forget_nll is not None and result.forget_nll[-1] >= settings.stop_forget_nll:
                result.stopped = (
                    f"forget NLL {result.forget_nll[-1]:.2f} >= {settings.stop_forget_nll:g} at step {number}"
                )
                break
            step.step()
            step.zero_grad()
            scheduler.step()
            if until is not None:
                if number >= pace.decays_from:
                    until.take_all()
                elif until.finished(model, number):
                    pace.decay_from(number)
                    until.take_all()
            saves = checkpoints is not None and settings.save_steps is not None and number % settings.save_steps == 0
            if saves or number == pace.last:
                check_update(step, batches, step.rows_at_once(micro_batch), number)
            result.steps = number
            result.tokens += sum(int(batch["attention_mask"].sum()) for batch in whole if batch is not None)
            if progress is not None:
                progress(number, pace.last, out_step)
            if checkpoints is not None and saves and is_first():
                result.seconds = time.perf_counter() - start

                def save(folder: Path) -> None:
                    with subtracted(model, terms, trainable):
                        save_adapter(model, tokenizer, folder)
                    save_centres(terms, folder)

                try:
                    checkpoints.write(number, state.collect(), step.loss.reference, save)
                except (OSError, SafetensorError) as error:
                    warnings.warn(
                        f"checkpoint-{number} could not be written ({error}); the job goes on, and the checkpoints "
                        "before it stay",
                        stacklevel=2,
                    )
    result.stopped = result.stopped or f"all {result.steps} steps taken"
    if until is not None:
        result.stopped = f"{until.final(model)}; {result.stopped}"
        result.not_gone = sorted(until.known)
    result.seconds = time.perf_counter() - start
    return result


def numbers_of(output: UnlearnOutput) -> dict[str, Tensor]:
    """Return the loss and the NLLs of a step by the names that messages give them."""
    nlls = {name.removesuffix("_nll").replace("_", " ") + " NLL": value for name, value in output.stats.items()}
    return {"loss": output.loss, **nlls}


@torch.no_grad()
def check_update(step: UnlearnStep, batches: tuple[Batch, Batch | None], micro_batch: int | None, number: int) -> None:
    """See whether the last update broke something: weights that are finite may be too large to compute with.

    One more forward of the step's own batch shows it.

    Raises:
        NonFiniteLossError, RetainNLLError: it did, and is taken back.
    """
    step.guard.settle()
    device = step.loss.backbone.device
    counts = sum_counts(count_labels([batches]), device)
    # nothing is drawn: a job does not depend on how often it is saved
    with without_dropout(step.model), without_buffer_broadcast(step.model):
        parts = list(step.loss.passes(*batches, counts, micro_batch, step=number - 1, shared=True))
    out = sum_outputs(add_outputs(parts), step.loss.terms, device)
    bad = step.guard.verdict({name: float(value) for name, value in numbers_of(out).items()})
    if bad is not None:
        raise step.guard.give_up(bad[0], f"{bad[1]} after the update of step {number}")
    step.guard.accept()


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
    """Raise where the job is to stop at an NLL that is not computed, or at a forget NLL that falls."""
    settings.guard.check(terms)
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


@contextlib.contextmanager
def stopped_at_the_bound(result: JobResult) -> Iterator[None]:
    """End the job, with what it has, where the retain NLL rises above its bound."""
    try:
        yield
    except RetainNLLError as error:
        result.steps, result.stopped = error.good_steps, str(error)


@contextlib.contextmanager
def subtracted_at_last(model: Any, terms: Sequence[Term]) -> Iterator[None]:
    """Negate the adapter at the end where the terms are those of a task vector, whatever ended the job."""
    try:
        yield
    finally:
        subtract(model, terms)


@contextlib.contextmanager
def subtracted(model: Any, terms: Sequence[Term], trainable: Sequence[Tensor]) -> Iterator[None]:
    """Let the adapter be what it would be at the end; it is put back."""
    values = [parameter.detach().clone() for parameter in trainable]
    subtract(model, terms)
    try:
        yield
    finally:
        copy(trainable, values)
