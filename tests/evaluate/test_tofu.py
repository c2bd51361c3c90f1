"""TOFU's figures on hand-made cases, against formulas written out and the definition of the KS test."""

import doctest
import json
import math
from itertools import combinations

import pytest
import torch
from helpers import random_model

from fastforget.data.questions import Question
from fastforget.errors import FastforgetError
from fastforget.evaluate import questions as questions_module
from fastforget.evaluate.questions import Answered, ask
from fastforget.evaluate.tofu import forget_quality, model_utility, read_retain_ratios, tofu_report

BORN = Question(
    "Where was Orla born?", " In Calder.", " Orla comes from Calder.", (" From Marrow.", " From Tallis Ford.")
)
QUESTIONS = [BORN, Question("What is it?", " A map.", "", (" A clock.",)), Question("Who?", " Orla."), BORN]


@torch.no_grad()
def probability(model, tokenizer, question, answer):
    """Geometric mean probability of an answer's tokens and its end, from the model's logits."""
    prompt = [tokenizer.bos_token_id, *tokenizer.encode(question, add_special_tokens=False)]
    ids = [*prompt, *tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    logp = [float(log_probs[place - 1, ids[place]]) for place in range(len(prompt), len(ids))]
    return math.exp(sum(logp) / len(logp))


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_answers_equal_those_of_full_logits(family, tokenizer):
    model = random_model(family, tokenizer).eval()
    done = []
    found = ask(model, tokenizer, QUESTIONS, characters=12, batch_size=3, progress=lambda *each: done.append(each))
    assert done[-1][0] == done[-1][1] == sum(2 + len(each.perturbed) for each in QUESTIONS) + len(QUESTIONS)
    for question, answered in zip(QUESTIONS, found, strict=True):
        right = probability(model, tokenizer, question.question, question.answer)
        paraphrased = probability(model, tokenizer, question.question, question.paraphrased or question.answer)
        wrong = [probability(model, tokenizer, question.question, each) for each in question.perturbed]
        assert answered.probability == pytest.approx(right, abs=1e-5)
        assert answered.paraphrased_probability == pytest.approx(paraphrased, abs=1e-5)
        if wrong:
            assert answered.normalised == pytest.approx(right / (right + sum(wrong)), abs=1e-5)
            assert answered.truth_ratio == pytest.approx(math.prod(wrong) ** (1 / len(wrong)) / paraphrased, rel=1e-4)
        else:
            assert answered.normalised is answered.truth_ratio is None
    assert found[0] == found[3] and len(found[0].output) <= 12
    assert ask(model, tokenizer, []) == []


def test_an_answer_is_measured_whole_or_refused(tokenizer):
    model = random_model("llama", tokenizer, context=64).eval()
    with pytest.raises(FastforgetError, match=r"rows:7.*longer than the model's context of 64"):
        ask(model, tokenizer, [Question("Who?", " Orla and all the others." * 40, source="rows:7")])
    with pytest.raises(FastforgetError, match="empty response"):
        ask(model, tokenizer, [Question("Who?", "")])


def test_ratios_of_hand_made_answers():
    assert doctest.testmod(questions_module).failed == 0
    assert questions_module.truth_ratio(1.0, [2.0, 3.0, 7.0]) == pytest.approx(math.exp(-3.0))
    assert questions_module.truth_ratio(2000.0, [1.0]) == math.exp(700.0)
    assert questions_module.normalised_probability(math.log(2), [math.log(4), math.log(4)]) == pytest.approx(0.5)
    assert questions_module.normalised_probability(5000.0, [1.0]) == pytest.approx(0.0)


def answers(probability, normalised, rouge, ratio):
    return [Answered(probability, normalised, 0.1, ratio, rouge, rouge, "")]


def test_utility_is_the_harmonic_mean_of_nine():
    sets = {
        "forget": answers(0.2, 0.3, 0.4, 2.0),
        "retain": answers(0.9, 0.5, 0.8, 0.25),
        "real_authors": answers(0.1, 0.6, 0.7, 0.5),
        "world_facts": answers(0.1, 0.4, 0.3, 0.2),
    }
    report = tofu_report(sets, [1.0, 2.0])
    nine = [0.9, 0.8, 0.75, 0.6, 0.7, 0.5, 0.4, 0.3, 0.8]
    assert report.utility == pytest.approx(9 / sum(1 / each for each in nine)) and report.utility_reason is None
    assert report.figures["forget_truth_ratio"] == 0.5 and report.figures["forget_probability"] == 0.2
    assert report.figures["retain_truth_ratio"] == 0.75
    sets["retain"] = answers(0.9, 0.5, 0.8, 3.0)  # the wrong answer is ahead: 0, and so is the mean
    assert tofu_report(sets, None).utility == 0.0
    del sets["world_facts"]
    report = tofu_report(sets, None)
    assert report.utility is None and "world_facts_rouge" in report.utility_reason
    assert model_utility({})[0] is None


def test_a_broken_model_has_no_truth_ratio():
    broken = answers(0.5, 0.5, 0.5, math.nan) + answers(0.5, 0.5, 0.5, 0.5)
    report = tofu_report(dict.fromkeys(("forget", "retain", "real_authors", "world_facts"), broken), [1.0])
    assert math.isnan(report.figures["forget_truth_ratio"]) and math.isnan(report.figures["retain_truth_ratio"])
    assert report.utility is None and "retain_truth_ratio" in report.utility_reason


def exact_p_value(one, other):
    """The KS test by its definition: the share of all ways to deal the values whose distance is at least this one's."""

    def distance(first, second):
        def below(part, value):
            return sum(each <= value for each in part) / len(part)

        return max(abs(below(first, value) - below(second, value)) for value in (*first, *second))

    values, observed = [*one, *other], distance(one, other)
    deals = [
        distance([values[place] for place in chosen], [v for place, v in enumerate(values) if place not in chosen])
        for chosen in combinations(range(len(values)), len(one))
    ]
    return sum(each >= observed - 1e-12 for each in deals) / len(deals)


@pytest.mark.parametrize(
    "unlearned, retained",
    [
        ([0.1, 0.2, 0.3, 0.4], [0.9, 1.1, 1.2]),  # a log of another size
        ([0.1, 0.5, 0.9], [0.2, 0.6, 0.7]),
        ([0.5], [0.7]),  # one example
        ([0.1, 0.2], [0.1000001, 0.2000001]),
    ],
)
def test_forget_quality_is_the_ks_tests_p_value(unlearned, retained):
    quality, reason = forget_quality(unlearned, retained)
    assert reason is None and quality == pytest.approx(exact_p_value(unlearned, retained))


def test_no_forget_quality_without_what_it_compares():
    assert forget_quality([0.5, 0.6], [0.5, 0.6]) == (1.0, None)
    for unlearned, retained, words in (
        ([0.5], None, "no log of a retain model"),
        ([], [0.5], "perturbed answers"),
        ([math.nan], [0.5], "NaN"),
    ):
        quality, reason = forget_quality(unlearned, retained)
        assert quality is None and words in reason


def test_retain_logs_of_three_kinds_are_read(tmp_path):
    path = tmp_path / "log.json"
    for log in (
        {"forget_truth_ratio": [0.5, 2.0]},
        {"forget_truth_ratio": {"agg_value": 1.0, "value_by_index": {"0": {"score": 0.5}, "1": {"score": 2.0}}}},
        {
            "avg_paraphrased_loss": {"0": math.log(0.5), "1": math.log(2.0)},
            "average_perturb_loss": {"0": [-1.0, 1.0], "1": [0.0, 0.0]},
        },
    ):
        path.write_text(json.dumps(log))
        assert read_retain_ratios(path) == pytest.approx([0.5, 2.0])
    for text, words in (
        ("{", "not valid JSON"),
        ("[1]", "needs a JSON object"),
        ('{"other": 1}', "its keys are other"),
        ('{"forget_truth_ratio": {"value_by_index": {"0": {}}}}', "cannot be read"),
        ('{"forget_truth_ratio": ["x"]}', "cannot be read"),
        ('{"avg_paraphrased_loss": {"0": 1e4}, "average_perturb_loss": {"0": [1.0]}}', "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(FastforgetError, match=words):
            read_retain_ratios(path)
