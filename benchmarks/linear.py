"""A step on 8 or 4 bits, fused and not, beside the one on 32 bits: what the quantised base costs.

    python -m benchmarks.linear                     SmolLM2-135M's shape, 8+8 sequences of 128, on the CPU
    python -m benchmarks.linear --layers 4 --rounds 5

Contestants take turns, so that other jobs on the machine hit all of them alike; the ratio is that of the fastest turns,
and the median of the ratios turn by turn. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

import fastforget as ff
from benchmarks import harness, loops
from fastforget.frozen_weight import buffer_bytes

SHAPE = "smollm2-135m"


def contestant(setting: loops.StepSetting, fuse: bool) -> Callable[[], None]:
    """One step of NPO with KL on a model of its own; the reference comes from the cache after the first."""
    model = loops.load_policy(setting)
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms="npo_mean", lr=1e-5, fuse=fuse)
    (batches,) = loops.epoch(setting)
    sides = [dict(batches[side]) for side in loops.SIDES]

    def run() -> None:
        step(*sides)

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--sequences", type=int, default=8, help="of each side")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--targets", default="all-linear", help="what the adapter is on")
    arguments = parser.parse_args()
    loops.SHAPES[SHAPE]["num_hidden_layers"] = arguments.layers
    own = {name: getattr(arguments, name) for name in ("sequences", "length", "device", "targets")}
    steps = {
        f"{bits} bit{'' if fuse else ', not fused'}": contestant(
            loops.StepSetting("npo_mean", SHAPE, bits, rank=16, batches=1, **own), fuse
        )
        for bits, fuse in [(32, True), (8, True), (4, True), (32, False), (8, False)]
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 1):
        for name, step in steps.items():
            seconds = harness.timed(step, arguments.device)
            if turn:  # the first fills the reference's cache
                times[name].append(seconds)
    base = times["32 bit"]
    print(f"{arguments}, {torch.get_num_threads()} threads, buffers {buffer_bytes() / 1e6:.1f} MB")
    for name, taken in times.items():
        turns = statistics.median(one / other for one, other in zip(taken, base, strict=True))
        ratio = min(taken) / min(base)
        print(f"{name:20} {min(taken):7.2f} s   {ratio:.3f} x 32 bit (turn by turn {turns:.3f})")


if __name__ == "__main__":
    main()
