"""Packed batches keep their documents apart, and count them one by one."""

import pytest
import torch
from helpers import assert_gradients, gradients
from integrations.loops import rows
from transformers import DataCollatorWithFlattening

import fastforget as ff
from fastforget.integrations.rows import row_collator
from fastforget.packing import is_packed, unpacked

DOCUMENTS = rows(4, 3)


def padded(documents):
    batch = row_collator()([{**document, "role": 0} for document in documents])
    return {key: value for key, value in batch.items() if key != "role"}


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
def test_a_packed_batch_is_its_documents(model, options):
    packed = DataCollatorWithFlattening(**options)([dict(document) for document in DOCUMENTS])
    assert packed["input_ids"].shape[0] == 1 and is_packed(packed)
    retain = DataCollatorWithFlattening(**options)([dict(document) for document in rows(3, 8)])
    results = []
    for sides in ((packed, retain), (padded(DOCUMENTS), padded(rows(3, 8)))):
        model.zero_grad()
        step = ff.UnlearnStep(model, torch.optim.SGD, terms=[ff.NPO(), ff.KL()], lr=0.1)
        results.append((float(step.backward(*sides).loss), gradients(model)))
        assert len(step.loss.reference._cache) == 7, "each document by itself"
    assert results[0][0] == results[1][0]
    assert_gradients(results[0][1], results[1][1], 1e-6)
    assert ff.count_labels([(packed, None)]).forget_sequences == 4


def test_rows_of_several_documents_and_what_goes_with_them():
    batch = {
        "input_ids": torch.arange(1, 13).view(2, 6),
        "labels": torch.arange(1, 13).view(2, 6),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]]),
        "token_type_ids": torch.ones(2, 6, dtype=torch.long),
        "max_length_q": 4,
    }
    found = unpacked(batch)
    assert found.keys() == {"input_ids", "labels", "token_type_ids", "attention_mask"}
    assert found["input_ids"].tolist() == [[1, 2, 3, 0], [4, 5, 6, 0], [7, 8, 9, 10], [11, 12, 0, 0]]
    assert found["labels"][3].tolist() == [11, 12, -100, -100]
    assert found["attention_mask"].sum(1).tolist() == [3, 3, 4, 2]


def test_positions_that_do_not_begin_anew_and_a_mask_are_left_alone():
    ids = torch.ones(1, 4, dtype=torch.long)
    for batch in (
        {"input_ids": ids, "position_ids": torch.arange(4)[None]},
        {"input_ids": ids, "attention_mask": ids, "position_ids": torch.zeros(1, 4, dtype=torch.long)},
        {"input_ids": ids},
    ):
        assert unpacked(batch) is batch
