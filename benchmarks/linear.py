"""A step on 8 or 4 bits, fused and not, beside the one on 32 bits: what the quantised base costs.

    python -m benchmarks.linear                     SmolLM2-135M's shape, 8+8 sequences of 128, on the CPU
    python -m benchmarks.linear --layers 4 --rounds 5

Contestants take turns, so that other jobs on the machine hit all of them alike; the ratio is that of the fastest turns,
and the median of the ratios turn by turn. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

import fastforget as ff
from fastforget.frozen_weight import buffer_bytes

WIDTH, HEADS, KV_HEADS, FFN, VOCABULARY = 576, 9, 3, 1536, 49_152


def build(folder: str, layers: int) -> None:
    """Save a Llama of SmolLM2-135M's shape."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def batch(sequences: int, length: int, seed: int) -> dict[str, Tensor]:
    """Random tokens, of which the last 40 % are labelled."""
    ids = torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : int(0.6 * length)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def contestant(folder: str, bits: int, fuse: bool, targets: Any, arguments: argparse.Namespace) -> Callable[[], None]:
    """One step of NPO with KL on a model of its own; the reference comes from the cache after the first."""
    model = ff.load(folder, bits=bits, lora={"target_modules": targets}, device=arguments.device, fuse=fuse).train()
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms="npo_mean", lr=1e-5, fuse=fuse)
    sides = [batch(arguments.sequences, arguments.length, seed) for seed in (1, 2)]

    def run() -> None:
        step(*sides)
        if arguments.device != "cpu":
            torch.cuda.synchronize()

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--sequences", type=int, default=8, help="of each side")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--targets", default="auto", help="what the adapter is on: auto, all-linear")
    arguments = parser.parse_args()
    rows = [(32, True), (8, True), (4, True), (32, False), (8, False)]
    with tempfile.TemporaryDirectory() as folder:
        build(folder, arguments.layers)
        steps = {
            f"{bits} bit" + ("" if fuse else ", not fused"): contestant(
                folder, bits, fuse, arguments.targets, arguments
            )
            for bits, fuse in rows
        }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if turn:  # the first fills the reference's cache
                times[name].append(time.perf_counter() - begin)
    base = times["32 bit"]
    print(f"{arguments}, {torch.get_num_threads()} threads, buffers {buffer_bytes() / 1e6:.1f} MB")
    for name, taken in times.items():
        turns = statistics.median(one / other for one, other in zip(taken, base, strict=True))
        ratio = min(taken) / min(base)
        print(f"{name:20} {min(taken):7.2f} s   {ratio:.3f} x 32 bit (turn by turn {turns:.3f})")


if __name__ == "__main__":
    main()
