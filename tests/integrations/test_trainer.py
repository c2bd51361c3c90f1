"""UnlearnTrainer: the weights of a loop written out, accumulation, resume, evaluation, what is logged."""

import copy

import pytest
import torch
from helpers import adapter_of, load_perturbed, tiny_model
from integrations.loops import ARGUMENTS, GRAD_DIFF, RecordsBatches, assert_same_weights, flat, grad_diff, replay, rows
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import fastforget as ff
from fastforget.integrations.rows import PairedRows, row_collator


class Recording(RecordsBatches, ff.UnlearnTrainer):
    pass


def arguments(folder, **changes):
    options = {**ARGUMENTS, "max_steps": 5, "per_device_eval_batch_size": 3}
    return TrainingArguments(str(folder), **options | changes)


def test_weights_after_five_steps_are_those_of_a_loop_written_out(tiny, tmp_path):
    model = load_perturbed(tiny["llama"])
    sets = {"forget_dataset": rows(6, 1), "retain_dataset": rows(9, 2)}
    trainer = Recording(model, arguments(tmp_path), terms=GRAD_DIFF, **sets)
    trainer.train()
    assert [len(group) for group in trainer.groups] == [2, 1, 2, 1, 2], "an epoch ends with a shorter step"
    expected, losses = replay(tiny["llama"], trainer.groups)
    assert_same_weights(model, expected)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["loss"] for log in logs] == pytest.approx(losses, rel=1e-5)
    for log in logs:
        assert log["loss"] == pytest.approx(0.3 * log["negated_ce"] + log["ce"], rel=1e-5)
        assert log["forget_nll"] == pytest.approx(-log["negated_ce"]) and log["retain_nll"] == pytest.approx(log["ce"])


def test_flat_rows_of_which_a_batch_may_lack_a_side(tiny, tmp_path):
    model = load_perturbed(tiny["llama"])
    given = [{**row, "role": place // 2 % 2, "example_id": place} for place, row in enumerate(rows(8, 3))]
    options = {"train_sampling_strategy": "sequential"}
    trainer = Recording(model, arguments(tmp_path, **options), terms=GRAD_DIFF, train_dataset=given)
    trainer.train()
    assert {tuple(batch["role"].tolist()) for group in trainer.groups for batch in group} == {(0, 0), (1, 1)}
    groups = [[{k: v for k, v in batch.items() if k != "example_id"} for batch in group] for group in trainer.groups]
    assert_same_weights(model, replay(tiny["llama"], groups)[0])


def test_a_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path):
    sets = {"forget_dataset": rows(6, 1), "retain_dataset": rows(9, 2)}
    options = {"terms": ff.preset("pdu"), **sets}
    saving = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    whole = load_perturbed(tiny["llama"])
    trainer = Recording(whole, arguments(tmp_path / "whole", **saving), **options)
    trainer.train()
    duals = {k: float(v) for k, v in trainer.unlearn_step.param_groups[0].items() if k.startswith("unlearn_")}
    assert duals["unlearn_steps"] == 5 and len(duals) > 1 and all(duals.values())
    resumed = load_perturbed(tiny["llama"], seed=7)
    again = Recording(resumed, arguments(tmp_path / "again", **saving), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(again.groups) == 2
    for name, value in adapter_of(whole).items():
        assert torch.equal(adapter_of(resumed)[name], value), name
    assert duals == {k: float(v) for k, v in again.unlearn_step.param_groups[0].items() if k.startswith("unlearn_")}


def test_what_the_model_said_before_training_is_compared_with(tiny, tmp_path):
    """Also where a run goes on from a checkpoint, whose weights are loaded later."""
    sets = {"forget_dataset": rows(4, 1), "retain_dataset": rows(4, 2)}
    saving = {"save_strategy": "steps", "save_steps": 3}
    weights = []
    for name, reference in (("copy", None), ("cache", "cache"), ("again", "cache")):
        torch.manual_seed(0)
        model = tiny_model("llama")
        given = reference or copy.deepcopy(model).requires_grad_(False)
        options = {"terms": [ff.NPO(beta=0.5), ff.HiddenMSE()], "step_options": {"reference": given}, **sets}
        trainer = Recording(model, arguments(tmp_path / name, optim="sgd", learning_rate=1e-2, **saving), **options)
        if reference:
            step = trainer.create_optimizer()
            collate = row_collator()
            every = [{side.removesuffix("_dataset"): row} for side, given in sets.items() for row in given]
            assert step.cache_reference([collate(every)]) == 8
        trainer.train(resume_from_checkpoint=str(tmp_path / "cache" / "checkpoint-3") if name == "again" else None)
        assert reference is None or trainer.unlearn_step is step
        weights.append(model)
    assert_same_weights(weights[1], weights[0])
    assert_same_weights(weights[2], weights[1])


def test_evaluation_has_the_means_of_the_whole_set_and_what_is_measured(tiny, tmp_path):
    model = load_perturbed(tiny["llama"])
    forget, retain = rows(4, 5), rows(5, 6)

    def measure(measured):
        assert not measured.training and not torch.is_grad_enabled(), "dropout would be in the figures"
        return {"trainable": float(sum(p.requires_grad for p in measured.parameters()))}

    trainer = ff.UnlearnTrainer(
        model,
        arguments(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1),
        terms=GRAD_DIFF,
        forget_dataset=rows(2, 1),
        retain_dataset=rows(2, 2),
        eval_dataset=(forget, retain),
        measure=measure,
    )
    modes = [module.training for module in model.modules()]
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(float(grad_diff(model, [flat(forget, retain)]).detach()), rel=1e-5)
    assert before["eval_loss"] == pytest.approx(0.3 * before["eval_negated_ce"] + before["eval_ce"], rel=1e-5)
    assert before["eval_trainable"] == len(adapter_of(model)) and before["eval_retain_nll"] > 0
    assert [module.training for module in model.modules()] == modes
    trainer.train()
    logged = next(log for log in trainer.state.log_history if "eval_loss" in log and log["step"] == 1)
    assert logged["eval_loss"] == pytest.approx(float(grad_diff(model, [flat(forget, retain)]).detach()), rel=1e-5)
    assert logged["eval_loss"] < before["eval_loss"]
    loss, _ = trainer.compute_loss(model, flat(forget, retain), return_outputs=True)
    assert float(loss.detach()) == pytest.approx(logged["eval_loss"], rel=1e-5)


def test_batches_with_both_sides_by_name(tiny, tmp_path, monkeypatch):
    """And without arguments of Trainer's, whose defaults would take the sides for unused columns."""
    monkeypatch.chdir(tmp_path)

    def collate(items):
        sides = {side: flat([item[side] for item in items], []) for side in ("forget", "retain")}
        return {side: {key: batch[key] for key in batch.keys() - {"role"}} for side, batch in sides.items()}

    model = load_perturbed(tiny["llama"])
    pairs = PairedRows(rows(9, 5), rows(9, 6))
    trainer = ff.UnlearnTrainer(model, terms=GRAD_DIFF, train_dataset=pairs, eval_dataset=pairs, data_collator=collate)
    assert next(iter(trainer.get_train_dataloader())).keys() == {"forget", "retain"}
    expected = float(grad_diff(model, [flat(pairs.forget, pairs.retain)]).detach())
    measured = trainer.evaluate()
    assert measured["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_every_retain_row_is_dealt_as_often_as_any_other():
    pairs = PairedRows(list("abcd"), list(range(6)), seed=3)
    dealt = []
    for epoch in range(3):
        pairs.set_epoch(epoch)
        dealt += [pairs[index]["retain"] for index in reversed(range(4))]
        assert [pairs[index]["forget"] for index in range(4)] == list("abcd")
    assert sorted(dealt) == sorted([*range(6)] * 2)
    assert pairs[0] == pairs[0] and PairedRows(["a"])[0] == {"forget": "a"}
    with pytest.raises(ff.FastforgetError, match="the retain set has no rows"):
        PairedRows(["a"], [])


def test_workers_that_stay_are_told_the_epoch():
    pairs = PairedRows(list("abcd"), list(range(6)), seed=3)
    loader = DataLoader(pairs, batch_size=None, num_workers=1, persistent_workers=True)
    dealt = []
    for epoch in range(3):
        pairs.set_epoch(epoch)
        dealt += [pair["retain"] for pair in loader]
    assert sorted(dealt) == sorted([*range(6)] * 2)


def test_the_collator():
    collate = row_collator(pad_token_id=9)
    long, short = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 5], "labels": [-100, 5]}
    batch = collate([{"forget": {**long, "refusal": short}, "retain": short}, {"forget": short | {"refusal": long}}])
    assert batch["role"].tolist() == [0, 2, 1, 0, 2]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 5, 9], [8, 5, 9], [8, 5, 9], [5, 6, 7]]
    assert batch["attention_mask"][1].tolist() == [1, 1, 0] and batch["labels"][1].tolist() == [-100, 5, -100]
    with pytest.raises(ff.FastforgetError, match="each needs input_ids and labels"):
        collate([{"forget": {"input_ids": [1, 2]}}])
    with pytest.raises(ff.FastforgetError, match="all must give"):
        collate([{"forget": long}, {"forget": {**long, "position_ids": [0, 1, 2]}}])


def test_evaluation_before_training_makes_its_loss_once(tiny, tmp_path):
    """What the reference said the first time is not computed again."""
    sets = {"forget_dataset": rows(2, 1), "retain_dataset": rows(2, 2), "eval_dataset": (rows(3, 5), rows(2, 6))}
    trainer = ff.UnlearnTrainer(load_perturbed(tiny["llama"]), arguments(tmp_path), terms="npo", **sets)
    first = trainer.evaluate()
    forwards = trainer._loss_of(trainer.model).reference.forwards
    again = trainer.evaluate()
    assert again["eval_loss"] == first["eval_loss"]
    assert trainer._loss_of(trainer.model).reference.forwards == forwards > 0
