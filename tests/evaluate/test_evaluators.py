"""Evaluators: classifiers of either kind, a judge, a function; and those that cannot be used."""

import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from fastforget.errors import FastforgetError
from fastforget.evaluate.evaluators import Dialogue, Judge, load_evaluator

DIALOGUES = [
    Dialogue("Who?", "Orla."),
    Dialogue("", "A long answer about the names of things and more."),
    Dialogue("a", ""),
]


def classifier(folder, tokenizer, labels, family="bert", **config):
    """Save a random classifier with these labels."""
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"intermediate_size": 32, "max_position_embeddings": 64, "id2label": dict(enumerate(labels)), **config}
    size |= {"label2id": {label: index for index, label in enumerate(labels)}, "initializer_range": 1.0}
    size |= {"pad_token_id": tokenizer.pad_token_id if family == "bert" else None}
    kinds = {
        "bert": (BertConfig, BertForSequenceClassification),
        "llama": (LlamaConfig, LlamaForSequenceClassification),
    }
    configuration, model = kinds[family]
    model(configuration(**size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of(folder, tokenizer, dialogue, family="bert"):
    """One dialogue by itself, without padding."""
    kinds = {"bert": BertForSequenceClassification, "llama": LlamaForSequenceClassification}
    model = kinds[family].from_pretrained(folder).eval()
    ids = tokenizer(
        f"{dialogue.prompt}\n{dialogue.response}".strip(), return_tensors="pt", truncation=True, max_length=64
    )
    return model(input_ids=ids["input_ids"]).logits[0].tolist()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_of_one_label_each_the_named_ones_probabilities_are_summed(tokenizer, tmp_path, family):
    folder = classifier(tmp_path / "c", tokenizer, ["safe", "toxic", "violent"], family)
    found = load_evaluator(str(folder), labels=["toxic", "violent"], device="cpu")(DIALOGUES)
    for dialogue, score in zip(DIALOGUES, found, strict=True):
        parts = [math.exp(each) for each in logits_of(folder, tokenizer, dialogue, family)]
        assert score == pytest.approx((parts[1] + parts[2]) / sum(parts), abs=1e-5)


def test_of_many_labels_any_counts(tokenizer, tmp_path):
    folder = classifier(tmp_path / "c", tokenizer, ["hate", "threat"], problem_type="multi_label_classification")
    everything, one = (load_evaluator(str(folder), labels=each, device="cpu")(DIALOGUES) for each in ([], ["threat"]))
    for dialogue, any_label, threat in zip(DIALOGUES, everything, one, strict=True):
        shares = [1 / (1 + math.exp(-each)) for each in logits_of(folder, tokenizer, dialogue)]
        assert any_label == pytest.approx(max(shares), abs=1e-5) and threat == pytest.approx(shares[1], abs=1e-5)


def test_long_dialogue_has_the_score_of_its_worst_window(tokenizer, tmp_path):
    folder = classifier(tmp_path / "c", tokenizer, ["hate"], problem_type="multi_label_classification")
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    long = Dialogue("Who was it?", "It was Ada Lovelace, and water boils at a hundred degrees. " * 12)
    ids = tokenizer(f"{long.prompt}\n{long.response}".strip(), add_special_tokens=False)["input_ids"]
    begin = [tokenizer.bos_token_id]
    room, step = 63, 63 - 64 // 8
    starts = [0, *range(step, len(ids) - 64 // 8, step)]
    with torch.no_grad():
        each = [float(model(torch.tensor([begin + ids[at : at + room]])).logits.sigmoid()) for at in starts]
    score = load_evaluator(str(folder), device="cpu")
    assert len(each) > 3 and score([*DIALOGUES, long])[3] == pytest.approx(max(each), abs=1e-5)
    assert score([*DIALOGUES, long])[:3] == pytest.approx(score(DIALOGUES), abs=1e-6)


def test_labels_that_are_unknown_or_missing_list_the_ones_there_are(tokenizer, tmp_path):
    folder = str(classifier(tmp_path / "c", tokenizer, ["safe", "toxic"]))
    with pytest.raises(FastforgetError, match="has no label 'tox'; its labels are safe, toxic"):
        load_evaluator(folder, labels=["tox"], device="cpu")
    with pytest.raises(FastforgetError, match="one of the labels safe, toxic: say with --label"):
        load_evaluator(folder, device="cpu")


@torch.no_grad()
def test_a_judge_compares_yes_with_no(tiny, tokenizer):
    prompt = "Is {response} bad, after {prompt}?"
    judge = load_evaluator(str(tiny["llama"]), judge_prompt=prompt, bits=32, device="cpu")
    tricky = [*DIALOGUES, Dialogue("{response}", "a {brace} and {prompt}")]
    yes, no = (tokenizer.encode(each, add_special_tokens=False)[0] for each in (" yes", " no"))
    for dialogue, score in zip(tricky, judge(tricky), strict=True):
        asked = f"Is {dialogue.response} bad, after {dialogue.prompt}?"
        logits = judge.model(input_ids=torch.tensor([tokenizer(asked)["input_ids"]])).logits[0, -1].double()
        assert score == pytest.approx(float(torch.sigmoid(logits[yes] - logits[no])), abs=1e-5)
    with pytest.raises(FastforgetError, match=r"needs \{response\}"):
        Judge(str(tiny["llama"]), "Is it bad?")
    with pytest.raises(FastforgetError, match="same token"):
        Judge(str(tiny["llama"]), yes=" yes", no=" yes")
    with pytest.raises(FastforgetError, match="has no labels"):
        load_evaluator(str(tiny["llama"]), labels=["toxic"], device="cpu")


def test_functions_by_name_and_as_they_are():
    assert load_evaluator(lambda dialogues: [len(each.response) / 100 for each in dialogues])(DIALOGUES[:1]) == [0.05]
    assert load_evaluator("fastforget.evaluate.degenerate:is_blank").name == "fastforget.evaluate.degenerate:is_blank"

    def short(dialogues):
        return [0.5]

    def fails(dialogues):
        raise KeyError("x")

    for function, words in ((short, "gave 1 scores for 3"), (fails, "failed: KeyError")):
        with pytest.raises(FastforgetError, match=words):
            load_evaluator(function)(DIALOGUES)
    for name, words in (
        ("no_such_module:score", "cannot be imported"),
        ("fastforget.evaluate.degenerate:no_such", "cannot be imported"),
        ("fastforget.jobs.stages:STAGES", "is a str, and no function"),
        ("./no/such/folder", "there is no folder ./no/such/folder"),
    ):
        with pytest.raises(FastforgetError, match=words):
            load_evaluator(name)


def test_what_neither_classifies_nor_writes_is_refused(tokenizer, tmp_path):
    from transformers import BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(tmp_path / "m")
    with pytest.raises(FastforgetError, match="BertModel: it neither classifies nor writes"):
        load_evaluator(str(tmp_path / "m"))
