"""Collating and cycling examples."""

import itertools

import pytest

from fastforget.data.examples import Example, collate, cycle

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


def test_cycle_shows_every_example_once_a_pass_in_a_new_order():
    batches = list(itertools.islice(cycle(EXAMPLES, 3, pad_token_id=0, seed=0), 6))
    assert [len(batch["labels"]) for batch in batches] == [3, 3, 1] * 2
    first, second = ([row for batch in part for row in rows(batch)] for part in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == [example.input_ids for example in EXAMPLES]
    assert first != second


def test_cycle_repeats_itself_for_a_seed_only():
    def order(seed):
        return [rows(batch) for batch in itertools.islice(cycle(EXAMPLES, 2, 0, seed), 8)]

    assert order(1) == order(1) != order(2)


def test_a_batch_larger_than_the_set_holds_it_once():
    assert len(rows(next(cycle(EXAMPLES, 100, 0, 0)))) == len(EXAMPLES)
