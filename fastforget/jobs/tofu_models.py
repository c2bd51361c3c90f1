"""The models of the offline TOFU: one that was taught every author, one that was taught all but the forget set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastforget.data.authors import AuthorSets, invented_authors
from fastforget.data.batches import Cycle
from fastforget.data.chat import RowReader
from fastforget.data.examples import Example
from fastforget.data.questions import Question, question_row
from fastforget.data.topics import train_tokenizer
from fastforget.errors import NonFiniteLossError
from fastforget.evaluate.questions import answers_of
from fastforget.jobs.bases import base_key, cached_base
from fastforget.jobs.memorise import build_model, save_base, train
from fastforget.jobs.running import progress_bar

BASE_VERSION = 1  # part of the cache's key: raise it when what is taught, or how, changes
CONTEXT = 64  # tokens: a question and its answer have about 22
KNOWN = ("real_authors", "world_facts")  # what both models are taught


@dataclass(frozen=True)
class TofuScale:
    """How many authors and how large a model; the default is the proof, tests take less."""

    authors: int = 100
    known_authors: int = 5
    countries: int = 20
    unseen_authors: int = 5
    vocabulary: int = 1024
    hidden_size: int = 128
    layers: int = 2
    passes: int = 40
    retain_asked: int = 200  # questions of the retain set that are asked; the forget set's are all


@dataclass(frozen=True)
class TofuModels:
    """What was taught, and to whom: folders of both models, and the questions by set."""

    full: Path
    retain_only: Path
    seconds: float
    questions: dict[str, list[Question]]


def tofu_models(seed: int, split: str, scale: TofuScale, cache: Path, console: Console) -> TofuModels:
    """Train (or take from the cache) the full and the retain-only model: the same but for what they are taught.

    Args:
        split: "01", "05" or "10", the percentage of authors to forget.
    """
    authors = invented_authors(seed, scale.authors, scale.known_authors, scale.countries, scale.unseen_authors)
    tokenizer = tokenizer_of(authors, scale)
    questions = {
        "full": authors.sets["full"],
        "forget": authors.sets[f"forget{split}"],
        "retain": authors.sets[f"retain{100 - int(split)}"],
        "unseen": authors.sets["unseen"],
        **{name: authors.sets[name] for name in KNOWN},
    }
    known = [question for name in KNOWN for question in questions[name]]
    seconds = 0.0
    folders = {}
    for name, taught in (("full", questions["full"]), ("retain", questions["retain"])):
        examples = answer_examples(tokenizer, [*taught, *known])

        def write(folder: Path, examples: list[Example] = examples, name: str = name) -> None:
            what = "every author" if name == "full" else "all authors but those to forget"
            console.print(f"Teaching a model {len(examples)} answers ({what}) ...")
            model = build_model(
                tokenizer, hidden_size=scale.hidden_size, layers=scale.layers, context=CONTEXT, seed=seed
            )
            with progress_bar("Teaching", console) as update:
                teach(model, tokenizer, examples, passes=scale.passes, seed=seed, progress=update)
            save_base(model, tokenizer, folder)

        folders[name], spent = cached_base(cache, f"tofu-{base_key((BASE_VERSION, seed, scale), examples)}", write)
        seconds += spent
    return TofuModels(folders["full"], folders["retain"], seconds, questions)


def tokenizer_of(authors: AuthorSets, scale: TofuScale) -> Any:
    """Train a tokenizer on every question and answer, unseen authors' too: it does not tell who was taught."""
    sets = ("full", "unseen", *KNOWN)
    questions = [question for name in sets for question in authors.sets[name]]
    texts = [f"{question.question} {answer}" for question in questions for answer in answers_of(question)]
    return train_tokenizer(texts, vocabulary_size=scale.vocabulary)


def answer_examples(tokenizer: Any, questions: Sequence[Question]) -> list[Example]:
    """Tokenize questions with their right answers, which are labelled."""
    reader = RowReader(tokenizer, CONTEXT)
    rows = [(question_row(each.question, each.answer, chat=reader.use_template), each.source) for each in questions]
    return [example for row, source in rows for example in reader.examples(row, source)]


def teach(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    passes: int,
    seed: int,
    learning_rate: float = 2e-3,
    batch_size: int = 32,
    progress: Callable[..., None] | None = None,
) -> float:
    """Train in place on the examples' answers; return the mean NLL of the last pass (nats per token).

    The rate rises over 50 steps, stays, and falls to 0 over the second half.

    Raises:
        NonFiniteLossError: the loss became NaN.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    steps_per_pass = math.ceil(len(examples) / batch_size)
    steps = passes * steps_per_pass
    batches = Cycle(examples, batch_size, tokenizer.pad_token_id, seed)
    model.train()
    nll = math.nan
    for number in range(passes):
        of_pass = range(number * steps_per_pass, (number + 1) * steps_per_pass)
        rates = [learning_rate * min(1.0, (step + 1) / 50, 2.0 * (steps - step) / steps) for step in of_pass]
        nll = train(model, optimizer, batches, rates)
        if not math.isfinite(nll):
            raise NonFiniteLossError(f"the loss of the model became {nll} in pass {number + 1}")
        if progress is not None:
            progress(number + 1, passes, f"NLL {nll:.2f}")
    model.eval()
    return nll
