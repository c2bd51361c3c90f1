"""What the presets' benchmark measures: a real job on a small memorised set, and the peak memory of one step.

Each function whose last argument is `say` is a worker's task.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastforget as ff
from benchmarks.head_measure import MEASURED, Say, failed, free_memory, status_mb
from benchmarks.step_measure import forget_peak
from fastforget.clusters import fit_centres
from fastforget.config import parse_pairs, parse_value
from fastforget.data.examples import Example
from fastforget.data.sources import Source, read_source
from fastforget.data.topics import load_corpus
from fastforget.errors import NonFiniteLossError
from fastforget.evaluate.leakage import mean_nll
from fastforget.jobs.memorise import build_model, memorise, save_base
from fastforget.jobs.options import UnlearnOptions, checked_preset
from fastforget.jobs.running import library_bars
from fastforget.objectives import Term
from fastforget.streams import used_streams

NOT_FINITE = "not finite"  # how the status of a job begins whose loss or gradient was no number
BASE, FACTS = "base", "sets"  # the model's folder; the record of what is known of the sets
PLACES = ("model", "adapter")  # of a report
SEED = 0
M_MMAP_THRESHOLD = -3  # malloc.h


@dataclass(frozen=True)
class Scale:
    """How much text, how large a base and how long a job; the default is the table's, tests take less."""

    topic_counts: tuple[int, int, int] = (2, 4, 1)  # forget, retain, unseen
    passages_per_topic: int = 6
    prompt_tokens: int = 24
    answer_tokens: int = 48
    hidden_size: int = 128
    layers: int = 2
    steps: int = 150


@dataclass(frozen=True)
class StepSize:
    """The step whose memory is measured; each side and companion has sequences * (length - 1) label tokens."""

    sequences: int = 8
    length: int = 257
    vocabulary: int = 128_256
    hidden_size: int = 256
    layers: int = 2

    @property
    def label_tokens(self) -> int:
        """N of each side."""
        return self.sequences * (self.length - 1)


def preset_terms(preset: str) -> tuple[str, dict[str, Any], list[Term]]:
    """Name, options and terms of a preset with NAME=VALUE after it."""
    name, *pairs = preset.split()
    options = parse_pairs(pairs, f"an option of {name!r}", parse_value)
    return name, options, checked_preset(name, options)


def make_base(scale: Scale, folder: Path, say: Say) -> None:
    """Train a model until it recites the answers of a text's rows; save it, and the rows as a user would have them.

    A row's prompt is a passage's beginning, its answer what follows. Tells how many there are, and the NLL of answers
    that the model never saw.
    """
    corpus = load_corpus(SEED, topic_counts=scale.topic_counts, passages_per_topic=scale.passages_per_topic)
    sets: dict[str, list[Example]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("forget", "retain", "unseen"):
        path = folder / f"{side}.jsonl"
        rows = [row_of(passage, corpus.tokenizer, scale) for passage in getattr(corpus, side)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sets[side] = list(read_source(Source(path=path), corpus.tokenizer, UnlearnOptions.max_length))
    with one_thread():
        model = build_model(corpus.tokenizer, hidden_size=scale.hidden_size, layers=scale.layers, seed=SEED)
        memorised = memorise(model, corpus.tokenizer, [*sets["forget"], *sets["retain"]], seed=SEED)
        unseen = mean_nll(model, sets["unseen"])
    save_base(model, corpus.tokenizer, folder / BASE)
    facts: dict[str, Any] = {f"{side}_rows": len(examples) for side, examples in sets.items()}
    facts |= {"parameters": sum(parameter.numel() for parameter in model.parameters()), "unseen_nll": unseen}
    say(FACTS, facts | {"memorised_seconds": round(memorised.seconds, 1)})


def row_of(passage: Example, tokenizer: Any, scale: Scale) -> dict[str, str]:
    """A passage's beginning as prompt and response."""
    ids = passage.input_ids[1:]  # the reader puts the beginning-of-sequence token there again
    end = scale.prompt_tokens + scale.answer_tokens
    parts = {"prompt": ids[: scale.prompt_tokens], "response": ids[scale.prompt_tokens : end]}
    return {name: tokenizer.decode(part, clean_up_tokenization_spaces=False) for name, part in parts.items()}


def converge(preset: str, folder: Path, steps: int, say: Say) -> None:
    """One job of `fastforget.unlearn` with its defaults, on one thread; its report, without where things lie."""
    say(preset, None)
    with tempfile.TemporaryDirectory(prefix="fastforget-objective-") as out, one_thread():
        try:
            name, options, _ = preset_terms(preset)
            report = ff.unlearn(
                folder / BASE,
                folder / "forget.jsonl",
                Path(out) / "adapter",
                retain=folder / "retain.jsonl",
                preset=name,
                preset_options=options,
                max_steps=steps,
                seed=SEED,
                device="cpu",
                quiet=True,
            )
        except NonFiniteLossError as error:
            say(preset, {"status": f"{NOT_FINITE}: {error}"})
        except Exception as error:
            say(preset, failed(error, "cpu"))
        else:
            say(preset, {"status": MEASURED, "report": {key: report[key] for key in report if key not in PLACES}})


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, so that two jobs do not share two cores, and sums are the same whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_model(size: StepSize, folder: Path, say: Say) -> None:
    """Save a Llama with random weights: memory does not depend on what it has learned."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden_size,
        intermediate_size=4 * size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        max_position_embeddings=2 * size.length,
        tie_word_embeddings=False,
    )
    torch.manual_seed(SEED)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / BASE)
    say(FACTS, {"status": MEASURED})


def step_peak(preset: str, folder: Path, size: StepSize, say: Say) -> None:
    """Peak resident memory of the second step, when the reference lies in its cache, in megabytes.

    `peak_mb` is counted from the loaded model, with what the first step left behind (the optimizer's state, the cache,
    code that was loaded), `rise_mb` from the beginning of the second step. Only what tensors occupy is in them, not
    what the heap keeps of freed ones.
    """
    say(preset, None)
    map_tensors()
    try:
        _, _, terms = preset_terms(preset)
        with library_bars(off=True):
            model = ff.load(folder / BASE, bits=32, device="cpu").train()
        for parameter in model.parameters():
            parameter.detach().sum()  # read in from disk now
        forget, retain = batches(size)
        fit_centres(terms, model, [retain], SEED)
        step = ff.UnlearnStep(model, torch.optim.AdamW, terms=terms, lr=1e-4)
        free_memory("cpu")
        loaded = status_mb("VmRSS")
        step(forget, retain)
        free_memory("cpu")
        forget_peak(cuda=False)
        before = status_mb("VmRSS")
        step(forget, retain)
        peak = status_mb("VmHWM")
        figures = {"peak_mb": round(peak - loaded, 1), "rise_mb": round(peak - before, 1)}
    except Exception as error:
        say(preset, failed(error, "cpu"))
    else:
        say(preset, {"status": MEASURED, **figures, **companions_of(terms)})


def map_tensors() -> None:
    """Have glibc give every larger tensor pages of its own, which go back to the system with it, in this process.

    Else activations come from the heap, whose holes depend on chance: a step of dpo rose by 418 to
    488 MB over five runs; with it, by 329.4 MB in each of three.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)


def batches(size: StepSize) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides, each with every companion that a term may look at, all of the same size."""
    generator = torch.Generator().manual_seed(SEED)

    def draw() -> dict[str, Tensor]:
        ids = torch.randint(5, size.vocabulary, (size.sequences, size.length), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    forget: dict[str, Any] = {**draw(), "refusal": draw(), "mismatch": draw()}
    return forget, {**draw(), "refusal": draw()}


def companions_of(terms: Sequence[Term]) -> dict[str, Any]:
    """What terms look at beside the two sides' own answers, and whether two answers share one forward's graph."""
    streams = {f"{term.on} {stream}": None for term in terms for stream in used_streams(term) if stream != "answer"}
    return {"companions": list(streams), "together": any(len(term.streams) > 1 for term in terms)}
