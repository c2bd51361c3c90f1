"""`fastforget evaluate --suite`: each suite's figures, both models side by side, going on after an interruption."""

import json
import re
from functools import partial

import pytest
import torch
from helpers import load_perturbed, write_rows

import fastforget as ff
from fastforget.evaluate import nearness
from fastforget.evaluate.harm import harm_report, reduction
from fastforget.jobs import suites
from fastforget.jobs.evaluate import evaluate
from fastforget.jobs.evaluation_options import EvaluateOptions

TOFU = [
    {
        "question": f"Where was {name} born?",
        "answer": f"{name} was born in {town}.",
        "paraphrased_answer": f"{name} comes from {town}.",
        "perturbed_answer": [f"{name} comes from Marrow.", f"{name} comes from Corvale."],
    }
    for name, town in (("Orla", "Calder"), ("Ilsa", "Ostrovik"), ("Tovan", "Brannoch"))
]
HALU = [{"question": "Who?", "right_answer": "Orla.", "hallucinated_answer": "Ilsa and Tovan."}] * 2
TEXTS = [{"text": f"The river {name} flows to the sea."} for name in ("Ob", "Rhine", "Elbe")]
QUICK = {"bits": 32, "quiet": True, "max_length": 48}


@pytest.fixture(scope="module")
def adapter(tiny, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    ff.save_adapter(load_perturbed(tiny["llama"]), tokenizer, folder)
    return folder


@pytest.fixture
def short(monkeypatch, short_continuations):
    monkeypatch.setattr(suites, "continue_greedily", partial(suites.continue_greedily, characters=12))


def bad_words(dialogues):
    return [float(len(each.response) > 4) for each in dialogues]


def test_tofu_both_models_and_a_log_that_another_is_compared_with(tiny, adapter, tmp_path, short):
    arguments = {**QUICK, "retain": TOFU[1:], "format": None}
    asked = write_rows(tmp_path / "asked.jsonl", TOFU)
    sets = {"real_authors": str(asked), "world_facts": str(asked)}
    report = evaluate(tiny["llama"], TOFU, tmp_path / "a", suite="tofu", adapter=adapter, sets=sets, **arguments)
    before, after = report["before"]["figures"], report["after"]["figures"]
    assert before["forget_probability"] != after["forget_probability"] and 0 <= after["utility"] <= 1
    assert after["forget_quality"] is None and "no log" in after["forget_quality_reason"]
    log = json.loads((tmp_path / "a" / "log.json").read_text())
    assert len(log["forget_truth_ratio"]) == 3
    html = (tmp_path / "a" / "report.html").read_text()
    assert "Suite tofu" in html and "no log of a retain model" in html and "Orla was born in Calder" in html
    again = evaluate(
        tiny["llama"],
        TOFU,
        tmp_path / "b",
        suite="tofu",
        adapter=adapter,
        retain_log=tmp_path / "a" / "log.json",
        **arguments,
    )
    assert again["after"]["figures"]["forget_quality"] == 1.0, "the same model"
    assert again["before"]["figures"]["forget_quality"] <= 1.0
    assert again["after"]["figures"]["utility"] is None and "world_facts" in again["after"]["figures"]["utility_reason"]


def test_muse(tiny, adapter, tmp_path, short):
    places = {
        "holdout": write_rows(tmp_path / "h.jsonl", TEXTS[:2]),
        "verbmem": write_rows(tmp_path / "v.jsonl", [{"prompt": "The river", "gt": " flows to the sea."}]),
        "forget_qa": write_rows(tmp_path / "q.jsonl", [{"question": "Where?", "answer": "To the sea."}]),
    }
    report = evaluate(
        tiny["llama"],
        TEXTS,
        tmp_path / "out",
        suite="muse",
        adapter=adapter,
        sets={name: str(place) for name, place in places.items()},
        **QUICK,
    )
    figures = report["after"]["figures"]
    assert 0 <= figures["auc"] <= 1 and figures["retain_knowmem"] is None and figures["privleak"] is None
    assert figures["forget_verbmem"] is not None and figures["forget_knowmem"] is not None
    assert json.loads((tmp_path / "out" / "log.json").read_text()) == {"auc": figures["auc"]}


def test_a_passage_of_verbmem_is_whole_however_long(tiny, tokenizer, tmp_path):
    rows = [{"prompt": "The river " * 20, "gt": "flows to the sea. " * 20}, {"prompt": "The", "gt": " sea"}]
    places = {"verbmem": str(write_rows(tmp_path / "v.jsonl", rows))}
    suite = suites.MuseSuite(
        EvaluateOptions(tiny["llama"], TEXTS, tmp_path / "x", suite="muse", sets=places, **QUICK), tokenizer
    )
    assert suite.pairs == [(row["prompt"], row["gt"]) for row in rows]


def test_membership(tiny, adapter, tmp_path):
    report = evaluate(
        tiny["llama"],
        TEXTS,
        tmp_path / "out",
        suite="membership",
        adapter=adapter,
        unseen=["Two and two are four."] * 2,
        reference=tiny["opt"],
        **QUICK,
    )
    figures = report["after"]["figures"]
    assert set(figures) == {f"{name}_auc" for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "reference")}
    assert all(0 <= value <= 1 for value in figures.values())
    with pytest.raises(ff.FastforgetError, match="needs --unseen"):
        evaluate(tiny["llama"], TEXTS, tmp_path / "x", suite="membership", **QUICK)


def test_harm_is_flagged_by_the_evaluator_and_blank_output_apart(tiny, adapter, tmp_path, short):
    rows = [{"prompt": f"Question {name}?", "response": "x"} for name in "abc"]
    arguments = {**QUICK, "suite": "harm", "adapter": adapter, "evaluator": bad_words}
    report = evaluate(tiny["llama"], rows, tmp_path / "out", **arguments)
    for model in ("before", "after"):
        figures = report[model]["figures"]
        flagged = [len(each["output"]) > 4 for each in report[model]["samples"]]
        assert (
            figures["flagged"] == pytest.approx(sum(flagged) / 3)
            and 0 <= figures["blank"] <= figures["degenerate"] <= 1
        )
        assert figures["perplexity"] > 1
    assert "reduction" in report["compared"]
    broken = {**arguments, "evaluator": lambda dialogues: [float("nan")] * len(dialogues)}
    with pytest.raises(ff.FastforgetError, match=r"score of the answer to .*Question a.* is nan"):
        evaluate(tiny["llama"], rows, tmp_path / "x", **broken)
    with pytest.raises(ff.FastforgetError, match="needs --evaluator"):
        evaluate(tiny["llama"], rows, tmp_path / "x", suite="harm", **QUICK)
    with pytest.raises(ff.FastforgetError, match="needs prompts"):
        evaluate(tiny["llama"], TEXTS, tmp_path / "x", suite="harm", evaluator=bad_words, **QUICK)


def test_harm_asks_each_prompt_once_however_long_its_response(tiny, tokenizer, tmp_path):
    rows = [{"prompt": f"Question {name}?", "response": "Much is said. " * 40} for name in "ab"]
    options = EvaluateOptions(tiny["llama"], rows, tmp_path / "x", suite="harm", evaluator=bad_words, **QUICK)
    suite = suites.HarmSuite(options, tokenizer)
    assert [tokenizer.decode(each) for each in suite.prompts] == ["<s>Question a?", "<s>Question b?"]


def test_harm_of_hand_made_answers():
    report = harm_report(["bad bad", "", "fine then"], [0.9, 0.0, 0.5], 0.5, 1.0)
    assert report.flagged == pytest.approx(2 / 3) and report.blank == pytest.approx(1 / 3)
    assert report.distinct_1 == pytest.approx(3 / 4) and report.perplexity == pytest.approx(2.718281828)
    assert harm_report(["a"], [0.0], 0.5, None).perplexity is None
    assert reduction(0.8, 0.2)[0] == pytest.approx(0.75) and reduction(0.0, 0.0)[0] is None
    assert reduction(None, 0.0)[0] is None


def test_hallucination_looks_at_which_answer_is_nearer(tiny, adapter, tmp_path, monkeypatch):
    said = iter([["Orla."] * 2, ["Ilsa and Tovan."] * 2])
    monkeypatch.setattr(suites, "continue_greedily", lambda *given, **named: next(said))
    report = evaluate(tiny["llama"], HALU, tmp_path / "out", suite="hallucination", adapter=adapter, **QUICK)
    assert report["before"]["figures"]["hallucinated"] == 0.0 and report["after"]["figures"]["hallucinated"] == 1.0
    said = iter([["", " "]])
    report = evaluate(tiny["llama"], HALU, tmp_path / "b", suite="hallucination", **QUICK)
    assert report["after"]["figures"]["hallucinated"] is None and report["after"]["figures"]["not_answered"] == 1.0


def test_similarity_of_hand_made_states():
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    both = torch.cat((east, north))
    assert nearness.similarity(both, east) == pytest.approx(2 * 0.5 * 1.0 / 1.5)
    assert nearness.similarity(east, north) == 0.0 and nearness.similarity(east, east) == 1.0
    assert nearness.nearest([east], [north], north) is True and nearness.nearest([east, None], [north], east) is False
    assert nearness.nearest([None], [north], east) is None and nearness.nearest([east], [north], None) is None


@pytest.mark.parametrize("suite", ["tofu", "memorisation"])
def test_an_interrupted_evaluation_goes_on_and_ends_alike(tiny, adapter, tmp_path, short, monkeypatch, suite):
    from fastforget.jobs import evaluate as job

    rows = TOFU if suite == "tofu" else [{"prompt": each["question"], "response": each["answer"]} for each in TOFU]
    arguments = {**QUICK, "suite": suite, "adapter": adapter}
    whole = evaluate(tiny["llama"], rows, tmp_path / "whole", **arguments)
    calls = []
    target, name = (suites.TofuSuite, "measure") if suite == "tofu" else (job, "measure")
    original = getattr(target, name)

    def stops(*given, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*given, **named)

    monkeypatch.setattr(target, name, stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny["llama"], rows, tmp_path / "out", **arguments)
    assert not (tmp_path / "out" / "report.json").exists()
    found = evaluate(tiny["llama"], rows, tmp_path / "out", **arguments)
    assert len(calls) == 3, "the untouched model is not measured again"
    for report in (whole, found):
        for name in ("seconds", "peak_rss_mb"):
            del report[name]
    assert found == whole and not (tmp_path / "out" / ".stages").exists()


def test_an_interrupted_evaluation_of_other_data_begins_anew(tiny, adapter, tmp_path, short, monkeypatch):
    asked = write_rows(tmp_path / "asked.jsonl", TOFU[:1])
    arguments = {**QUICK, "suite": "tofu", "adapter": adapter, "out": tmp_path / "out"}
    with monkeypatch.context() as patch:
        patch.setattr(suites.TofuSuite, "compare", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate(tiny["llama"], asked, **arguments)
    write_rows(asked, TOFU)
    assert len(evaluate(tiny["llama"], asked, **arguments)["after"]["log"]["forget_truth_ratio"]) == 3


def test_bad_input_is_one_line_and_code_2(run, tmp_path):
    broken = write_rows(tmp_path / "broken.jsonl", [*TOFU, {"question": "Q"}])
    bad = [
        (("--suite", "tofuu"), "unknown suite 'tofuu': choose one of"),
        (
            ("--suite", "tofu", "--set", "moon=x"),
            "the suite tofu has no set 'moon'; its further sets are: real_authors",
        ),
        (
            ("--suite", "tofu", "--forget", str(broken)),
            r"broken\.jsonl:4 is not as 'tofu' is: it has no column 'answer'",
        ),
        (("--suite", "tofu", "--retain-log", str(broken)), "is not valid JSON"),
        (("--suite", "harm"), "needs --evaluator"),
    ]
    for arguments, words in bad:
        forget = () if "--forget" in arguments else ("--forget", str(write_rows(tmp_path / "f.jsonl", TOFU)))
        out = tmp_path / "out"
        code, _, errors = run("evaluate", "--model", "MODEL", "--out", str(out), "--bits", "32", *forget, *arguments)
        assert code == 2 and len(errors) == 1 and re.search(words, errors[0]), (arguments, errors)
        assert not out.exists()
