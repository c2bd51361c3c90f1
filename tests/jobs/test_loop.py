"""The training loop: what stops it, what it keeps, what it saves."""

import re

import pytest
import torch
from helpers import BreaksAt, adapter_of
from transformers import AutoModelForCausalLM

import fastforget as ff
from fastforget.jobs.checkpoints import Checkpoints
from fastforget.jobs.loop import JobSettings, run_job


def test_nan_stops_the_job_with_the_last_good_adapter(tiny, tokenizer, passages):
    """The adapter is that of a job of two steps."""
    results = []
    for terms, steps in (([BreaksAt(step=4)], 9), ([ff.NegatedCE()], 2)):
        torch.manual_seed(3)
        model = ff.load(tiny["llama"], bits=32, lora={"r": 4})
        try:
            run_job(model, tokenizer, *passages, terms, JobSettings(max_steps=steps, learning_rate=1e-3))
        except ff.NonFiniteLossError as error:
            assert re.search(r"became nan at step 4; .* after 2 steps", str(error)) and error.good_steps == 2
            assert all(parameter.grad is None for parameter in model.parameters())
        results.append(adapter_of(model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert all(value.abs().sum() > 0 for name, value in results[0].items() if "lora_B" in name)


@pytest.mark.parametrize("factor", [torch.nan, 1e30])  # 1e30: finite, and too large to compute with
@pytest.mark.parametrize(("at", "total", "save_steps"), [(3, 3, None), (3, 3, 1), (2, 9, 2), (1, 1, None)])
def test_an_update_that_breaks_the_adapter_is_taken_back(
    tiny, tokenizer, passages, tmp_path, monkeypatch, factor, at, total, save_steps
):
    class Breaks(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            self.taken = getattr(self, "taken", 0) + 1
            for parameter in self.param_groups[0]["params"] if self.taken == at else ():
                parameter.data.mul_(factor)

    def job(model, steps, **more):
        settings = JobSettings(max_steps=steps, learning_rate=1e-3, **more)
        run_job(
            model, tokenizer, *passages, ff.preset("grad_diff"), settings, checkpoints=Checkpoints(tmp_path / "out")
        )

    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(ff.load(tiny["llama"], bits=32, lora={"r": 4}))
    with monkeypatch.context() as patch, pytest.raises(ff.NonFiniteLossError) as caught:
        patch.setattr(torch.optim, "AdamW", Breaks)
        job(models[0], total, save_steps=save_steps)
    assert re.search(f"became .* after the update of step {at}; .* after {at - 1} steps", str(caught.value))
    folders = sorted(path.name for path in (tmp_path / "out").glob("*"))
    assert folders == ["checkpoint-1", "checkpoint-2"] * (save_steps == 1)
    if at > 1:
        job(models[1], at - 1)
    same = adapter_of(models[1])
    assert all(torch.equal(value, same[name]) for name, value in adapter_of(models[0]).items())


def test_a_broken_adapter_is_not_saved(tiny, tmp_path):
    model = ff.load(tiny["llama"], bits=32, lora={"r": 4})
    next(p for name, p in model.named_parameters() if "lora_B" in name).data[0, 0] = torch.inf
    with pytest.raises(ff.FastforgetError, match=r"lora_B.* holds NaN or infinite values"):
        ff.save_adapter(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stops_at_the_forget_nll_and_counts_epochs(tiny, tokenizer, passages):
    model = ff.load(tiny["llama"], bits=32, lora={"r": 4})
    settings = JobSettings(max_steps=200, learning_rate=1e-2, stop_forget_nll=8.0)
    modes = [module.training for module in model.modules()]
    result = run_job(model, tokenizer, *passages, ff.preset("grad_ascent"), settings)
    assert result.forget_nll[-1] >= 8.0 > max(result.forget_nll[:-1]) and 0 < result.steps < 200
    assert "forget NLL" in result.stopped
    assert [module.training for module in model.modules()] == modes
    assert JobSettings(epochs=3, batch_size=4).steps(10) == 9
    assert JobSettings().steps(6) == 66 and JobSettings(until="gone").steps(6) == 198, "few passages take as many steps"
    assert JobSettings(until="gone").steps(80) == 660 and JobSettings(until="gone", epochs=3).steps(6) == 3


@pytest.mark.parametrize("save_steps", [1, None])
def test_stops_where_the_retain_nll_rises_above_its_bound(tiny, tokenizer, passages, tmp_path, save_steps):
    terms = [ff.NegatedCE(), ff.KL(on="retain", weight=1e-3)]
    known = run_job(ff.load(tiny["llama"], bits=32), tokenizer, *passages, terms, JobSettings(max_steps=1))
    bound = known.retain_nll[0] + 0.3
    settings = JobSettings(max_steps=300, learning_rate=2e-2, max_retain_nll=bound, save_steps=save_steps)
    model, folder = ff.load(tiny["llama"], bits=32, lora={"r": 4}), Checkpoints(tmp_path)
    result = run_job(model, tokenizer, *passages, terms, settings, checkpoints=folder)
    assert re.search(r"the retain NLL rose to .*, above .*; the adapter is as it was after", result.stopped)
    assert 0 < result.steps < 300 and max(result.retain_nll) <= bound
    if save_steps:
        last = folder.newest()
        assert last.folder.name == f"checkpoint-{result.steps}"
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all(torch.equal(value, weights[name]) for name, value in last.job["weights"].items())
    with pytest.raises(ff.FastforgetError, match="max_retain_nll: no term computes"):
        run_job(model, tokenizer, *passages, ff.preset("grad_ascent"), settings)


def test_tokens_of_both_sides_are_counted(tiny, tokenizer, passages):
    model, sides = ff.load(tiny["llama"], bits=32, lora={"r": 4}), [side[:3] for side in passages]
    settings = JobSettings(max_steps=2, batch_size=3)  # every batch is the whole of its side
    result = run_job(model, tokenizer, *sides, ff.preset("grad_diff"), settings)
    assert result.tokens == 2 * sum(len(example.input_ids) for side in sides for example in side)


def test_checkpoints_load_in_plain_peft(tiny, tokenizer, passages, tmp_path):
    import peft

    model = ff.load(tiny["opt"], bits=32, lora={"r": 4})
    settings = JobSettings(max_steps=4, save_steps=2)
    run_job(model, tokenizer, *passages, ff.preset("npo_mean"), settings, checkpoints=Checkpoints(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny["opt"]), tmp_path / "checkpoint-4")
    ids = torch.tensor([passages[0][0].input_ids])
    assert torch.allclose(plain.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-5)


def test_bad_settings_and_missing_retain(tiny, tokenizer, passages):
    for name in ("learning_rate", "epochs", "max_steps", "batch_size", "save_steps"):
        with pytest.raises(ff.FastforgetError, match=f"{name.replace('_', '-')} must be positive"):
            JobSettings(**{name: 0})
    model = ff.load(tiny["llama"], bits=32, lora={"r": 4})
    with pytest.raises(ff.FastforgetError, match="these terms keep a retain set"):
        run_job(model, tokenizer, passages[0], None, ff.preset("grad_diff"), JobSettings())
