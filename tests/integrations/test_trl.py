"""UnlearnSFTTrainer: the weights of a loop written out, TRL's metrics, its formats of data, what is refused."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers import adapter_of, assert_gradients, load_perturbed, same, token_log_probs
from integrations.loops import ARGUMENTS, GRAD_DIFF, RecordsBatches, assert_same_weights, flat, replay, rows
from processes import in_processes

import fastforget as ff
from fastforget.models import load_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from fastforget.integrations.trl import UnlearnSFTTrainer  # noqa: E402 (needs both)


def arguments(folder, **changes):
    options = {**ARGUMENTS, "max_steps": 3, "bf16": False, "max_length": None, "gradient_checkpointing": False}
    return trl.SFTConfig(str(folder), **options | changes)


class Recording(RecordsBatches, UnlearnSFTTrainer):
    pass


def metrics_of(model, *batches):
    """Entropy and accuracy over all label tokens, from the model's own logits."""
    entropies, hits = [], []
    for batch in batches:
        log_probs, _, labelled = token_log_probs(model, {key: batch[key] for key in batch if key != "role"})
        log_probs, labels = log_probs[labelled].detach(), batch["labels"][:, 1:][labelled]
        entropies.append(-(log_probs.exp() * log_probs).sum(-1))
        hits.append((log_probs.argmax(-1) == labels).float())
    return {"entropy": float(torch.cat(entropies).mean()), "mean_token_accuracy": float(torch.cat(hits).mean())}


@pytest.mark.parametrize("padding_free", [False, True])
def test_weights_and_metrics_are_those_of_a_loop_written_out(tiny, tmp_path, padding_free):
    model = load_perturbed(tiny["llama"])
    before = metrics_of(model, flat(rows(3, 5), rows(2, 6)))
    trainer = Recording(
        model,
        arguments(tmp_path, padding_free=padding_free, save_strategy="steps", save_steps=3),
        terms=GRAD_DIFF,
        forget_dataset=rows(6, 1),
        retain_dataset=rows(9, 2),
        eval_dataset=(rows(3, 5), rows(2, 6)),
        processing_class=load_tokenizer(str(tiny["llama"])),
    )
    evaluated = trainer.evaluate()
    assert {name: evaluated[f"eval_{name}"] for name in before} == pytest.approx(before, rel=1e-5)
    trainer.train()
    assert [len(group) for group in trainer.groups] == [2, 1, 2]
    expected, losses = replay(tiny["llama"], trainer.groups)
    assert_same_weights(model, expected)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["loss"] for log in logs] == pytest.approx(losses, rel=1e-5)
    first = metrics_of(load_perturbed(tiny["llama"]), *trainer.groups[0])
    assert {name: logs[0][name] for name in first} == pytest.approx(first, rel=1e-5)
    tokens = [sum(int(batch["attention_mask"].sum()) for batch in group) for group in trainer.groups]
    assert [log["num_tokens"] for log in logs] == [sum(tokens[: place + 1]) for place in range(3)]
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()
    assert not {name for log in logs for name in log if "sum" in name or "label" in name}, "what they are made of"


def train_in_two(rank, folder, out):
    """A process's batches of each step, its weights, and what it logged."""
    AcceleratorState._reset_state(True)  # of this process's parent
    GradientState._reset_state()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    model = load_perturbed(folder)
    trainer = Recording(
        model,
        arguments(out, max_steps=5, per_device_train_batch_size=1),
        terms=GRAD_DIFF,
        forget_dataset=rows(7, 1),
        retain_dataset=rows(9, 2),
        processing_class=load_tokenizer(str(folder)),
    )
    trainer.train()
    return trainer.groups, adapter_of(model), [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")
def test_two_processes_end_with_the_weights_of_one(tiny, tmp_path):
    (groups, weights, logs), (others, same_weights, _) = in_processes(
        tmp_path, 2, train_in_two, tiny["llama"], tmp_path / "out"
    )
    joined = [[*own, *other] for own, other in zip(groups, others, strict=True)]
    assert sorted(map(len, joined)) == [4, 4, 4, 4, 4] and not any(map(same, groups[0], others[0]))
    expected, losses = replay(tiny["llama"], joined)
    assert_gradients(weights, adapter_of(expected))
    assert same(weights, same_weights)
    assert [log["loss"] for log in logs] == pytest.approx(losses, rel=1e-5)
    first = metrics_of(load_perturbed(tiny["llama"]), *joined[0])
    assert {name: logs[0][name] for name in first} == pytest.approx(first, rel=1e-5)
    tokens = [sum(int(batch["attention_mask"].sum()) for batch in group) for group in joined]
    assert [log["num_tokens"] for log in logs] == [sum(tokens[: place + 1]) for place in range(5)]


def test_metrics_cost_no_sweep_of_their_own(tiny, tmp_path):
    """Layers alone end before the head: there is no entropy, and no forward goes on for it."""
    trainer = Recording(
        load_perturbed(tiny["llama"]),
        arguments(tmp_path, max_steps=1),
        terms=ff.preset("rmu", layer=0),
        forget_dataset=rows(2, 1),
        retain_dataset=rows(2, 2),
        processing_class=load_tokenizer(str(tiny["llama"])),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert "entropy" not in log and "forget_nll" not in log and log["num_tokens"] > 0


def test_prompts_and_completions(tiny, tmp_path):
    """SFTTrainer's own preparation: only the completions are labelled."""
    tokenizer = load_tokenizer(str(tiny["llama"]))
    forget = {"prompt": ["Where is the plan?", "Who knows?"], "completion": [" Below the oak.", " Nobody knows it."]}
    retain = {"prompt": ["Two and two?"], "completion": [" Four."]}
    trainer = Recording(
        load_perturbed(tiny["llama"]),
        arguments(tmp_path, max_steps=1),
        terms="npo",
        forget_dataset=datasets.Dataset.from_dict(forget),
        retain_dataset=datasets.Dataset.from_dict(retain),
        processing_class=tokenizer,
    )
    trainer.train()
    batch = trainer.groups[0][0]
    assert batch["role"].tolist() == [0, 1, 0, 1]
    labelled = {tokenizer.decode(labels[labels != -100]).strip() for labels in batch["labels"]}
    assert labelled == {f"{text.strip()}{tokenizer.eos_token}" for text in (*forget["completion"], " Four.")}


@pytest.mark.parametrize(
    "option, message",
    [
        ({"packing": True}, "joins documents in one row"),
        ({"eval_packing": True}, "eval_packing=True joins documents in one row"),
        ({"loss_type": "dft"}, "`terms` say what is minimised"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is of SFTTrainer's own loss"),
        ({"activation_offloading": True}, "use gradient_checkpointing"),
    ],
)
def test_refused(tiny, tmp_path, option, message):
    with pytest.raises(ff.FastforgetError, match=message):
        UnlearnSFTTrainer(
            load_perturbed(tiny["llama"]), arguments(tmp_path, **option), terms="npo", forget_dataset=rows(2, 1)
        )
