"""The demo's text: the language reference that Python carries with itself, cut into passages.

`pydoc_data.topics` is there offline in every CPython, but its topics differ from version to version, and some hold
others verbatim ("compound" holds "if", "for" and "try"). So topics are taken by length, shortest first, and one that
shares text with a topic already taken is left out: what is to be forgotten must not also stand in the retain set.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastforget.data.examples import Example
from fastforget.errors import FastforgetError

PASSAGE_TOKENS = 128  # the beginning-of-sequence token among them
PASSAGE_CHARACTERS = 400  # the least text of a passage: a prompt of 200 characters, and a continuation of 200
VOCABULARY_SIZE = 4096  # about four characters a token, so that 128 tokens hold PASSAGE_CHARACTERS of nearly any prose
SHARED_WORDS = 8  # words in a row that count as shared text
SHARED_PART = 0.02  # of the shorter topic's runs of words; stock phrases stay below, copied paragraphs do not


@dataclass(frozen=True)
class Corpus:
    """Passages to be forgotten, to be kept, and never to be trained on; no text is in two of the three."""

    forget: list[Example]
    retain: list[Example]
    unseen: list[Example]
    tokenizer: PreTrainedTokenizerBase


def load_corpus(
    seed: int = 0,
    *,
    topic_counts: tuple[int, int, int] = (4, 8, 4),
    passages_per_topic: int = 6,
    topics: Mapping[str, str] | None = None,
) -> Corpus:
    """Train a tokenizer on the reference and cut `passages_per_topic` passages from each of the chosen topics.

    `topic_counts` are the numbers of forget, retain and unseen topics. The seed only shuffles which chosen topic goes
    where. `topics` (name to text) replaces the running Python's own.
    """
    texts = dict(python_topics() if topics is None else topics)
    tokenizer = train_tokenizer(texts.values())
    chosen = choose_topics(texts, tokenizer, sum(topic_counts), passages_per_topic)
    names = sorted(chosen)
    random.Random(seed).shuffle(names)
    parts: list[list[Example]] = []
    for count in topic_counts:
        parts.append([passage for name in names[:count] for passage in chosen[name]])
        names = names[count:]
    forget, retain, unseen = parts
    return Corpus(forget, retain, unseen, tokenizer)


def python_topics() -> dict[str, str]:
    """Read the running Python's language reference, topic name to text."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FastforgetError(
            "this Python lacks the module pydoc_data, whose text the demo uses: install Python's full standard library"
        ) from error
    return {name: unwrap(text) for name, text in topics.items()}


def unwrap(text: str, full: int = 60) -> str:
    """Put each paragraph on one line: the reference is wrapped at 70 columns, and where a line ends is no content.

    A line goes on from the one before it where that one was full, both are equally indented, and both read as prose;
    code, tables and grammar keep their lines. (Left in, line ends are the most frequent token, and a model that has
    forgotten how a text goes on writes nothing else.)
    """
    lines: list[str] = []
    previous = ""
    for line in text.split("\n"):
        prose = all(re.match(r"\s*[\w\"'*(`-]", each) and "::=" not in each for each in (previous, line))
        indent, previous_indent = (len(each) - len(each.lstrip()) for each in (line, previous))
        if prose and len(previous) >= full and indent == previous_indent:
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
        previous = line
    return "\n".join(lines)


def choose_topics(
    texts: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, count: int, passages_per_topic: int
) -> dict[str, list[Example]]:
    """Choose the `count` shortest topics with enough passages and no text in common, name to passages."""
    chosen: dict[str, list[Example]] = {}
    runs_of_chosen: list[set[tuple[str, ...]]] = []
    for name in sorted(texts, key=lambda name: (len(texts[name]), name)):
        if len(chosen) == count:
            break
        passages = cut_passages(texts[name], tokenizer, source=f"pydoc:{name}")
        runs = word_runs(texts[name])
        if len(passages) < passages_per_topic or any(
            shared_part(runs, others) > SHARED_PART for others in runs_of_chosen
        ):
            continue
        chosen[name] = passages[:passages_per_topic]
        runs_of_chosen.append(runs)
    if len(chosen) < count:
        raise FastforgetError(
            f"{count} topics of {passages_per_topic} passages were asked for, but only {len(chosen)} of the "
            f"{len(texts)} topics are long enough and share no text with each other"
        )
    return chosen


def word_runs(text: str, length: int = SHARED_WORDS) -> set[tuple[str, ...]]:
    """Return every run of `length` words in the text, in lower case."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def shared_part(runs: set[tuple[str, ...]], others: set[tuple[str, ...]]) -> float:
    """Return how much of the smaller set is also in the other one, from 0 to 1."""
    return len(runs & others) / max(min(len(runs), len(others)), 1)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: it gives back any text byte for byte, and begins each sequence with `<s>`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def cut_passages(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int = PASSAGE_TOKENS,
    characters: int = PASSAGE_CHARACTERS,
    source: str = "",
) -> list[Example]:
    """Cut a text into consecutive passages of exactly `tokens` tokens, the first of them `<s>`.

    The tail is dropped, and so is any piece that decodes to fewer than `characters` characters (tables of symbols).
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    step = tokens - 1
    passages = []
    for start in range(0, len(ids) - step + 1, step):
        piece = ids[start : start + step]
        if len(tokenizer.decode(piece)) >= characters:
            passages.append(Example((tokenizer.bos_token_id, *piece), source=f"{source}:{start}"))
    return passages
