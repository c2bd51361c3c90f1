"""Collating and cycling examples."""

import itertools

import pytest

import fastforget as ff
from fastforget.data import examples as examples_module
from fastforget.data.examples import Example, ExampleStream, collate, cycle

EXAMPLES = [Example(tuple(range(10 * n, 10 * n + n + 1)), prompt_length=n % 3) for n in range(1, 8)]  # 2 to 8 tokens


def rows(batch):
    """The unpadded ids of each row."""
    return [
        tuple(ids[mask == 1].tolist()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_collate_pads_on_the_right_and_labels_after_the_prompt():
    batch = collate([Example((5, 6, 7), prompt_length=2), Example((5, 0))], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]], "the padding token may occur in the text"
    assert batch["labels"].tolist() == [[-100, -100, 7], [5, 0, -100]]


@pytest.mark.parametrize("example", EXAMPLES)
def test_label_count_is_what_the_loss_sees(example):
    labels = collate([example], pad_token_id=0)["labels"]
    assert example.label_count == int((labels[:, 1:] != -100).sum())


def counting_stream(count):
    """A stream of `count` examples, each of its own, and a list of how many were read in each pass."""
    passes = []

    def read():
        passes.append(0)
        for number in range(count):
            passes[-1] += 1
            yield Example((number, number))

    return ExampleStream(read, "numbers"), passes


def first_ids(batches):
    return [row[0] for batch in batches for row in rows(batch)]


def test_a_stream_is_read_anew_without_unlabelled_examples():
    stream = ExampleStream(lambda: iter([Example((1,)), Example((1, 2)), Example((1, 2), 2), Example((3, 4))]), "x")
    assert [example.input_ids for example in stream] == [(1, 2), (3, 4)] == [each.input_ids for each in stream]
    assert [example.input_ids for example in stream.head(1)] == [(1, 2)]
    assert len(stream.head(9)) == 2


def test_head_reads_no_further_than_it_must():
    stream, passes = counting_stream(10**9)
    assert len(stream.head(5)) == 5 and passes == [5]


def test_cycle_of_a_long_stream_holds_a_buffer_and_loses_nothing(monkeypatch):
    monkeypatch.setattr(examples_module, "SHUFFLE_BUFFER", 16)
    stream, passes = counting_stream(100)
    batches = cycle(stream, 4, 0, seed=0)
    seen = []
    for number in range(1, 26):
        seen += first_ids([next(batches)])
        assert len(passes) == 1 and passes[0] <= min(100, 16 + 4 * number), "no more than the buffer is read ahead"
    assert sorted(seen) == list(range(100)) and seen != sorted(seen)
    assert max(index - number for index, number in enumerate(seen)) > 16, "some examples stay for longer than that"


@pytest.mark.parametrize("nothing", [[], ExampleStream(lambda: iter([Example((1,))]), "nil.txt")])
def test_cycle_of_nothing_says_so(nothing):
    with pytest.raises(ff.FastforgetError, match=r"no examples|nil.txt holds no text"):
        next(cycle(nothing, 2, 0, 0))


def numbers(kind):
    """Ten examples, each of its own number."""
    stream, _ = counting_stream(10)
    return stream if kind == "stream" else list(stream)


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_cycle_shows_every_example_once_a_pass_in_a_new_order(kind):
    batches = list(itertools.islice(cycle(numbers(kind), 4, 0, seed=0), 6))
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2] * 2
    first, second = first_ids(batches[:3]), first_ids(batches[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(range(10)) != first != second
    assert len(rows(next(cycle(numbers(kind), 100, 0, 0)))) == 10, "a larger batch holds each once"


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_cycle_repeats_itself_for_a_seed_only(kind):
    def order(seed):
        return first_ids(itertools.islice(cycle(numbers(kind), 3, 0, seed), 8))

    assert order(1) == order(1) != order(2)
