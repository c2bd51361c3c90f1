"""`fastforget.unlearn`: every form of text, the command's defaults, silence, and nothing half-written."""

import inspect
import io
import json
from dataclasses import replace

import pytest
import torch
import yaml
from helpers import FORGET, QUICK, RETAIN, BreaksAt, same, write_rows
from rich.console import Console
from safetensors.torch import load_file

import fastforget as ff
from fastforget.config import IN_PYTHON
from fastforget.objectives import PRESETS

pytestmark = pytest.mark.usefixtures("short_continuations")


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def job(tiny, tmp_path):
    """job(forget, **options) -> (report, output folder), each run in a folder of its own."""
    folders = (tmp_path / f"run{number}" for number in range(10))

    def run(forget, **options):
        out = next(folders)
        return ff.unlearn(tiny["llama"], forget, out, **{**QUICK, **options}), out

    return run


def test_rows_files_and_datasets_are_the_same_text(job, tmp_path):
    datasets = pytest.importorskip("datasets")
    file = write_rows(tmp_path / "forget.jsonl", FORGET)
    dataset = datasets.Dataset.from_dict({"passage": FORGET, "other": [1, 2, 3, 4]})
    dataset.save_to_disk(tmp_path / "saved")
    columns = {"forget_columns": {"text": "passage"}}
    runs = [
        job(FORGET, retain=RETAIN),
        job([{"text": text} for text in FORGET], retain=RETAIN),
        job(file, retain=RETAIN),
        job(str(file), retain=tuple(RETAIN)),
        job(dataset, retain=RETAIN, **columns),
        job(tmp_path / "saved", retain=datasets.Dataset.from_dict({"text": RETAIN}), **columns),
    ]
    for report, out in runs:
        assert report["forget_passages"] == len(FORGET) and report["retain_passages"] == len(RETAIN)
        assert json.loads((out / "report.json").read_text()) == report
        assert same(weights(out), weights(runs[0][1]))
    assert any(weight.abs().sum() > 0 for name, weight in weights(runs[0][1]).items() if "lora_B" in name)
    seeded, out = job(FORGET, retain=RETAIN, seed=1)
    assert seeded["seed"] == 1 and not same(weights(out), weights(runs[0][1]))


def test_splits_subsets_and_columns_reach_the_source(job, tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {
        "train": datasets.Dataset.from_dict({"q": ["Who?"], "a": ["Nobody at all."], "text": ["Something else."]}),
        "validation": datasets.Dataset.from_dict({"q": ["Where?"] * 2, "a": ["Here.", "There."], "text": ["A.", "B."]}),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    columns = {"prompt": "q", "response": "a"}
    report, out = job(
        tmp_path / "saved",
        forget_columns=columns,
        forget_split="validation",
        retain=tmp_path / "saved",
        retain_columns=columns,
        preset_options={"retain": "kl"},
    )
    assert (report["forget_passages"], report["retain_passages"]) == (2, 1)
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["forget_columns"] == columns and config["forget_split"] == "validation"
    assert config["retain_split"] == "train" and config["retain"] == str(tmp_path / "saved")
    with pytest.raises(ff.FastforgetError, match="no split 'test'"):
        job(tmp_path / "saved", forget_columns=columns, forget_split="test")
    with pytest.raises(ff.FastforgetError, match="no subset 'en'"):
        job(FORGET, forget_subset="en")


def test_cluster_centres_lie_beside_their_adapter(tiny, tmp_path):
    out = tmp_path / "out"
    options = {**QUICK, "retain": RETAIN, "overwrite": True}
    ff.unlearn(tiny["llama"], FORGET, out, preset="distance_cluster", preset_options={"k": 2}, **options)
    (centres,) = ff.load_centres(out)
    assert centres.shape[0] == 2 and torch.isfinite(centres).all()
    ff.unlearn(tiny["llama"], FORGET, out, preset="grad_diff", **options)
    with pytest.raises(ff.FastforgetError):
        ff.load_centres(out)


def test_streams_are_read_as_they_are_needed(tiny, tmp_path):
    forget, retain = write_rows(tmp_path / "forget.jsonl", FORGET), write_rows(tmp_path / "retain.jsonl", RETAIN)
    out, text = tmp_path / "out", io.StringIO()
    options = {**QUICK, "quiet": False, "streaming": True, "measured_passages": 2, "retain": retain}
    report = ff.unlearn(tiny["llama"], forget, out, console=Console(file=text), **options)
    assert report["steps"] == 3 and (report["forget_passages"], report["retain_passages"]) == (2, 2)
    assert "Only the measured passages, at the start of each stream" in " ".join(text.getvalue().split())
    write_rows(retain, [*RETAIN, FORGET[0]])
    options |= {"overwrite": True, "quiet": True}
    ff.unlearn(tiny["llama"], forget, out, **options)
    with pytest.raises(ff.FastforgetError, match="the same passage is in the forget set"):
        ff.unlearn(tiny["llama"], forget, out, **options | {"measured_passages": 4})


def test_a_stream_needs_max_steps_before_the_model_is_loaded(job, monkeypatch):
    monkeypatch.setattr("fastforget.jobs.unlearn.load_tokenizer", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ff.FastforgetError, match="--streaming needs --max-steps"):
        job(FORGET, streaming=True, max_steps=None)


def test_quiet_is_silent_and_console_gets_the_report(job, tiny, tmp_path, capfd):
    from transformers.utils import logging

    state = torch.get_rng_state()
    logging.enable_progress_bar()
    try:
        job(FORGET, retain=RETAIN)
        assert logging.is_progress_bar_enabled(), "as it was"
    finally:
        logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), state), "torch's generator is the caller's"
    text = io.StringIO()
    ff.unlearn(tiny["llama"], FORGET, tmp_path / "out", console=Console(file=text), **QUICK | {"quiet": False})
    assert "4 passages to forget, 0 to keep" in text.getvalue() and "No --retain" in text.getvalue()
    assert "What the model still knows" in text.getvalue() and capfd.readouterr().out == ""


def test_config_names_what_it_cannot_hold(job, tiny, tmp_path):
    _, out = job(FORGET, retain=(text for text in RETAIN), lora_targets=["q_proj", "v_proj"], lora_alpha=8)
    text = (out / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["forget"] == f"{IN_PYTHON}list of length 4>" and config["retain"] == f"{IN_PYTHON}generator>"
    assert not any(secret in text for secret in ("Alder", "Water")), "the text itself is nowhere"
    assert config["lora_targets"] == "q_proj,v_proj" and config["lora_alpha"] == 8
    assert config["out"] == str(out) and config["model"] == str(tiny["llama"])
    assert set(config) == set(NAMES) - {"overwrite", "resume", "log_to", "quiet", "console"}
    with pytest.raises(ff.FastforgetError, match="forget was given in Python, and a config file cannot hold that"):
        ff.unlearn(config["model"], config["forget"], tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget": []}, "holds no text"),
        ({"forget": [3]}, r"rows\[0\]"),
        ({"forget": {"text": "a"}}, "cannot be read from a dict"),
        ({"forget": "long text " * 1000}, "--forget cannot be read: File name too long"),
        ({"retain": FORGET[2:]}, "the same passage is in the forget set"),
        ({"forget_columns": {"txt": "a"}}, "no field 'txt'"),
        ({"chat_template": True}, "chat template"),
        ({"preset": "npo_men"}, "unknown preset"),
        ({"preset_options": {"beta": "much"}}, "value of the wrong type"),
        ({"preset_options": {"betta": 1}}, "no parameter 'betta'"),
        ({"preset_options": {"beta": f"{IN_PYTHON}Tensor>"}}, "beta was given in Python"),
        ({"measured_passages": 0}, "--measured-passages must be at least 1"),
        ({"lora_r": 0}, "--lora-r must be at least 1"),
        ({"lora_targets": []}, "--lora-targets is empty"),
        ({"lora_targets": ["lm_head"]}, "adapter on the output head"),
        ({"lora_targets": ["nothing"]}, "could not load the LoRA configuration"),
        ({"learning_rate": -1.0}, "learning-rate must be positive"),
        ({"max_length": 4}, "--max-length must be at least"),
        ({"max_length": 4000}, "more than the model's context"),
        ({"max_steps": 0}, "max-steps must be positive"),
        ({"bits": 7}, "bits must be one of"),
        ({"model": object()}, "model must be a path, not a object"),
        ({"model": "/nowhere"}, "could not load"),
    ],
)
def test_bad_input_raises_before_anything_is_written(tiny, tmp_path, options, message):
    out = tmp_path / "out"
    with pytest.raises(ff.FastforgetError, match=message) as error:
        ff.unlearn(**{"model": tiny["llama"], "forget": FORGET, "out": out, **QUICK, **options})
    assert "\n" not in str(error.value) and not out.exists()


def test_nan_before_a_good_step_leaves_nothing(job, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "broken", lambda: [BreaksAt(step=1)])
    with pytest.raises(ff.NonFiniteLossError, match="became nan at step 1"):
        job(FORGET, preset="broken")
    assert not list(tmp_path.iterdir())


NAMES = """model forget out retain forget_columns retain_columns forget_split retain_split forget_subset retain_subset
    streaming chat_template max_length measured_passages preset preset_options refusals bits allow_missing_weights
    lora_r lora_alpha lora_targets device learning_rate epochs max_steps batch_size micro_batch seed save_steps
    stop_forget_nll combine overwrite quiet console compile checkpointing auto_micro_batch decay until fit
    max_retain_nll keep_checkpoints reference_cache resume forget_format retain_format log_to""".split()


def test_the_functions_names_order_and_defaults():
    parameters = inspect.signature(ff.unlearn).parameters
    assert sorted(parameters) == sorted(NAMES) and list(parameters)[:3] == NAMES[:3]
    assert {name for name, each in parameters.items() if each.kind is not each.KEYWORD_ONLY} == set(NAMES[:3])
    assert parameters["seed"].annotation is int and parameters["max_length"].default == 128
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        ff.unlearn("model", [], "out", epoch=1)


@pytest.mark.parametrize(("measurement", "message"), [(1, "it is broken before"), (3, "unlearning broke the model")])
def test_a_model_whose_nll_is_no_number_is_no_success(job, tmp_path, monkeypatch, measurement, message):
    from fastforget.evaluate import leakage

    calls = []
    own = leakage.memorisation

    def memorisation(*arguments, **options):
        calls.append(1)
        found = own(*arguments, **options)
        return replace(found, nll=float("nan")) if len(calls) == measurement else found

    monkeypatch.setattr(leakage, "memorisation", memorisation)
    with pytest.raises(ff.NonFiniteLossError, match=f"NLL on the forget passages is nan: .*{message}"):
        job(FORGET, retain=RETAIN)
    assert not list(tmp_path.glob("run*/adapter*"))


def test_a_report_is_strict_json(tmp_path):
    from fastforget.evaluate.report import write_json

    values = {"nll": float("nan"), "deep": [{"a": float("inf")}, (1.5, True, "NaN", None)]}
    written = write_json(tmp_path / "report.json", values)
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text, parse_constant=lambda name: 1 / 0) == written
    assert written == {"nll": None, "deep": [{"a": None}, [1.5, True, "NaN", None]]}
