"""The stopping rule: what is gone leaves the batches, what recovers comes back, the rate falls at the end."""

import io

import pytest
import torch
from helpers import CPU, random_model
from processes import in_processes
from rich.console import Console

import fastforget as ff
from fastforget.data.examples import Example, ExampleStream
from fastforget.data.text import text_examples
from fastforget.evaluate.memorisation import memorisation
from fastforget.jobs import until as until_module
from fastforget.jobs.loop import Pace, run_job
from fastforget.jobs.options import JobSettings, parsed_until
from fastforget.jobs.outputs import say_not_gone
from fastforget.jobs.state import JobResult
from fastforget.jobs.until import ForgetUntilGone, level_of

EXAMPLES = [Example(tuple(range(start, start + 12)), prompt_length=4) for start in (10, 40, 70, 100, 130)]


def tracker(tokenizer, batch_size=2):
    return ForgetUntilGone(EXAMPLES, tokenizer, 0.5, [ff.NegatedCE()], batch_size=batch_size, seed=0)


def greedy_rows(*shares):
    """What the watched term found: of each row's 8 labels so many are the likeliest token."""
    rows = [torch.arange(8) < round(8 * share) for share in shares]
    return [(torch.cat(rows), torch.arange(len(rows)).repeat_interleave(8), len(rows))]


def test_what_is_gone_leaves_and_what_is_known_stays(tokenizer):
    forget = tracker(tokenizer)
    for _ in range(3):
        next(forget)
        forget.watched.parts += greedy_rows(*(0.25 if place in (0, 3) else 0.75 for place in forget.batch))
        forget.note(CPU)
    assert forget.known == {1, 2, 4}
    seen = []
    for _ in range(2):
        assert next(forget)["input_ids"].shape[0] <= 2
        seen += forget.batch
    assert sorted(seen) == [1, 2, 4]


def test_parts_of_a_batch_are_rows_in_order(tokenizer):
    forget = tracker(tokenizer, batch_size=3)
    next(forget)
    first, second, third = forget.batch
    forget.watched.parts += greedy_rows(0.25, 0.75)  # of a pass in which memory ran out: smaller ones were taken
    forget.watched.parts += [*greedy_rows(0.75, 0.25), *greedy_rows(0.75)]
    forget.note(CPU)
    assert first in forget.known and third in forget.known and second not in forget.known


def test_what_recovers_comes_back(tokenizer, monkeypatch):
    forget, model = tracker(tokenizer), random_model("llama", tokenizer)
    forget.known = set()
    shares = {0: 0.9, 1: 0.1, 2: 0.5, 3: 0.0, 4: 0.6}

    def measured(model, tokenizer, examples, splits):
        places = [EXAMPLES.index(example) for example in examples]
        passages = [type("Passage", (), {"exact": shares[place]}) for place in places]
        return type("Report", (), {"passages": passages})

    monkeypatch.setattr(until_module, "memorisation", measured)
    assert not forget.finished(model, step=7) and forget.known == {0, 4}, "all were gone: looked at once"
    forget.known = {1}
    assert not forget.finished(model, step=7) and forget.known == {1}, "not due yet"
    assert not forget.finished(model, step=until_module.RECHECK_STEPS) and forget.known == {0, 1, 4}
    shares.update({0: 0.0, 4: 0.0})
    forget.known = set()
    assert forget.finished(model, step=8)
    assert forget.final(model) == "all 5 passages are gone (exact memorisation of each at most 0.50)"
    shares[3] = 1.0
    rule = "(exact memorisation of each at most 0.50)"
    assert forget.final(model) == f"1 of 5 is not gone yet {rule}: passage 4"
    shares[0] = 0.7
    assert forget.final(model) == f"2 of 5 are not gone yet {rule}: passages 1, 4"
    monkeypatch.setattr(until_module, "NAMED", 1)
    assert forget.final(model).endswith("passages 1 and 1 more")
    alone = ForgetUntilGone(EXAMPLES[1:2], tokenizer, 0.5, [ff.NegatedCE()], batch_size=2, seed=0)
    assert alone.final(model) == "the passage is gone (exact memorisation of each at most 0.50)"


def track(rank, tokenizer):
    """What a process knows after it saw its share of the batches, and then of all passages."""
    forget = tracker(tokenizer, batch_size=3)
    for _ in range(2):
        next(forget)
        forget.watched.parts += greedy_rows(*(0.25 if place in (0, 3) else 0.75 for place in forget.batch[rank::2]))
        forget.note(CPU)
    seen = set(forget.known)
    asked = []

    def measured(model, tokenizer, examples, splits):
        asked.extend(EXAMPLES.index(example) for example in examples)
        passages = [type("Passage", (), {"exact": 0.1 * EXAMPLES.index(example)}) for example in examples]
        return type("Report", (), {"passages": [*passages]})

    until_module.memorisation, forget.level = measured, 0.15
    forget.look_at(torch.nn.Linear(1, 1), range(5))
    forget.look_at(torch.nn.Linear(1, 1), [0])  # of which the second process has none
    return seen, forget.known, asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")
def test_processes_look_at_their_shares_and_know_the_same(tokenizer, tmp_path):
    first, second = in_processes(tmp_path, 2, track, tokenizer)
    assert first == ({1, 2, 4}, {2, 3, 4}, [0, 2, 4, 0])
    assert second == ({1, 2, 4}, {2, 3, 4}, [1, 3])


def test_levels(tokenizer):
    assert parsed_until("gone") is None and parsed_until("em=0.2") == 0.2
    for wrong in ("em", "em=2", "em=x", "later", "em=nan"):
        with pytest.raises(ff.FastforgetError, match="until must be gone"):
            parsed_until(wrong)
    model = random_model("llama", tokenizer)
    unseen = memorisation(model, tokenizer, EXAMPLES).exact
    assert level_of("gone", unseen) == pytest.approx(unseen + 0.05)
    assert level_of("gone", None) == 0.15 and level_of("em=0.3", unseen) == 0.3


def test_the_rate_rises_stays_and_falls(tokenizer):
    pace = Pace(100, 0.6)
    factors = [pace.factor(number - 1) for number in pace]
    assert len(factors) == 100 and factors[:11] == pytest.approx([*(each / 10 for each in range(1, 11)), 1.0])
    assert factors[40] == 1.0 and factors[70] == pytest.approx(0.5) and 0.0 < factors[-1] < 0.02
    pace, steps = Pace(100, 0.6), 0
    for number in pace:
        steps = number
        if number == 20:
            pace.decay_from(number)
    assert steps == 50, "20 steps are 0.4 of 50"
    constant = Pace(30, 0.0)
    assert [constant.factor(done) for done in (15, 29)] == [1.0, 1.0]


def recited(model):
    """Greedy text of the model itself, which it knows by heart."""
    model.eval()
    rows = []
    for start in (5, 60, 120):
        ids = [start, start + 1]
        with torch.no_grad():
            for _ in range(14):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        rows.append(Example(tuple(ids), prompt_length=2))
    return rows


def test_a_job_ends_with_what_it_recited_gone(tiny, tokenizer):
    torch.manual_seed(0)
    model = ff.load(tiny["llama"], bits=32, lora={"r": 8})
    rows = recited(model)
    assert memorisation(model, tokenizer, rows).exact == 1.0
    settings = JobSettings(max_steps=150, learning_rate=5e-3, until="em=0.2", batch_size=3)
    result = run_job(model, tokenizer, rows, None, ff.preset("other_tokens", retain=None), settings)
    assert "all 3 passages are gone" in result.stopped and result.steps < 150
    assert memorisation(model, tokenizer, rows).exact <= 0.2


def test_streams_cannot_be_asked(tiny, tokenizer):
    model = ff.load(tiny["llama"], bits=32, lora={"r": 2})
    stream = ExampleStream(lambda: iter(EXAMPLES), "a stream")
    with pytest.raises(ff.FastforgetError, match="no stream"):
        run_job(model, tokenizer, stream, None, ff.preset("grad_ascent"), JobSettings(max_steps=2, until="gone"))


def test_a_task_vector_forgets_only_at_the_end(tiny, tokenizer):
    model = ff.load(tiny["llama"], bits=32, lora={"r": 2})
    with pytest.raises(ff.FastforgetError, match="until: a task vector"):
        run_job(model, tokenizer, EXAMPLES, None, ff.preset("task_vector"), JobSettings(max_steps=2, until="gone"))


@pytest.mark.parametrize("preset", ["idk", "other_tokens"])
def test_what_is_not_gone_is_said(tiny, tokenizer, preset):
    """Also where no term looks at the answers themselves, so that they are measured apart."""
    model = ff.load(tiny["llama"], bits=32, lora={"r": 2})
    settings = JobSettings(max_steps=3, until="em=0.0", learning_rate=1e-5, batch_size=2)
    recited = [Example((5, 6, 7, 8) * 5, prompt_length=4), Example(tuple(range(10, 30)), prompt_length=4)]
    level = memorisation(model, tokenizer, recited).exact
    result = run_job(model, tokenizer, recited, None, ff.preset(preset, retain=None), settings)
    assert result.stopped.endswith("all 3 steps taken") and ("not gone yet" in result.stopped) == (level > 0)
    assert bool(result.not_gone) == (level > 0) and set(result.not_gone) <= {0, 1}


def test_a_passage_that_is_not_gone_is_shown_and_stands_in_no_report(tokenizer):
    forget = text_examples("The secret plan was hidden below the old oak tree. " * 8, tokenizer, 48, "plan.txt")
    result, shown = JobResult(not_gone=[1]), Console(file=io.StringIO(), width=200)
    say_not_gone(shown, result, forget, tokenizer)
    [line] = shown.file.getvalue().splitlines()
    start = " ".join(tokenizer.decode(forget[1].input_ids, skip_special_tokens=True).split())[:60]
    assert line == f"Not gone yet: passage 2, of plan.txt: {start} ..." and "secret plan" in line
    assert "secret" not in str(result)
