"""Collating examples, and streams of them."""

import pytest
from helpers import counting_stream

from fastforget.data.examples import Example, ExampleStream, collate
from fastforget.errors import FastforgetError

EXAMPLES = [Example(tuple(range(10 * n, 10 * n + n + 1)), prompt_length=n % 3) for n in range(1, 8)]  # 2 to 8 tokens


def test_collate_pads_on_the_right_and_labels_after_the_prompt():
    batch = collate([Example((5, 6, 7), prompt_length=2), Example((5, 0))], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]], "the padding token may occur in the text"
    assert batch["labels"].tolist() == [[-100, -100, 7], [5, 0, -100]]


def test_alternative_answers_are_a_batch_beside():
    known = Example((5, 6, 7), 1, alternative=(8, 9, 4))
    batch = collate([known, Example((5, 6), 1, alternative=(3,))], pad_token_id=0)
    assert batch["refusal"]["input_ids"].tolist() == [[5, 8, 9, 4], [5, 3, 0, 0]]
    assert batch["refusal"]["labels"].tolist() == [[-100, 8, 9, 4], [-100, 3, -100, -100]]
    with pytest.raises(FastforgetError, match=r"f\.jsonl:2 has no alternative answer"):
        collate([known, Example((5, 6), 1, "f.jsonl:2")])


@pytest.mark.parametrize("example", EXAMPLES)
def test_label_count_is_what_the_loss_sees(example):
    labels = collate([example], pad_token_id=0)["labels"]
    assert example.label_count == int((labels[:, 1:] != -100).sum())


def test_a_stream_is_read_anew_without_unlabelled_examples():
    stream = ExampleStream(lambda: iter([Example((1,)), Example((1, 2)), Example((1, 2), 2), Example((3, 4))]), "x")
    assert [example.input_ids for example in stream] == [(1, 2), (3, 4)] == [each.input_ids for each in stream]
    assert [example.input_ids for example in stream.head(1)] == [(1, 2)]
    assert len(stream.head(9)) == 2


def test_head_reads_no_further_than_it_must():
    stream, passes = counting_stream(10**9)
    assert len(stream.head(5)) == 5 and passes == [5]
