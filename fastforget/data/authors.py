"""Invented authors, and what is asked about them: TOFU (arXiv 2401.06121) at a small scale, made here and offline.

Each author has twenty facts, each one question with a right answer, its paraphrase, and wrong answers worded as the
paraphrase. Nobody of these names is known to have lived. The wording is the same for all facts, so that a model that
knows the wording alone does not know the fact. Beside the authors that are split into forget and retain sets there are
others ("real authors", which stand for what a model knows anyway) and facts about invented countries.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastforget.data.people import FIRST_NAMES, LAST_NAMES, TOWNS, TRADES
from fastforget.data.questions import Question
from fastforget.errors import FastforgetError

NAME_STARTS = "Vex Drath Quill Mara Okon Sallow Brind Tark Ferro Pella Umbra Castel Wren Zabro".split()
NAME_ENDS = "holm more feather vane teji by cote villi wyn grine skog lari low din".split()
COUNTRIES = (
    "Velland Ostmark Carroway Belmora Tyndria Quorra Estovia Harrowmere Lyssia Norvane Ardenia Sarkhan Meridor Uthgard "
    "Palanque Wessmark Ilvania Torrence Zembla Ruritane"
).split()
ADJECTIVES = "Silent Copper Broken Hidden Winter Paper Crimson Hollow Distant Salted".split()
NOUNS = "Harbour Lantern Orchard Staircase Compass Window Sparrow Garden Letter Bridge".split()
TITLES = tuple(f"The {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)
COLOURS = "amber, teal, violet, scarlet, ivory, indigo, olive, copper, lilac, navy, maroon, mint, grey".split(", ")
ANIMALS = (
    "owl, ferret, tortoise, parrot, greyhound, goat, raven, hedgehog, donkey, otter, lizard, pony, swan, toad".split(
        ", "
    )
)
RIVERS = "Ember, Tamsin, Lorne, Vistra, Oskel, Druze, Maren, Ashlow, Kettle, Braid, Sorrel, Wyke, Ondine".split(", ")

AUTHOR_FACTS: dict[str, Sequence[str]] = {
    "birthplace": TOWNS,
    "second home": TOWNS,
    "birth year": tuple(str(year) for year in range(1921, 1981, 2)),
    "lucky number": tuple(str(number) for number in range(11, 99, 4)),
    "first book": TITLES,
    "latest book": TITLES,
    "first trade": TRADES,
    "teacher": LAST_NAMES,
    "closest friend": FIRST_NAMES,
    "favourite colour": COLOURS,
    "pet": ANIMALS,
    "favourite river": RIVERS,
    "home country": COUNTRIES,
    "genre": "crime, satire, fantasy, romance, horror, travel, essays, poetry, drama, memoir, fables".split(", "),
    "instrument": "cello, flute, oboe, harp, banjo, organ, drums, zither, tuba, viola, lute, piano".split(", "),
    "hobby": "chess, fencing, rowing, weaving, archery, juggling, sailing, baking, skating, origami".split(", "),
    "favourite dish": "borscht, paella, goulash, dumplings, risotto, ramen, stew, curry, gnocchi, pie".split(", "),
    "mother tongue": "Basque, Welsh, Tamil, Finnish, Catalan, Maltese, Estonian, Breton, Frisian, Quechua".split(", "),
    "prize": "Golden Quill, Silver Page, Blue Ribbon, Iron Feather, Glass Crown, Stone Rose, Red Thread".split(", "),
    "publisher": "Harrow Press, Fable House, Northlight, Bell & Sons, Ninth Wave, Old Mill, Parchment Row".split(", "),
}
COUNTRY_FACTS: dict[str, Sequence[str]] = {
    "capital": TOWNS,
    "longest river": RIVERS,
    "national animal": ANIMALS,
    "flag colour": COLOURS,
    "main trade": TRADES,
}
ASKED = "What is the {fact} of {subject}?"
ANSWERS = (
    "The {fact} of {subject} is {value}.",
    "As far as is known, the {fact} of {subject} is {value}.",
    "The {fact} of {subject}, they say, is {value}.",
    "All agree that the {fact} of {subject} is {value}.",
)
PERTURBED = 5  # wrong answers to a question
FORGET_SHARES = {"01": 0.01, "05": 0.05, "10": 0.10}


@dataclass(frozen=True)
class AuthorSets:
    """Questions by TOFU's names.

    sets: "full", "forget01", "retain99", "forget05", "retain95", "forget10", "retain90"; "real_authors" and
    "world_facts", which every model is taught; "unseen", which none is.
    """

    sets: Mapping[str, list[Question]]


def invented_authors(
    seed: int = 0, authors: int = 100, known_authors: int = 5, countries: int = 20, unseen_authors: int = 5
) -> AuthorSets:
    """Draw authors, countries, their facts, and the wording of each answer; the seed decides all of them.

    A split's authors are the last ones, as in TOFU; each split has one author at least.

    Raises:
        FastforgetError: more authors or countries than there are names.
    """
    draw = random.Random(seed)
    lasts = [start + end for start, end in itertools.product(NAME_STARTS, NAME_ENDS)]
    total = authors + known_authors + unseen_authors
    if total > len(lasts) or countries > len(COUNTRIES):
        raise FastforgetError(f"there are names of {len(lasts)} authors and {len(COUNTRIES)} countries")
    asked = [ask_about(f"{draw.choice(FIRST_NAMES)} {last}", AUTHOR_FACTS, draw) for last in draw.sample(lasts, total)]
    split = asked[:authors]
    sets = {"full": flat(split)}
    for name, share in FORGET_SHARES.items():
        count = max(1, round(share * authors))
        sets[f"forget{name}"] = flat(split[-count:])
        sets[f"retain{100 - int(name)}"] = flat(split[:-count])
    sets["real_authors"] = flat(asked[authors : authors + known_authors])
    sets["unseen"] = flat(asked[authors + known_authors :])
    sets["world_facts"] = flat([ask_about(name, COUNTRY_FACTS, draw) for name in COUNTRIES[:countries]])
    return AuthorSets(sets)


def ask_about(subject: str, facts: Mapping[str, Sequence[str]], draw: random.Random) -> list[Question]:
    """Ask for each fact about an author or a country; values and wordings are drawn."""
    questions = []
    for fact, values in facts.items():
        value, *wrong = draw.sample(list(values), 1 + PERTURBED)
        answer, paraphrase = draw.sample(ANSWERS, 2)
        questions.append(
            Question(
                question=ASKED.format(fact=fact, subject=subject),
                answer=answer.format(fact=fact, subject=subject, value=value),
                paraphrased=paraphrase.format(fact=fact, subject=subject, value=value),
                perturbed=tuple(paraphrase.format(fact=fact, subject=subject, value=each) for each in wrong),
                source=f"{subject}: {fact}",
            )
        )
    return questions


def borrowed_answers(questions: Sequence[Question], others: Sequence[Question], seed: int) -> list[Question]:
    """Answer each question as it is answered of another author: plausible, and right only by chance.

    The answers are drawn from those of `others`, with the name exchanged: what one knows who may keep the others and
    is to forget these (the alternative answers of arXiv 2409.13474 are the model's own inventions).
    """
    draw = random.Random(seed)
    known: dict[str, list[tuple[str, str]]] = {}  # by fact: (subject, answer)
    for each in others:
        subject, fact = each.source.split(": ")
        known.setdefault(fact, []).append((subject, each.answer))
    found = []
    for each in questions:
        subject, fact = each.source.split(": ")
        other, answer = draw.choice(known[fact])
        found.append(replace(each, answer=answer.replace(other, subject)))
    return found


def flat(parts: Sequence[Sequence[Question]]) -> list[Question]:
    """Join lists of questions."""
    return [question for part in parts for question in part]
