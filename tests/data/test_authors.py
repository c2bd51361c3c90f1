"""Invented authors: enough questions, splits as TOFU's, and nothing of a value in its own question."""

import pytest

from fastforget.data.authors import ANSWERS, AUTHOR_FACTS, FORGET_SHARES, PERTURBED, borrowed_answers, invented_authors
from fastforget.errors import FastforgetError


def test_splits_are_tofus():
    sets = invented_authors(0).sets
    assert {name: len(part) // len(AUTHOR_FACTS) for name, part in sets.items() if name != "world_facts"} == {
        "full": 100, "forget01": 1, "retain99": 99, "forget05": 5, "retain95": 95, "forget10": 10, "retain90": 90,
        "real_authors": 5, "unseen": 5,
    }  # fmt: skip
    assert len(sets["forget10"]) >= 200 and len(sets["world_facts"]) == 100
    for name, share in FORGET_SHARES.items():
        forget, retain = sets[f"forget{name}"], sets[f"retain{round(100 * (1 - share))}"]
        assert retain + forget == sets["full"]
    subjects = {name: {each.source.partition(":")[0] for each in part} for name, part in sets.items()}
    assert not subjects["full"] & subjects["real_authors"] and not subjects["unseen"] & subjects["full"]
    assert not subjects["forget10"] & subjects["retain90"]


def test_answers_paraphrases_and_wrong_answers():
    for question in invented_authors(1).sets["full"][:200]:
        subject, _, fact = question.source.partition(": ")
        said = {
            wording.format(fact=fact, subject=subject, value=value): (number, value)
            for number, wording in enumerate(ANSWERS)
            for value in AUTHOR_FACTS[fact]
        }
        wording, value = said[question.answer]
        other, same = said[question.paraphrased]
        assert other != wording and same == value and subject in question.question and fact in question.question
        wrong = [said[each] for each in question.perturbed]
        assert [number for number, _ in wrong] == [other] * PERTURBED, "worded as the paraphrase"
        assert value not in {each for _, each in wrong} and len(set(wrong)) == PERTURBED


def test_borrowed_answers_are_true_of_somebody_else():
    sets = invented_authors(1).sets
    forget, retain = sets["forget10"], sets["retain90"]
    found = borrowed_answers(forget, retain, seed=3)
    said = {
        (each.source.partition(": ")[2], each.answer.replace(each.source.partition(":")[0], "X")) for each in retain
    }
    for own, other in zip(forget, found, strict=True):
        subject, _, fact = own.source.partition(": ")
        assert subject in other.answer and (fact, other.answer.replace(subject, "X")) in said
        assert (other.question, other.paraphrased, other.perturbed) == (own.question, own.paraphrased, own.perturbed)
    assert sum(own.answer != other.answer for own, other in zip(forget, found, strict=True)) > 0.9 * len(forget)
    assert found == borrowed_answers(forget, retain, seed=3) != borrowed_answers(forget, retain, seed=4)


def test_the_seed_decides_everything():
    assert invented_authors(3).sets == invented_authors(3).sets
    assert invented_authors(3).sets["forget10"] != invented_authors(4).sets["forget10"]
    with pytest.raises(FastforgetError, match="names of"):
        invented_authors(0, authors=10_000)
