"""Measures the step's loops: seconds, peak memory, and whether they compute the same. Each function is a worker's task.

Seconds are those of loops that take turns in one process on one model, so that what else the machine does hits all of
them; every peak is that of a process of its own.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.head_measure import (
    MEASURED,
    OUT_OF_TIME,
    RAN,
    Effort,
    Record,
    Say,
    failed,
    free_memory,
    status_mb,
    summary,
    timed,
)
from benchmarks.step_loops import LOOPS, Loop, MaterialisedLoop, build_loop, second_model
from benchmarks.step_problem import FLOAT64_SHAPES, Batches, StepSetting, build_base, epoch, load_policy, perturb

CHECKED = ("loop", "loop_selected", "ours_first", "ours_later")
SIMILAR_ERROR = 2.0  # ours may err by so many times what the peer errs, against float64 ...
ULPS = 16 * 2.0**-24  # ... and, where the peer happens to be exact, by this share of the gradient or loss
# ||difference|| / ||gradient|| of one weight between two loops, with or without a float64 to compare with: what is
# rounded to float32, or to 16 bit, in each of many layers
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def make_base(setting: StepSetting, folder: Path, say: Say) -> None:
    """Save the model, in a process of its own: it would be a part of what the others inherit."""
    build_base(setting, folder)
    say("", {"status": MEASURED})


def time_loops(setting: StepSetting, folder: Path, method: str, names: Sequence[str], effort: Effort, say: Say) -> None:
    """Seconds a step of each loop, in turns."""
    started = time.monotonic()
    model = load_policy(setting, folder)
    batches = epoch(setting)
    loops: dict[str, Loop] = {}
    records: dict[str, Record] = {}
    for name in names:
        say(name, None)
        records[name] = {"status": OUT_OF_TIME}
        try:
            loops[name] = build_loop(name, method, setting, model, second_model(setting, folder, model, method))
            for each in batches:  # fills our cache, and the optimizers' states
                loops[name](each)
        except Exception as error:
            records[name] = failed(error, setting.device)
            loops.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(0 if effort.dry else effort.warmup + effort.rounds):
        if turn > effort.warmup and time.monotonic() - started > effort.limit:
            break
        for name in list(loops):
            say(name, None)
            try:
                seconds = timed(lambda loop=loops[name]: loop(batches[turn % len(batches)]), setting.device)  # type: ignore[misc]  # noqa: B023
            except Exception as error:
                records[name] = failed(error, setting.device)
                del loops[name]
                continue
            if turn >= effort.warmup:
                times[name].append(seconds)
    for name in loops:
        records[name] |= {"status": RAN} if effort.dry else summary(times[name])
    for name, record in records.items():
        say(name, record)


def peak_of(setting: StepSetting, folder: Path, method: str, name: str, say: Say) -> None:
    """Megabytes beyond what lay there when everything was imported and the model loaded, in an epoch after the first.

    A loop's reference, cache and optimizer count; loading the second model does not, which peaks higher.
    """
    say(name, None)
    model = load_policy(setting, folder)
    batches = epoch(setting)
    free_memory(setting.device)
    cuda = setting.device == "cuda"
    try:
        before = torch.cuda.memory_allocated() / 1e6 if cuda else status_mb("VmRSS")
        loop = build_loop(name, method, setting, model, second_model(setting, folder, model, method))
        for each in batches:
            loop(each)
        free_memory(setting.device)
        forget_peak(cuda)
        for each in batches:
            loop(each)
        peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else status_mb("VmHWM")
        say(name, {"peak_mb": round(peak - before, 1)})
    except (OSError, ValueError) as error:
        say(name, {"peak_mb": None, "peak_note": f"not measured: {type(error).__name__}"})


def forget_peak(cuda: bool) -> None:
    """Begin a new peak. On the CPU this needs Linux, and a kernel that lets a process forget its own."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


@dataclass(frozen=True)
class Answer:
    """A loss and the gradient of each LoRA weight, in float64."""

    loss: float
    gradients: dict[str, Tensor]


def check(setting: StepSetting, folder: Path, method: str, say: Say) -> None:
    """Whether all loops have the same loss and gradients: same weights, same batch.

    The adapter is moved away from its start first, after the reference was made. Where float64 is affordable it
    decides: ours may err as much as float32 makes the peer err.
    """
    model = load_policy(setting, folder)
    reference = second_model(setting, folder, model, method)()
    perturb(model, setting.seed)
    batches = epoch(setting)[0]
    answers = {}
    for name in CHECKED:
        say(name, None)
        loop = build_loop(name, method, setting, model, lambda: reference)
        if name == "ours_later":
            loop.backward(batches)
            model.zero_grad()
        answers[name] = answer_of(loop, model, batches)
    exact = None
    if setting.bits == 32 and setting.shape in FLOAT64_SHAPES:
        wide = copy.deepcopy(model).double()
        loop = MaterialisedLoop(wide, reference.double(), mismatch=method == "mismatch", select=True)
        exact = answer_of(loop, wide, batches)
    say("check", compare(answers, exact, next(model.parameters()).dtype))


def answer_of(loop: Loop, model: Any, batches: Batches) -> Answer:
    """Loss and gradients of one backward; no step is taken."""
    loss = loop.backward(batches)
    gradients = {name: p.grad.detach().cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Answer(loss.item(), gradients)


def compare(answers: dict[str, Answer], exact: Answer | None, dtype: torch.dtype) -> Record:
    """Ours against the peer's loop and, where it is known, both against float64; `flags`: what is too far."""
    peer = answers["loop"]
    record: Record = {"losses": {name: answer.loss for name, answer in answers.items()}, "weights": len(peer.gradients)}
    if exact is not None:
        record["losses"]["float64"] = exact.loss
        record["peer_error"] = max(distances(peer, exact).values(), default=0.0)
    flags = []
    for name in ("ours_first", "ours_later", "loop_selected"):
        found = {"difference": max(distances(answers[name], peer).values(), default=0.0)}
        too_far = [f"{name}: {key}" for key in answers[name].gradients.keys() ^ peer.gradients.keys()]
        apart = distances(answers[name], peer)
        limits = dict.fromkeys(apart, LARGEST_DIFFERENCE[dtype])
        if exact is not None:
            errors, theirs = distances(answers[name], exact), distances(peer, exact)
            found["error"] = max(errors.values(), default=0.0)
            too_far += far(name, errors, {key: SIMILAR_ERROR * value + ULPS for key, value in theirs.items()})
        too_far = list(dict.fromkeys([*too_far, *far(name, apart, limits)]))
        record[name] = found
        flags += too_far[:3]  # where one weight is wrong, most are
    return {**record, "flags": flags}


def distances(answer: Answer, other: Answer) -> dict[str, float]:
    """Of the loss, relative to 1 or more, and of each weight's gradient, relative to its length."""
    found = {"loss": abs(answer.loss - other.loss) / max(1.0, abs(other.loss))}
    for name in answer.gradients.keys() & other.gradients.keys():
        length = other.gradients[name].norm().item()
        found[name] = (answer.gradients[name] - other.gradients[name]).norm().item() / max(length, 1e-30)
    return found


def far(name: str, found: dict[str, float], limits: dict[str, float]) -> list[str]:
    """What is beyond its limit; NaN is."""
    return [f"{name}: {key}" for key, value in found.items() if not value <= limits[key]]


def names_of_peaks(effort: Effort, records: dict[str, Record]) -> Sequence[str]:
    """The loops whose memory is measured."""
    if not effort.memory or effort.dry:
        return []
    return [name for name, record in records.items() if "median_ms" in record and LOOPS[name].role != "floor"]
