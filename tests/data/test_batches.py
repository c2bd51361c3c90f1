"""Batches of both sides: shuffled, cycled, and gone on with from a saved state."""

import io
import itertools

import pytest
import torch
from helpers import FORGET, RETAIN, counting_stream, load_perturbed
from torch.utils.data import DataLoader

import fastforget as ff
from fastforget.data import batches as batches_module
from fastforget.data.batches import Cycle
from fastforget.data.examples import Example, ExampleStream


def rows(batch):
    """The unpadded ids of each row."""
    return [
        tuple(ids[mask == 1].tolist()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def first_ids(batches):
    return [row[0] for batch in batches for row in rows(batch)]


def test_cycle_of_a_long_stream_holds_a_buffer_and_loses_nothing(monkeypatch):
    monkeypatch.setattr(batches_module, "SHUFFLE_BUFFER", 16)
    stream, passes = counting_stream(100)
    batches = Cycle(stream, 4, 0, seed=0)
    seen = []
    for number in range(1, 26):
        seen += first_ids([next(batches)])
        assert len(passes) == 1 and passes[0] <= min(100, 16 + 4 * number), "no more than the buffer is read ahead"
    assert sorted(seen) == list(range(100)) and seen != sorted(seen)
    assert max(index - number for index, number in enumerate(seen)) > 16, "some examples stay for longer than that"


@pytest.mark.parametrize("nothing", [[], ExampleStream(lambda: iter([Example((1,))]), "nil.txt")])
def test_cycle_of_nothing_says_so(nothing):
    with pytest.raises(ff.FastforgetError, match=r"no examples|nil.txt holds no text"):
        next(Cycle(nothing, 2, 0, 0))


def numbers(kind):
    """Ten examples, each of its own number."""
    stream, _ = counting_stream(10)
    return stream if kind == "stream" else list(stream)


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_cycle_shows_every_example_once_a_pass_in_a_new_order(kind):
    batches = list(itertools.islice(Cycle(numbers(kind), 4, 0, seed=0), 6))
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2] * 2
    first, second = first_ids(batches[:3]), first_ids(batches[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(range(10)) != first != second
    assert len(rows(next(Cycle(numbers(kind), 100, 0, 0)))) == 10, "a larger batch holds each once"


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_cycle_repeats_itself_for_a_seed_only(kind):
    def order(seed):
        return first_ids(itertools.islice(Cycle(numbers(kind), 3, 0, seed), 8))

    assert order(1) == order(1) != order(2)


def saved_and_loaded(state):
    """What `torch.load` gives back of a state, weights only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", ["list", "stream"])
@pytest.mark.parametrize("taken", range(8))
def test_cycle_goes_on_from_its_state(kind, taken, monkeypatch):
    monkeypatch.setattr(batches_module, "SHUFFLE_BUFFER", 4)
    whole = Cycle(numbers(kind), 3, 0, seed=5)
    for _ in range(taken):
        next(whole)
    state = saved_and_loaded(whole.state_dict())
    expected = first_ids(itertools.islice(whole, 9))
    resumed = Cycle(numbers(kind), 3, 0, seed=6)
    next(resumed)
    resumed.load_state_dict(state)
    assert saved_and_loaded(resumed.state_dict())["taken"] == state["taken"]
    assert first_ids(itertools.islice(resumed, 9)) == expected


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_cycle_that_skips_goes_on_after_as_many(kind):
    whole = Cycle(numbers(kind), 3, 0, seed=5)
    for _ in range(6):
        next(whole)
    skipping = Cycle(numbers(kind), 3, 0, seed=5, skip=6)
    assert first_ids(itertools.islice(skipping, 9)) == first_ids(itertools.islice(whole, 9))


def test_a_state_of_other_texts_is_refused():
    state = Cycle(numbers("list"), 3).state_dict()
    with pytest.raises(ff.FastforgetError, match="of a set of 10 examples, and this one has 9 examples"):
        Cycle(numbers("list")[1:], 3).load_state_dict(state)
    with pytest.raises(ff.FastforgetError, match="this one has a stream's unknown length"):
        Cycle(numbers("stream"), 3).load_state_dict(state)
    whole = Cycle(numbers("stream"), 9)
    next(whole)
    shorter, _ = counting_stream(5)
    with pytest.raises(ff.FastforgetError, match="after 9 examples of a stream that now ends after 5"):
        Cycle(shorter, 9).load_state_dict(whole.state_dict())
    both, alone = ff.batches(numbers("list"), numbers("list")), ff.batches(numbers("list"))
    with pytest.raises(ff.FastforgetError, match="of batches with a retain set, and these are without"):
        alone.load_state_dict(both.state_dict())
    with pytest.raises(ff.FastforgetError, match="of batches without a retain set, and these are with:"):
        both.load_state_dict(alone.state_dict())


def test_batches_cycle_both_sides_independently():
    forget, retain = numbers("list")[:3], numbers("list")[3:]
    pairs = list(ff.batches(forget, retain, batch_size=2, steps=14))
    assert len(pairs) == 14
    forgotten, kept = (first_ids(side) for side in zip(*pairs, strict=True))
    assert [sorted(forgotten[at : at + 3]) for at in range(0, 21, 3)] == [[0, 1, 2]] * 7
    assert [sorted(kept[at : at + 7]) for at in range(0, 21, 7)] == [[3, 4, 5, 6, 7, 8, 9]] * 3
    assert all(retain is None for _, retain in ff.batches(forget, steps=2))
    with pytest.raises(ff.FastforgetError, match="batch_size must be at least 1, not 0"):
        ff.batches(forget, batch_size=0)


def test_batches_go_on_from_their_state():
    make = lambda: ff.batches(numbers("list")[:3], numbers("list")[3:], batch_size=2, steps=9, seed=3)  # noqa: E731
    whole, resumed = make(), make()
    for _ in range(4):
        next(whole)
    resumed.load_state_dict(saved_and_loaded(whole.state_dict()))
    rest = [[first_ids([side]) for side in pair] for pair in whole]
    assert len(rest) == 5 and [[first_ids([side]) for side in pair] for pair in resumed] == rest


def test_a_job_takes_the_same_batches(tiny, tokenizer, monkeypatch, tmp_path):
    """What `ff.unlearn` steps on is what `ff.batches` of its texts gives, for its seed."""
    seen = []
    step = ff.UnlearnStep.backward
    monkeypatch.setattr(
        ff.UnlearnStep, "backward", lambda self, *sides, **more: seen.append(sides) or step(self, *sides, **more)
    )
    options = {"max_steps": 4, "max_length": 48, "batch_size": 2, "bits": 32, "lora_r": 4, "seed": 7, "quiet": True}
    ff.unlearn(
        tiny["llama"], FORGET, tmp_path / "out", retain=RETAIN, preset="grad_diff", measured_passages=1, **options
    )
    forget, retain = (ff.examples(texts, tokenizer, max_length=48) for texts in (FORGET, RETAIN))
    expected = ff.batches(forget, retain, batch_size=2, steps=4, seed=7, pad_token_id=tokenizer.pad_token_id)
    assert len(seen) == 4
    for pair, other in zip(seen, expected, strict=True):
        for side, same in zip(pair, other, strict=True):
            assert side.keys() == same.keys() and all(torch.equal(side[key], same[key]) for key in side)


def test_examples_reads_texts_rows_and_files(tokenizer, tmp_path):
    texts = ff.examples(["A first text.", "A second one."], tokenizer)
    assert [tokenizer.decode(each.input_ids, skip_special_tokens=True).strip() for each in texts] == [
        "A first text.",
        "A second one.",
    ]
    (row,) = ff.examples(
        [{"question": "Who?", "answer": " Alder."}], tokenizer, columns={"prompt": "question", "response": "answer"}
    )
    assert 0 < row.prompt_length < len(row.input_ids)
    (tmp_path / "text.txt").write_text("word " * 400)
    assert max(len(each.input_ids) for each in ff.examples(tmp_path / "text.txt", tokenizer, max_length=32)) <= 32
    assert isinstance(ff.examples(tmp_path / "text.txt", tokenizer, streaming=True), ExampleStream)
    with pytest.raises(ff.FastforgetError, match="does not exist"):
        ff.examples(tmp_path / "nowhere.txt", tokenizer)


def test_which_token_pads_changes_nothing(tiny, tokenizer):
    forget, retain = ff.examples(FORGET, tokenizer), ff.examples(RETAIN, tokenizer)
    assert len({len(each.input_ids) for each in (*forget, *retain)}) > 1
    loss = ff.UnlearnLoss(load_perturbed(tiny["llama"]).eval(), ff.preset("grad_diff"))
    losses = [float(loss(*next(ff.batches(forget, retain, pad_token_id=token))).loss.detach()) for token in (0, 7)]
    assert losses[0] == losses[1]


def test_a_data_loader_collates_them(tokenizer):
    loader = DataLoader(ff.examples(FORGET, tokenizer), batch_size=2, collate_fn=ff.collate)
    assert [len(batch["labels"]) for batch in loader] == [2, 2]
