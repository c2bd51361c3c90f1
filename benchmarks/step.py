"""Whole training steps against the loops that people write: seconds, peak memory, and the same losses and gradients.

    python -m benchmarks.step --device cpu --json FILE                     an OPT of 6 layers, built from config
    python -m benchmarks.step --device cpu --bits 8
    python -m benchmarks.step --device cuda --shape opt-1.3b,llama-3.1-8b --bits 8,16
    python -m benchmarks.step --methods rmu                                forwards that end at layer 7 of 24
    python -m benchmarks.step --tiny                                       a dry run: no figure of speed

`loops` says which loops are measured, and how they were made comparable. They take turns in one process, on one model's
weights, the usual ones with PEFT's and bitsandbytes' layers, ours with fused ones; each peak is measured in a process
of its own. On a GPU (elsewhere with --alone) each is measured, profiled and freed before the next is built. `rmu`
compares that preset, in the first epoch and later, with a full step of `grad_diff`. The exit code is 1 where ours
failed, computes something else or missed a goal, else 0.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fastforget as ff
from benchmarks import harness, loops
from benchmarks.harness import Answer, Record, Step
from benchmarks.loops import Backward, Batches, StepSetting
from benchmarks.tables import goal, ratio
from fastforget.backends import pick
from fastforget.frozen_weight import free_buffers
from fastforget.memory import checkpoint_layers

LEARNING_RATE = 1e-4
ADAPTER_STD = 0.2  # of LoRA's B when losses are compared: at its initial 0 the KL and most gradients are 0
TERMS = {
    "mismatch": lambda: [ff.NegatedCE(), ff.RandomMismatch(), ff.KL()],
    "grad_diff": lambda: [ff.NegatedCE(), ff.KL()],
    "rmu": lambda: ff.preset("rmu", layer=7),
}
LOOPS = {  # name -> what it is, its role
    "loop": ("the method's loop", "peer"),
    "loop_selected": ("the same, label tokens selected before the KL", "peer"),
    "ours_first": ("UnlearnStep, first epoch", "ours"),
    "ours_later": ("UnlearnStep, later epochs", "ours"),
    "ours_joint": ("the same, both sides in one forward", "ours"),
    "ours_compiled": ("the same, layers compiled", "ours"),
    "ours_checkpointed": ("the same, checkpointed, micro_batch 1", "ours"),
    "floor": ("backbone and bare products", "floor"),
    "backbone": ("backbone alone", "floor"),
    "full": ("UnlearnStep, a full step of grad_diff", "ours"),
}
RMU_LOOPS = ("full", "ours_first", "ours_later")
LEFT_MB = 8.0  # on a GPU, after a contestant, beyond what was there before it
NOT_ON_CPU = ("ours_compiled",)  # unless it is asked for: a C++ compiler takes minutes
KERNELS = {  # groups of a GPU's kernels, by parts of their names, in this order; the rest are element-wise
    "head": ("label_tile", "paired_tile", "coupled_tile", "gradient_tile", "state_pass"),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "GEMM": ("gemm", "nvjet", "cutlass", "splitk", "cublas"),
    "copies": ("copy", "memcpy", "memset", "cast_weight", "quant"),
}
RMU_SIZE: dict[str, Any] = {"shape": "deep", "sequences": 4, "length": 64, "labelled": 1.0, "batches": 1}
LATER_FASTER, FIRST_FASTER, MEMORY, EARLY = 2.5, 1.8, 0.35, 0.4  # what was asked of ours
SIMILAR_ERROR = 2.0  # a loop may err by so many times what the peer errs, against float64 ...
ULPS = 16 * 2.0**-24  # ... and, where the peer happens to be exact, by this share of the gradient or loss
# ||difference|| / ||gradient|| of one weight from the peer's, without a float64 to compare with: what is rounded to
# float32, or to 16 bit, in each of many layers
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
ABOUT = (
    "Backward, optimizer's step and zero_grad; medians of loops in turn. Extra MB: peaks of processes of their own, "
    "beyond what each held after imports and loading the same base. Floors are no loops: the model's forwards and "
    "backwards up to its head, and with them the bare products with the head that a frozen one cannot leave out. The "
    "errors are of the loss, and of the worst gradient of a LoRA weight, from a float64 copy of the loop (of large or "
    "quantised models: from the loop itself).",
)


def answer_of(backward: Backward, model: Any, batches: Batches) -> Answer:
    """Return the loss, and the gradients of all weights (weights, longest) in float64; no step is taken."""
    loss = backward(batches)
    found = [weight.grad.double().flatten().cpu() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return loss.double().cpu(), torch.nn.utils.rnn.pad_sequence(found, batch_first=True)


def group_of(kernel: str) -> str:
    """Return the group of a GPU's kernel."""
    name = kernel.lower()
    return next((group for group, parts in KERNELS.items() if any(part in name for part in parts)), "element-wise")


def distances(answer: Answer, truth: Answer) -> Tensor:
    """Compute (1 + weights,): the loss's distance, and each gradient's, relative to its length."""
    loss = (answer[0] - truth[0]).abs() / truth[0].abs().clamp(min=1.0)
    gradients = (answer[1] - truth[1]).norm(dim=1) / truth[1].norm(dim=1).clamp(min=1e-30)
    return torch.cat([loss[None], gradients])


class Problem:
    """A model with its adapter moved away from its start, the peers' reference, batches, and the truth.

    Where float64 is affordable it is the truth, and a loop may err as much as float32 makes the peer err; otherwise the
    peer is. A loop's reference, cache and optimizer count as its memory.
    """

    whole_peak = True

    def __init__(self, given: Mapping[str, Any]) -> None:
        setting = self.setting = StepSetting(**given)
        self.device_name, self.model, self.batches = setting.device, loops.load_policy(setting), loops.epoch(setting)
        loops.perturb(self.model, setting.seed, ADAPTER_STD)
        self.quantised = setting.bits in loops.QUANTISED
        self._models: dict[str, Any] = {}
        self._adapter = [(each, each.detach().clone()) for each in self.model.parameters() if each.requires_grad]
        self.loaded_mb = harness.memory_mb(self.device_name)

    @functools.cached_property
    def reference(self) -> Any:
        """The second model, or a deep copy with its adapter at its start."""
        if self.setting.method == "mismatch":
            return loops.load_policy(self.setting).requires_grad_(False)
        reference = copy.deepcopy(self.model)
        loops.perturb(reference, self.setting.seed, std=0.0)
        return reference.requires_grad_(False)

    def model_of(self, name: str) -> Any:
        """The model as a loop has it: fused, compiled or checkpointed but for peers; all share their weights."""
        kind = name if name in ("ours_compiled", "ours_checkpointed") else "fused"
        if LOOPS[name][1] == "peer":
            return self.model
        if kind not in self._models:
            made = self._models[kind] = loops.shared_copy(self.model)
            ff.fuse(made)
            if kind == "ours_compiled":
                loops.compile_layers(made)
            if kind == "ours_checkpointed":
                checkpoint_layers(made)
        return self._models[kind]

    def release(self, record: Record) -> None:
        """Drop what a step has left here and in libraries, undo what it has learned; flag what a GPU still holds."""
        for parameter, values in self._adapter:
            parameter.data.copy_(values)
        self.__dict__.pop("reference", None)
        self._models.clear()
        free_buffers()
        if self.device_name == "cuda":
            torch._C._cuda_clearCublasWorkspaces()
        harness.free_memory(self.device_name)
        left = harness.memory_mb(self.device_name) - self.loaded_mb
        if self.device_name == "cuda" and left > LEFT_MB:
            record["flags"] = [*record.get("flags", ()), f"{left:.0f} MB were not freed"]

    def profile(self, step: Step) -> Record:
        """Say how many ms a GPU spends in each group of kernels, and what GEMMs and attention alone would take."""
        if self.device_name != "cuda":
            return {}
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            step()
            torch.cuda.synchronize()
        spent = dict.fromkeys((*KERNELS, "element-wise"), 0.0)
        for event in profiler.key_averages():
            if event.device_type == torch.profiler.DeviceType.CUDA:
                spent[group_of(event.key)] += event.self_device_time_total / 1e3
        figures = {f"{group} ms": f"{spent[group]:.1f}" for group in spent}
        return {
            "figures": {"GEMMs and attention ms": f"{spent['GEMM'] + spent['attention']:.1f}"} | figures,
            "kernels_ms": spent,
        }

    @functools.cached_property
    def truth(self) -> tuple[Answer, Tensor]:
        """The loss and gradients, and how far (1 + weights,) a loop may be from them."""
        model, reference = self.model, self.reference
        if self.quantised:  # bitsandbytes' own products round the activations: the loop with fused layers is the peer
            model, reference = self.model_of("ours_later"), loops.shared_copy(reference)
            ff.fuse(reference)
        peer = self.backward_of("loop", model, reference)[0]
        theirs = answer_of(peer, model, self.batches[0])
        if self.setting.bits != 32 or self.setting.shape in loops.LARGE:
            largest = LARGEST_DIFFERENCE[model.get_output_embeddings().weight.dtype]
            return theirs, torch.full((1 + len(theirs[1]),), largest)
        wide = copy.deepcopy(self.model).double()
        exact, _ = self.backward_of("loop", wide, copy.deepcopy(self.reference).double())
        truth = answer_of(exact, wide, self.batches[0])
        return truth, SIMILAR_ERROR * distances(theirs, truth) + ULPS

    def backward_of(self, name: str, model: Any, reference: Any) -> tuple[Backward, torch.optim.Optimizer]:
        """Build a loop around a model, and its optimizer."""
        mismatch = self.setting.method == "mismatch"
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=LEARNING_RATE)
        if name in ("floor", "backbone"):
            products = loops.products_of(self.setting, model) if name == "floor" else ()
            return loops.bare(model, mismatch, products), optimizer
        if LOOPS[name][1] == "peer":
            select = name == "loop_selected"
            return loops.materialised(model, reference, mismatch=mismatch, select=select), optimizer
        terms = ff.preset("grad_diff") if name == "full" else TERMS[self.setting.method]()
        passes = "joint" if name == "ours_joint" else "sequential"
        step = ff.UnlearnStep(model, optimizer, terms=terms, passes=passes)
        rows = 1 if name == "ours_checkpointed" else None
        return loops.ours(step, cached=name != "ours_first", micro_batch=rows), step

    def step_of(self, name: str, dry: bool) -> Step:
        """Build a step: its first call fills our cache, and returns what all loops must agree on; later ones train."""
        peer, model = LOOPS[name][1] == "peer", self.model_of(name)
        backward, optimizer = self.backward_of(name, model, self.reference if peer else None)
        silent = LOOPS[name][1] == "floor" or self.setting.method == "rmu" or (peer and self.quantised)
        turns = itertools.count()

        def step() -> Answer | None:
            turn = next(turns)
            if turn:
                backward(self.batches[turn % len(self.batches)])
                optimizer.step()
                optimizer.zero_grad()
                return None
            for each in self.batches:
                backward(each)
            model.zero_grad()
            answer = answer_of(backward, model, self.batches[0])
            return None if silent else answer

        return step

    def errors(self, answer: Answer) -> Record:
        """Say how far a loop's loss and gradients are from the truth, and in "flags" what of that is too far."""
        truth, limits = self.truth
        if answer[1].shape != truth[1].shape:
            return {"flags": [f"gradients {tuple(answer[1].shape)}, not {tuple(truth[1].shape)}"]}
        found = distances(answer, truth)
        wrong = [place for place, near in enumerate(found <= limits) if not near]  # NaN is too far, too
        flags = [f"gradient of weight {place - 1}" if place else "loss" for place in wrong]
        # where one weight is wrong, most are
        return {"value_error": found[0].item(), "worst_row": found[1:].max().item(), "flags": flags[:3]}


def finish(row: dict[str, Any]) -> None:
    """State what was asked: later and first epochs against both forms of the loop, memory against the smaller one."""
    records, setting = row["contestants"], row["setting"]
    tokens = setting["sequences"] * setting["length"] * (3 if setting["method"] == "mismatch" else 2)
    for record in records.values():
        if "median_ms" in record:
            more = (
                {"GB in all": f"{record['highest_mb'] / 1e3:.1f}"}
                if "kernels_ms" in record and record.get("highest_mb")
                else {}
            )
            record["figures"] = (
                {"tokens/s": f"{1e3 * tokens / record['median_ms']:.0f}"} | more | record.get("figures", {})
            )
    load = os.getloadavg()[0]  # of the last minute, our own included
    row["notes"] = [f"ours by `{pick('auto', torch.device(setting['device']))}`; load average {load:.1f}"]
    if setting["method"] == "rmu":
        row["ours"] = "full"
        row["goals"] = [goal(f"{name} / full", ratio(row, name, "full"), "≤", EARLY) for name in RMU_LOOPS[1:]]
        return
    row["ours"] = "ours_later"
    for peer in ("loop", "loop_selected"):
        row["goals"].append(goal(f"{peer} / ours, later epochs", ratio(row, peer, "ours_later"), "≥", LATER_FASTER))
        row["goals"].append(goal(f"{peer} / ours, first epoch", ratio(row, peer, "ours_first"), "≥", FIRST_FASTER))
    peaks = [record["peak_mb"] for record in records.values() if record["role"] == "peer" and record.get("peak_mb")]
    value, smallest = records.get("ours_later", {}).get("peak_mb"), min(peaks, default=None)
    share = value / smallest if value and smallest else None
    row["goals"].append(goal("peak memory, ours / loop", share, "≤", MEMORY))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; returns the exit code."""
    options = parse(arguments)
    results = harness.header("Training steps", ABOUT, options)
    settings = {}
    for setting in settings_of(options):
        own = RMU_LOOPS if setting.method == "rmu" else [name for name in LOOPS if name != "full"]
        settings[setting] = [name for name in own if name in options.loops]
    harness.measure_rows(results, "benchmarks.step", settings, LOOPS, finish, options)
    return harness.conclude(results)


def settings_of(options: argparse.Namespace) -> list[StepSetting]:
    """List all rows: each shape with each number of bits and each method."""
    names = ("device", "sequences", "length", "labelled", "rank", "batches", "seed")
    common = {name: getattr(options, name) for name in names}
    common["ragged"] = options.ragged or options.tiny  # padding is compared, too
    found = []
    for shape, size, method in itertools.product(options.shape, options.bits, options.methods):
        setting = StepSetting(method, shape, int(size), **common)
        if method == "rmu" and not options.tiny:
            setting = replace(setting, **RMU_SIZE)
        found.append(setting)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options, and fill in what follows from others; bad ones end with exit code 2."""
    parser = harness.parser_of("step", __doc__)
    bits = harness.names_of("number of bits", ("32", "16", "8", "4"))
    shapes = [name for name in loops.SHAPES if not name.startswith("tiny")]
    parser.add_argument(
        "--shape", type=harness.names_of("shape", shapes), default=("small", "small-llama"), help=", ".join(shapes)
    )
    parser.add_argument("--bits", type=bits, default=("32",), help="of the base: 32, 16, 8 or 4; comma-separated")
    parser.add_argument("--methods", type=harness.names_of("method", TERMS), default=("mismatch", "grad_diff"))
    parser.add_argument(
        "--loops", type=harness.names_of("loop", LOOPS), help=f"default, of {', '.join(LOOPS)}: all that are quick"
    )
    parser.add_argument("--alone", action="store_true", help="each freed before the next is built; always on a GPU")
    parser.add_argument("--sequences", type=int, help="of each side; default 8")
    parser.add_argument("--length", type=int, help="tokens of a sequence; default 128")
    parser.add_argument("--labelled", type=float, default=0.4, help="share of the tokens; default 0.4")
    parser.add_argument("--ragged", action="store_true", help="every second sequence is shorter, with padding")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA; default 8")
    parser.add_argument("--batches", type=int, default=2, help="of an epoch; default 2")
    parser.set_defaults(rounds=7, warmup=1)
    options = parser.parse_args(arguments)
    options.dry, options.shape = options.tiny, ("tiny", "tiny-llama") if options.tiny else options.shape
    options.alone |= options.device == "cuda"
    options.loops = options.loops or [name for name in LOOPS if options.device == "cuda" or name not in NOT_ON_CPU]
    options.sequences = options.sequences or (3 if options.tiny else 8)
    options.length = options.length or (24 if options.tiny else 128)
    return options


if __name__ == "__main__":
    sys.exit(main())
