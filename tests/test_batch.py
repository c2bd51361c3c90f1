"""prepare, count_labels and the splits, against plain Python loops over the batch."""

import pytest
import torch
import torch.nn.functional as F
from helpers import prepared

import fastforget as ff
from fastforget.batch import check_batch, count_labels, split_roles


def kept_by_hand(batch):
    """(row, column, label) of each token whose next token is labelled, in order."""
    return [
        (row, column, labels[column + 1])
        for row, labels in enumerate(batch["labels"].tolist())
        for column in range(len(labels) - 1)
        if labels[column + 1] != -100
    ]


def pad(batch, left, right):
    return {key: F.pad(value, (left, right), value=-100 if key == "labels" else 0) for key, value in batch.items()}


def test_kept_tokens_are_those_before_a_label(batch):
    one = batch(3, 1)
    one["labels"][1] = -100  # a row without a label
    one["labels"][2, 0] = 7  # a first token is never predicted
    side = prepared(one)
    kept = kept_by_hand(one)
    rows, columns = (places.tolist() for places in side.positions)
    assert list(zip(rows, columns, side.labels.tolist(), strict=True)) == kept
    assert side.rows == [0, 2] and side.sequence_count == 2
    assert side.lengths == [sum(row == each for row, _, _ in kept) for each in (0, 2)]
    assert side.sequence.tolist() == [0] * side.lengths[0] + [1] * side.lengths[1]


def test_inputs_are_what_the_model_takes(batch):
    one = batch(2, 1) | {"role": torch.zeros(2), "example_id": torch.arange(2), "token_type_ids": torch.ones(2, 20)}
    assert set(prepared(one).inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    bare = {"input_ids": one["input_ids"], "labels": one["labels"]}
    assert prepared(bare).inputs["attention_mask"].all()


def test_no_predicted_token_gives_none(batch):
    one = batch(2, 1)
    one["labels"][:, 1:] = -100
    one["labels"][:, 0] = 5
    assert prepared(one) is None


def test_keys_tell_examples_apart_but_not_paddings(batch):
    one = batch(2, 1)
    keys = prepared(one).keys
    assert len(set(keys)) == 2
    for left, right in ((0, 4), (3, 0), (2, 2)):
        assert prepared(pad(one, left, right)).keys == keys

    def changed(name, column, value):
        other = {key: tensor.clone() for key, tensor in one.items()}
        other[name][1, column] = value
        return prepared(other).keys

    for name, column, value in (("input_ids", 2, 3), ("attention_mask", 2, 0), ("labels", 10, -100)):
        assert changed(name, column, value)[0] == keys[0] and changed(name, column, value)[1] != keys[1], name
    extra = prepared(one | {"token_type_ids": torch.ones(2, 20)}).keys
    assert set(extra).isdisjoint(keys)
    of_rows = [prepared(one | {"weight": torch.tensor([1.0, weight])}).keys for weight in (2.0, 3.0)]
    assert of_rows[0][0] == of_rows[1][0] and of_rows[0][1] != of_rows[1][1], "one number a row"


def test_no_keys_where_an_input_belongs_to_the_whole_batch(batch):
    assert prepared(batch(2, 1) | {"bias": torch.ones(1, 1, 20, 20)}).keys is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.pop("labels"), "the retain batch needs input_ids, .*it has no 'labels'"),
        (lambda one: one.pop("input_ids"), "the retain batch needs input_ids, .*it has no 'input_ids'"),
        (
            lambda one: one.update({key: value[0] for key, value in one.items()}),
            r"tensors \(B, T\): its 'input_ids' is",
        ),
        (lambda one: one.update(labels=one["labels"][0]), r"its 'labels' is \(20,\)"),
        (lambda one: one.update(labels=one["labels"].tolist()), "its 'labels' is a list"),
        (lambda one: one.update(attention_mask=torch.ones(20)), r"its 'attention_mask' is \(20,\)"),
        (lambda one: one.update(labels=one["labels"][:, 1:]), r"labels are \(2, 19\), its input_ids \(2, 20\)"),
        (lambda one: one.update(attention_mask=torch.ones(2, 3)), r"attention_mask are \(2, 3\)"),
        (
            lambda one: one.update(position_ids=torch.ones(20)),
            r"must be int64 \(2, 20\), not torch.float32 \(20,\)",
        ),
        (
            lambda one: one.update(position_ids=one["input_ids"][:, 1:]),
            r"must be int64 .* not torch.int64 \(2, 19\)",
        ),
        (lambda one: one["attention_mask"].mul_(3), "must hold 0 .padding. and 1 alone"),
        (lambda one: one["labels"].fill_(320), "label 320, outside the vocabulary of 320"),
        (lambda one: one["labels"].fill_(-1), "label -1, outside the vocabulary of 320"),
    ],
)
def test_wrong_batches_are_refused(batch, change, message):
    one = batch(2, 1)
    change(one)
    with pytest.raises(ff.FastforgetError, match=message):
        check_batch(one, "the retain batch", 320)


def test_count_labels_counts_what_is_predicted(batch):
    pairs = [(batch(2, 1), batch(3, 2)), (batch(1, 3), None)]
    pairs[0][1]["labels"][1] = -100
    counts = count_labels(pairs)
    retain = kept_by_hand(pairs[0][1])
    assert counts.totals("forget") == (sum(len(kept_by_hand(forget)) for forget, _ in pairs), 3)
    assert counts.totals("retain") == (len(retain), 2)
    flat = {key: torch.cat([pairs[0][1][key], pairs[0][0][key]]) for key in pairs[0][0]}
    flat["role"] = torch.tensor([1, 1, 1, 0, 0])
    assert count_labels([flat, pairs[1]]) == counts


def test_split_roles_and_rows(batch):
    flat = batch(5, 1) | {"role": torch.tensor([1, 0, 1, 0, 0]), "example_id": torch.arange(5), "scale": 2.0}
    forget, retain = split_roles(flat)
    assert torch.equal(forget["input_ids"], flat["input_ids"][[1, 3, 4]])
    assert torch.equal(retain["labels"], flat["labels"][[0, 2]])
    assert set(forget) == {"input_ids", "attention_mask", "labels", "scale"} and forget["scale"] == 2.0
    assert split_roles(flat | {"role": torch.zeros(5)})[1] is None

    parts = check_batch(forget, "the forget batch").split(2)
    assert [part.row_count for part in parts] == [2, 1]
    assert torch.equal(torch.cat([part.labels for part in parts]), forget["labels"])
    assert torch.equal(torch.cat([part.inputs["input_ids"] for part in parts]), forget["input_ids"])
    assert all(part.inputs["scale"] == 2.0 for part in parts)
