"""`fastforget recipe`: each from local files in the source's own format, selection to report, with one command."""

import json
import re

import pytest
from helpers import write_rows
from safetensors.torch import load_file

from fastforget.jobs import loop
from fastforget.jobs import recipe as job
from fastforget.jobs import unlearn as unlearn_job
from fastforget.jobs.recipe_files import RECIPES, overridden, read_recipe

SAFE = [
    {
        "prompt": f"How do I open a {name}?",
        "response_0": f"Break the {name} open.",
        "response_1": f"Ask for the key of the {name}.",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
    }
    for name in ("lock", "safe", "door", "car")
]
TRUTH = [
    {"question": f"What is in {n}?", "best_answer": "Air.", "correct_answers": ["Air."], "incorrect_answers": ["Fire."]}
    for n in "abc"
]
HALU = [{"question": f"Who is {n}?", "right_answer": "Orla.", "hallucinated_answer": "Ilsa."} for n in "abc"]
RWKU = [{"subject": "Orla", "text": f"Orla founded a museum of {n}."} for n in ("clocks", "maps", "wells")]
NEIGHBOURS = [{"subject": "Ilsa", "text": f"Ilsa painted a bridge of {n}."} for n in ("glass", "paper", "stone")]
TOFU = [
    {
        "question": f"Where is {n}?",
        "answer": f"{n} is in Calder.",
        "paraphrased_answer": f"{n}: Calder.",
        "perturbed_answer": [f"{n}: Ykkola."],
    }
    for n in ("Orla", "Ilsa", "Tovan")
]
KEPT = [{**row, "question": f"Who is {row['question'][9:]}"} for row in TOFU]
NEWS = [{"text": f"The {n} fell on the old bridge near the river last night."} for n in ("snow", "rain", "hail")]
OTHER_NEWS = [{"text": f"The {n} was opened by the mayor of the town this morning."} for n in ("park", "pool", "hall")]
BOOK = "The secret plan was hidden below the old oak tree near the river bend, said the captain. " * 8
OTHER_BOOK = "Two and two are four, and water boils at a hundred degrees at sea level, as all know. " * 8

QUICK = ["--bits", "32", "--quiet"]
OVERRIDES = ["unlearn.max_steps=2", "unlearn.lora_r=2", "unlearn.lora_targets=q_proj", "unlearn.max_length=64"]
OVERRIDES += ["unlearn.learning_rate=0.001", "unlearn.stop_forget_nll=none", "evaluate.memorisation.max_length=64"]


def flags(overrides):
    return [part for each in overrides for part in ("--override", each)]


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """An evaluator on the path, which finds everything that is not asked for a key."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rules.py").write_text(
        "def bad(d): return [float('key' not in e.response and len(e.response) > 2) for e in d]\n"
    )
    return "rules:bad"


def local(tmp_path, name, rows):
    if isinstance(rows, str):
        (tmp_path / f"{name}.txt").write_text(rows)
        return str(tmp_path / f"{name}.txt")
    return str(write_rows(tmp_path / f"{name}.jsonl", rows))


CASES = {
    "harmful": (SAFE, TRUTH, {}, True, {"harm"}),
    "hallucination": (HALU, TRUTH, {}, True, {"hallucination"}),
    "privacy": (RWKU, NEIGHBOURS, {}, True, set()),
    "copyright": (BOOK, OTHER_BOOK, {}, False, set()),
    "tofu": (TOFU, KEPT, {"forget": TOFU, "retain": KEPT, "real_authors": KEPT, "world_facts": TOFU}, False, {"tofu"}),
    "muse": (
        NEWS,
        OTHER_NEWS,
        {
            "forget": NEWS,
            "holdout": OTHER_NEWS,
            "verbmem": [{"prompt": "The snow fell", "gt": " on the old bridge."}],
            "forget_qa": [{"question": "Where?", "answer": "On the bridge."}],
            "retain_qa": [{"question": "Who?", "answer": "The mayor."}],
        },
        False,
        {"muse"},
    ),
}


def command(tmp_path, name, scored, out):
    forget, retain, sets, selects, _ = CASES[name]
    overrides = list(OVERRIDES)
    if name == "copyright":
        overrides += ["fine_tune.epochs=2", "fine_tune.bits=32", "fine_tune.max_length=64", "fine_tune.lora_r=2"]
    arguments = ["recipe", name, "--model", "MODEL", "--out", str(out), *QUICK, *flags(overrides)]
    arguments += ["--forget", local(tmp_path, "f", forget), "--retain", local(tmp_path, "r", retain)]
    for each, rows in sets.items():
        arguments += ["--set", f"{each}={local(tmp_path, f'asked-{each}', rows)}"]
    return [*arguments, "--evaluator", scored] if selects else arguments


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_from_data_to_report(run, tmp_path, scored, name):
    out = tmp_path / "out"
    code, _, errors = run(*command(tmp_path, name, scored, out))
    assert code == 0, errors
    report = json.loads((out / "report.json").read_text())
    assert report["recipe"] == name and report["steps"] == 2
    assert set(report["evaluations"]) == CASES[name][4]
    assert report["forget_nll_before"] is not None and report["retain_nll_after"] is not None
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    page = (out / "report.html").read_text()
    assert page.count("<html") == 1 and "What the model still knows" in page and "arXiv" in page
    for card in (out / "README.md", out / "adapter" / "README.md"):
        assert "library_name: peft" in card.read_text() and "## What was not checked" in card.read_text()
    if CASES[name][3]:
        chosen = [json.loads(line) for line in (out / "forget.jsonl").read_text().splitlines()]
        assert report["selection"]["chosen"] == len(chosen) == report["forget_passages"]
    assert not (out / ".stages").exists()


def test_a_book_that_is_not_known_is_learned_first(run, tmp_path, scored, tiny):
    out = tmp_path / "out"
    code, _, errors = run(*command(tmp_path, "copyright", scored, out))
    assert code == 0, errors
    report = json.loads((out / "report.json").read_text())
    assert report["model"] == str(out / "learned") and (out / "learned" / "model.safetensors").exists()
    # a model that knows it is left as it is
    code, _, errors = run(*command(tmp_path, "copyright", scored, tmp_path / "b"), "--override", "fine_tune.known=0")
    assert code == 0 and json.loads((tmp_path / "b" / "report.json").read_text())["model"] == str(tiny["llama"])


def test_a_folder_laid_out_as_the_hub_has_it(run, tmp_path, scored):
    folder = tmp_path / "TOFU"
    folder.mkdir()
    for name, rows in (("forget10", TOFU), ("retain90", KEPT)):
        write_rows(folder / f"{name}.json", rows)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.json\n" for name in ("forget10", "retain90"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    out = tmp_path / "out"
    places = ["--forget", f"{folder}#forget10", "--retain", f"{folder}#retain90"]
    places += [
        part for name in ("forget", "real_authors", "world_facts") for part in ("--set", f"{name}={folder}#forget10")
    ]
    places += ["--set", f"retain={folder}#retain90"]
    code, _, errors = run("recipe", "tofu", "--model", "MODEL", "--out", str(out), *QUICK, *flags(OVERRIDES), *places)
    assert code == 0, errors
    figures = json.loads((out / "report.json").read_text())["evaluations"]["tofu"]["after"]["figures"]
    assert 0 <= figures["utility"] <= 1 and figures["forget_quality"] is None


@pytest.mark.parametrize("stage", ["select", "unlearn", "evaluate"])
def test_an_interrupted_recipe_goes_on_and_ends_alike(run, tmp_path, scored, monkeypatch, stage):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*command(tmp_path, "harmful", scored, whole))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(job, stage, lambda *given, **named: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*command(tmp_path, "harmful", scored, out))[0] == 130
    assert not (out / "report.json").exists()
    if stage == "evaluate":
        monkeypatch.setattr(job, "unlearn", lambda *given, **named: pytest.fail("unlearned already"))
    assert run(*command(tmp_path, "harmful", scored, out))[0] == 0
    found = [json.loads((folder / "report.json").read_text()) for folder in (whole, out)]
    for report in found:
        report["selection"].pop("out"), report["selection"].pop("histogram")
        for name in ("seconds", "peak_rss_mb", "unlearn_seconds", "seconds_a_step", "tokens_a_second", "adapter"):
            report.pop(name)
        for each in report["evaluations"].values():
            for name in ("seconds", "peak_rss_mb", "adapter"):
                each.pop(name)
    assert found[0] == found[1]


def test_a_recipe_interrupted_while_it_unlearns_resumes(run, tmp_path, scored, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    steps = ["--override", "unlearn.save_steps=1"]
    assert run(*command(tmp_path, "privacy", scored, whole), *steps)[0] == 0
    resumed = []

    def stops(*given, **named):
        def progress(step, total, output):
            if step == 2:  # behind the first checkpoint
                raise KeyboardInterrupt

        return loop.run_job(*given, **{**named, "progress": progress})

    with monkeypatch.context() as patch:
        patch.setattr(unlearn_job, "run_job", stops)
        assert run(*command(tmp_path, "privacy", scored, out), *steps)[0] == 130
    original = job.unlearn
    monkeypatch.setattr(
        job, "unlearn", lambda *given, **named: resumed.append(named["resume"]) or original(*given, **named)
    )
    assert run(*command(tmp_path, "privacy", scored, out), *steps)[0] == 0
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, out)]
    assert resumed == [True] and all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_checkpoints_of_another_recipe_are_in_no_ones_way(run, tmp_path, scored, monkeypatch):
    arguments = [*command(tmp_path, "privacy", scored, tmp_path / "out"), "--override", "unlearn.save_steps=1"]
    assert run(*arguments)[0] == 0 and (tmp_path / "out" / "adapter" / "checkpoint-1").exists()
    with monkeypatch.context() as patch:
        patch.setattr(unlearn_job, "measure", lambda *given, **named: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*arguments, "--seed", "1")[0] == 130
    code, _, errors = run(*arguments, "--seed", "1")
    assert code == 0, errors


def test_every_field_can_be_overridden():
    chosen = overridden(
        read_recipe("harmful"), {"unlearn.preset": "npo", "data.forget.format": None, "evaluate.harm.threshold": 0.9}
    )
    assert chosen["unlearn"]["preset"] == "npo" and chosen["data"]["forget"]["format"] is None
    assert chosen["evaluate"]["harm"]["threshold"] == 0.9 and read_recipe("harmful")["unlearn"]["preset"] == "yao2023"
    for name in RECIPES:
        for part in ("data", "unlearn", "evaluate", "sources", "title"):
            assert read_recipe(name)[part], (name, part)
        assert any("arXiv" in line for line in read_recipe(name)["sources"])
        for side, rows in read_recipe(name)["data"].items():
            assert side == "asked" or set(rows) == {"place", "format"}
        # what a recipe sets is what a user may set
        own = {f"unlearn.{field}": value for field, value in read_recipe(name)["unlearn"].items()}
        assert overridden(read_recipe(name), own) == read_recipe(name)


def test_bad_input_is_one_line_and_code_2(run, tmp_path, scored):
    out = tmp_path / "out"
    good = command(tmp_path, "harmful", scored, out)
    nothing = write_rows(tmp_path / "n.jsonl", [{**row, "response_0": "the key"} for row in SAFE])
    bad = [
        (["recipe", "harmfull", "--out", str(out)], r"unknown recipe 'harmfull' \(did you mean 'harmful'\?\)"),
        (["recipe", "harmful", "--out", str(out)], "--model is missing"),
        (["recipe", "copyright", "--model", "MODEL", "--out", str(out)], "copyright needs --forget"),
        (["recipe", "harmful", "--offline", "--out", str(out)], "--offline makes the data of tofu"),
        (
            [*good, "--override", "unlearn.max_stepz=3"],
            "no field 'unlearn.max_stepz': did you mean 'unlearn.max_steps'",
        ),
        ([*good, "--override", "unlearn.max_steps=-3"], "max-steps must be positive"),
        ([*good, "--override", "unlearn.resume=1"], "no field 'unlearn.resume'"),
        ([*good, "--forget", str(write_rows(tmp_path / "b.jsonl", [*SAFE, {"prompt": "x"}]))], r"b\.jsonl:5 is not as"),
        ([*good, "--forget", str(nothing)], "nothing is chosen"),
        ([*good, "--evaluator", "rules:none"], "cannot be imported"),
    ]
    for arguments, words in bad:
        code, _, errors = run(*arguments)
        assert code == 2 and len(errors) == 1 and re.search(words, errors[0]), (arguments, errors)
        assert not (out / "report.json").exists()
    assert run(*good)[0] == 0, "nothing that is left behind is in the way"
