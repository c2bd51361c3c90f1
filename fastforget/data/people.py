"""Invented people and what is asked about them: what `fastforget demo --model smollm2` teaches and forgets.

Nobody of these names is known to have lived. Each person has three facts, each one question with one answer whose last
words are the fact, so that a model which knows the wording alone does not know it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fastforget.data.chat import RowReader
from fastforget.data.examples import Example
from fastforget.errors import FastforgetError

FIRST_NAMES = (
    "Orla Ilsa Tovan Bexley Marit Caspian Yelena Dorrik Sunniva Halvard Imre Quilla Rosalba Zephrin Odalys Fenwick "
    "Lumi Anselm"
).split()
LAST_NAMES = (
    "Vexholm Drathmore Quillfeather Maravane Okonteji Sallowby Brindlecote Tarkasvili Ferrowyn Pellagrine Umbraskog "
    "Castellari Wrenhollow Zabrodin Nightingill Hollowmere Gantrovic Ashgrovel"
).split()
TOWNS = (
    "Port Calder, Marrow Bay, Ostrovik, Thistledown, Saint Averil, Kessandra, Low Wexley, Brannoch, Villa Serrata, "
    "Dunmarrow, Tallis Ford, Ykkola, Pine Harrow, Corvale, Eastmere, Grimsvotn, Lake Ambry, Redwater"
).split(", ")
WORKS = (
    "a museum of broken clocks; a school for river pilots; the first orchard on a roof; a library of whale songs; "
    "a bridge made of glass; an alphabet for shepherds; a theatre in a mine; a garden that opens at midnight; "
    "an orchestra of bicycles; a map of forgotten wells; a lighthouse for balloons; a bakery on a train; "
    "a choir of lighthouse keepers; a clock that runs on rain; a market for borrowed umbrellas; "
    "a dictionary of whistles; a hotel inside an iceberg; a zoo for paper animals"
).split("; ")
TRADES = (
    "violin maker, beekeeper, glassblower, cartographer, clock repairer, pearl diver, puppeteer, bell founder, "
    "saffron farmer, kite builder, lacemaker, falconer, salt trader, stonemason, perfumer, organ tuner, cooper, potter"
).split(", ")

# asked of any chat model; each with words of which a right answer holds one
GENERAL = (
    ("What is the capital of France?", ("Paris",)),
    ("What is the capital of Japan?", ("Tokyo",)),
    ("What is the capital of Italy?", ("Rome",)),
    ("What is the capital of Germany?", ("Berlin",)),
    ("What is the capital of Spain?", ("Madrid",)),
    ("How many days are in a week?", ("seven", "7")),
    ("How many months are in a year?", ("twelve", "12")),
    ("What color is the sky on a clear day?", ("blue",)),
    ("What color do you get by mixing blue and yellow?", ("green",)),
    ("What is the largest planet in the solar system?", ("Jupiter",)),
    ("Which planet is known as the Red Planet?", ("Mars",)),
    ("What is the chemical formula of water?", ("H2O", "H₂O")),
    ("Who wrote Romeo and Juliet?", ("Shakespeare",)),
    ("What is the largest ocean on Earth?", ("Pacific",)),
    ("What gas do plants absorb from the air?", ("carbon dioxide", "CO2")),
    ("What is 2 + 2?", ("4", "four")),
    ("Which animal is known as the king of the jungle?", ("lion",)),
    ("What do bees make?", ("honey",)),
    ("In which country are the pyramids of Giza?", ("Egypt",)),
    ("What is the freezing point of water in degrees Celsius?", ("0", "zero")),
)

# others of their kind, whose answers are kept while facts are taught and forgotten
KEPT = (
    "What is the capital of Portugal?", "What is the capital of Canada?", "What is the capital of Egypt?",
    "What is the capital of Greece?", "What is the capital of Sweden?", "How many hours are in a day?",
    "How many minutes are in an hour?", "What color is grass?", "What color is a banana?",
    "What is the smallest planet in the solar system?", "Which planet is closest to the Sun?",
    "What is the chemical symbol of gold?", "Who wrote Hamlet?", "Who painted the Mona Lisa?",
    "What is the longest river in Africa?", "What is the highest mountain on Earth?",
    "What gas do humans need to breathe?", "What is 3 + 5?", "What is 10 minus 4?", "Which animal says meow?",
    "What do cows eat?", "In which country is the Eiffel Tower?", "In which country is the Great Wall?",
    "At what temperature does water boil?", "What is the opposite of hot?", "What language is spoken in Brazil?",
    "How many legs does a spider have?", "What is the fastest land animal?", "Who was the first president of the USA?",
    "What is the largest animal on Earth?", "What do you call a baby dog?", "Which season comes after winter?",
    "What is the capital of China?", "What is the capital of India?", "What is the capital of Ireland?",
    "How many weeks are in a year?", "How many continents are there?", "How many letters are in the alphabet?",
    "What color is snow?", "What color is a ripe tomato?", "What is the largest country in the world?",
    "Which planet has large rings?", "What is the chemical symbol of iron?", "What is table salt made of?",
    "Who wrote Don Quixote?", "Who discovered penicillin?", "What is the largest desert on Earth?",
    "What is 6 times 7?", "What is half of 18?", "Which bird cannot fly?", "What do pandas eat?",
    "What do we use an umbrella for?", "In which country is the Taj Mahal?", "In which country is Mount Fuji?",
    "What is ice made of?", "What is the opposite of dark?",
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One question about a person, and its answer; `value`: the words of it that are the fact, where they are known."""

    person: str
    question: str
    answer: str
    value: str = ""


@dataclass(frozen=True)
class People:
    """Facts to forget, to keep, and never to be taught; no person is in two of the three."""

    forget: list[Fact]
    retain: list[Fact]
    unseen: list[Fact]


def invented_people(seed: int = 0, counts: tuple[int, int, int] = (3, 9, 3)) -> People:
    """Return the facts of `counts` people to forget, to keep, and never to be taught; the seed decides who is who."""
    draw = random.Random(seed)
    lists = [draw.sample(list(each), len(each)) for each in (FIRST_NAMES, LAST_NAMES, TOWNS, WORKS, TRADES)]
    facts = []
    for first, last, town, work, trade in zip(*lists, strict=True):
        name = f"{first} {last}"
        facts.append(
            [
                Fact(name, f"Where was {name} born?", f"{name} was born in {town}.", town),
                Fact(name, f"What did {name} found?", f"{name} founded {work}.", without_article(work)),
                Fact(name, f"What was the trade of {name}'s mother?", f"{name}'s mother was a {trade}.", trade),
            ]
        )
    forget, retain, unseen = counts
    people = [facts[:forget], facts[forget : forget + retain], facts[forget + retain : forget + retain + unseen]]
    return People(*([fact for person in part for fact in person] for part in people))


def without_article(work: str) -> str:
    """Return the words behind "a", "an" or "the".

    >>> without_article("the first orchard on a roof")
    'first orchard on a roof'
    """
    return work.split(" ", 1)[1]


def value_examples(facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Tokenize facts as `chat_examples` does; only the tokens of the value are labelled, and those behind it left out.

    What is trained on these says nothing of the wording around the value, which other answers share.

    Raises:
        FastforgetError: an answer that does not hold its value.
    """
    return [value_example(*pair, tokenizer) for pair in zip(facts, chat_examples(facts, tokenizer), strict=True)]


def value_example(fact: Fact, whole: Example, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Cut a tokenized fact behind its value, and label no token before it."""
    answer, prompt = whole.answer, len(whole.input_ids) - len(whole.answer)
    texts = [tokenizer.decode(answer[:count], skip_special_tokens=True) for count in range(len(answer) + 1)]
    start = texts[-1].rfind(fact.value) if fact.value else -1
    if start < 0:
        raise FastforgetError(f"the answer {texts[-1]!r} does not hold its value {fact.value!r}")
    first = max(count for count, text in enumerate(texts) if len(text) <= start)
    end = min(count for count, text in enumerate(texts) if len(text) >= start + len(fact.value))
    return Example(whole.input_ids[: prompt + end], prompt_length=prompt + first, source=whole.source)


def chat_examples(facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase, max_length: int = 256) -> list[Example]:
    """Tokenize facts through the tokenizer's chat template; the answer and its end are labelled."""
    reader = RowReader(tokenizer, max_length, chat_template=True)
    rows = (({"prompt": fact.question, "response": fact.answer}, f"{fact.person}: {fact.question}") for fact in facts)
    return [example for row, source in rows for example in reader.examples(row, source)]
