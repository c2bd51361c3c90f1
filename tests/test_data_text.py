"""The user's files: every token labelled once, and one clear line for what cannot be read."""

import copy
import json

import pytest
from tokenizers import processors

import fastforget as ff
from fastforget.data.examples import collate, cycle
from fastforget.data.text import read_examples


@pytest.fixture
def write(tmp_path):
    def writer(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return writer


def labelled(example):
    return list(example.input_ids[max(example.prompt_length, 1) :])


def test_plain_text_is_cut_without_losing_a_token(write, tokenizer):
    text = "The quick brown fox jumps over the lazy dog. " * 40
    examples = read_examples(write("a.txt", text), tokenizer, 64)
    assert all(len(example.input_ids) <= 64 for example in examples)
    lengths = {len(example.input_ids) for example in examples}
    assert max(lengths) - min(lengths) <= 1, "no short tail"
    ids = [token for example in examples for token in labelled(example)]
    assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_byte_order_mark_and_windows_line_ends_are_not_text(write, tokenizer):
    plain = read_examples(write("a.txt", "one\ntwo\n"), tokenizer, 64)
    windows = read_examples(write("b.txt", b"\xef\xbb\xbfone\r\ntwo\r\n"), tokenizer, 64)
    assert [example.input_ids for example in plain] == [example.input_ids for example in windows]


def test_prompt_and_response_label_the_response_once(write, tokenizer):
    rows = [{"prompt": "What is it? " * 20, "response": "A long answer. " * 30}, {"prompt": "Q ", "response": "A"}]
    path = write("a.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    examples = read_examples(path, tokenizer, 64)
    assert all(len(example.input_ids) <= 64 and example.prompt_length > 0 for example in examples)
    for number, row in enumerate(rows, start=1):
        mine = [example for example in examples if example.source.endswith(f":{number}")]
        ids = [token for example in mine for token in labelled(example)]
        assert ids == [*tokenizer.encode(row["response"], add_special_tokens=False), tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "  \n ", "is empty"),
        ("a.txt", b"caf\xe9", "is not UTF-8 .byte 3"),
        ("a.jsonl", '{"text": "x"}\n{"text": ', "a.jsonl:2 is not JSON"),
        ("a.jsonl", "[" * 200_000, "a.jsonl:1 is JSON that cannot be read"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", "a.jsonl:1 is JSON that cannot be read"),
        ("a.jsonl", "[1]", "a.jsonl:1 is not a JSON object"),
        ("a.jsonl", '{"prompt": "x"}', "needs 'text', or 'prompt' and 'response'"),
        ("a.jsonl", '{"prompt": "x", "response": ""}', "empty response"),
        ("a.jsonl", '{"text": ""}', "holds no text"),
    ],
)
def test_bad_files_are_named(write, tokenizer, name, content, message):
    with pytest.raises(ff.FastforgetError, match=message):
        read_examples(write(name, content), tokenizer, 64)


def test_missing_files_and_folders(tmp_path, tokenizer):
    with pytest.raises(ff.FastforgetError, match="does not exist"):
        read_examples(tmp_path / "none.txt", tokenizer, 64)
    with pytest.raises(ff.FastforgetError, match="is a folder"):
        read_examples(tmp_path, tokenizer, 64)


def test_collate_masks_by_length_and_cycle_shows_everything_each_pass(write, tokenizer):
    examples = read_examples(write("a.txt", "Some words that are cut. " * 30), tokenizer, 32)
    batch = collate(examples[:3], pad_token_id=examples[0].input_ids[5])  # pads with a token that occurs
    assert int(batch["attention_mask"].sum()) == sum(len(example.input_ids) for example in examples[:3])
    assert ((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all()
    batches = cycle(examples, 4, 0, seed=1)
    passes = -(-len(examples) // 4)
    for _ in range(2):
        rows = [tuple(row[mask.bool()].tolist()) for _ in range(passes) for row, mask in rows_of(next(batches))]
        assert sorted(rows) == sorted(example.input_ids for example in examples)


def rows_of(batch):
    return list(zip(batch["input_ids"], batch["attention_mask"], strict=True))


def test_every_token_is_labelled_once_without_a_begin_token(write, tokenizer):
    """Many tokenizers (GPT-2, Qwen) begin with no token: only the very first one of a text cannot be predicted."""
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    text = "The quick brown fox jumps over the lazy dog. " * 20
    ids = bare.encode(text)
    examples = read_examples(write("a.txt", text), bare, 32)
    assert len(examples) > 3 and all(len(example.input_ids) <= 32 for example in examples)
    assert [token for example in examples for token in labelled(example)] == ids[1:]
    path = write("a.jsonl", json.dumps({"prompt": "", "response": text}))
    response = [token for example in read_examples(path, bare, 32) for token in labelled(example)]
    assert response == [*ids[1:], bare.eos_token_id]
