"""The user's files: every token labelled once, and one clear line for what cannot be read."""

import copy
import json
import tracemalloc

import psutil
import pytest
from tokenizers import processors

import fastforget as ff
from fastforget.data import text as text_module
from fastforget.data.examples import collate, cycle
from fastforget.data.sources import Source, read_source
from fastforget.data.text import BLOCK_CHARACTERS, text_blocks, text_examples


@pytest.fixture
def write(tmp_path):
    def writer(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return writer


def read_examples(path, tokenizer, max_length):
    return read_source(Source(path=path), tokenizer, max_length)


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


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("content", [b"\xef\xbb\xbfone\r\ntwo\r\n", b"one\rtwo\r", b"one\r\ntwo\r"])
def test_byte_order_mark_and_windows_line_ends_are_not_text(write, tokenizer, content, streaming):
    plain = read_examples(write("a.txt", "one\ntwo\n"), tokenizer, 64)
    source = Source(path=write("b.txt", content), streaming=streaming)
    other = list(read_source(source, tokenizer, 64))
    assert [example.input_ids for example in plain] == [example.input_ids for example in other]


def test_windows_line_ends_and_characters_cut_by_a_block_are_whole(write, tokenizer):
    """A block ends between \\r and \\n, and another one within a character of three bytes."""
    head = "x" * (BLOCK_CHARACTERS - 1)
    text = f"{head}\n{'y' * (BLOCK_CHARACTERS - 3)}€ end"
    chunks = list(text_module.read_chunks(write("a.txt", text.replace("\n", "\r\n"))))
    assert len(chunks) > 2 and "".join(chunks) == text


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
        ("a.txt", "", "is empty"),
        ("a.jsonl", "\n \n", "is empty"),
        ("a.txt", b"caf\xe9", "is not UTF-8 .byte 3"),
        ("a.txt", b"\xef\xbb\xbfcaf\xe9s", "is not UTF-8 .byte 6"),
        ("a.txt", "word é\n".encode() * 30_000 + b"\xc3", "is not UTF-8 .byte 240000"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}', "is not UTF-8 .byte 27"),
        ("a.txt", "text".encode("utf-16"), "is not UTF-8 .byte 0"),
        ("a.jsonl", '{"text": "a \\ud83d b"}', "a.jsonl:1 holds half a surrogate pair"),
        ("a.jsonl", '{"text": "x"}\n{"text": ', "a.jsonl:2 is not JSON"),
        ("a.jsonl", "[" * 200_000, "a.jsonl:1 is JSON that cannot be read"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", "a.jsonl:1 is JSON that cannot be read"),
        ("a.jsonl", "[1]", "a.jsonl:1 is not a JSON object"),
        ("a.jsonl", '{"prompt": "x"}', "a.jsonl:1 has no column 'response'; its columns are prompt.* response=COLUMN"),
        ("a.jsonl", '{"a": 1, "b": 2}', "a.jsonl:1 needs 'text', or 'prompt' and 'response'.* columns are a, b"),
        ("a.jsonl", '{"text": "x"}\n{"text": null}', "a.jsonl:2 has a 'text' that is empty .None"),
        ("a.jsonl", '{"prompt": "x", "response": 4}', "a.jsonl:1 has a 'response' that is of type int"),
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
    with pytest.raises(ff.FastforgetError, match="is an empty folder"):
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


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("max_length", [2, 3, 17, 64])
def test_blocks_lose_no_token_and_label_none_twice(write, tokenizer, monkeypatch, begins, streaming, max_length):
    monkeypatch.setattr(text_module, "BLOCK_CHARACTERS", 100)
    if not begins:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    text = "".join(f"Line {number} of a text.\n" for number in range(60)) + "  \n\n no end: " + "long" * 80
    examples = list(read_source(Source(path=write("a.txt", text), streaming=streaming), tokenizer, max_length))
    ids = [token for example in examples for token in labelled(example)]
    if not begins:  # nothing can predict the very first one
        ids = [examples[0].input_ids[0], *ids]
    assert tokenizer.decode(ids) == text
    lengths = [len(example.input_ids) for example in examples]
    assert max(lengths) <= max_length
    # a piece after the first has one token more where no token begins it: the one before
    assert lengths[-2] - lengths[-1] <= 1, "no short tail"
    if streaming:
        assert lengths[1:-2] == [max_length] * (len(lengths) - 3)


def test_blocks_are_cut_where_tokens_end(tokenizer, monkeypatch):
    monkeypatch.setattr(text_module, "BLOCK_CHARACTERS", 20)
    lines = "first line\nsecond\n\n    third is longer than that\nx"
    blocks = list(text_blocks([lines[:30], lines[30:]]))
    assert blocks == ["first line\n", "second\n\n", "    third is longer", " than that\nx"]
    assert list(text_blocks(["a" * 45])) == ["a" * 20, "a" * 20, "a" * 5]
    assert list(text_blocks(["", ""])) == []


def test_a_length_of_one_token_is_refused(tokenizer):
    for length in (1, 0, -3):
        with pytest.raises(ff.FastforgetError, match="max_length must be at least 2"):
            text_examples("Some words.", tokenizer, length, "here")
        with pytest.raises(ff.FastforgetError, match="max_length must be at least 2"):
            read_source(Source(path=[{"prompt": "a", "response": "b"}]), tokenizer, length)
    assert sum(example.label_count for example in text_examples("Some words.", tokenizer, 2, "here")) == len(
        tokenizer.encode("Some words.", add_special_tokens=False)
    )


def write_lines(path, characters):
    words = ["alpha", "beta", "gamma", "delta", "a longer phrase", "x = 1", "été"]
    with open(path, "w", encoding="utf-8") as file:
        number = written = 0
        while written < characters:
            line = f"{number} " + " ".join(words[(number * step) % 7] for step in (1, 2, 3, 5)) + "\n"
            written += file.write(line)
            number += 1
    return path


def traced_peak(stream):
    """Most bytes of Python objects at once while a stream is read, and how many labels it has."""
    stream.head(10)
    tracemalloc.start()
    labels = sum(example.label_count for example in stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, labels


def test_a_streamed_file_takes_the_memory_of_a_block(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text_module, "BLOCK_CHARACTERS", 4096)
    peaks = {}
    for characters in (100_000, 600_000):
        path = write_lines(tmp_path / f"{characters}.txt", characters)
        peaks[characters], labels = traced_peak(read_source(Source(path=path, streaming=True), tokenizer, 64))
        assert labels > characters / 10
    assert peaks[600_000] < 400_000, "less than the text itself"
    assert peaks[600_000] < 1.2 * peaks[100_000] + 20_000, "flat"


@pytest.mark.slow
def test_thirty_megabytes_stream_in_flat_memory(tmp_path, tokenizer):
    stream = read_source(Source(path=write_lines(tmp_path / "a.txt", 30_000_000), streaming=True), tokenizer, 128)
    stream.head(5000)
    before = psutil.Process().memory_info().rss
    peak, labels = traced_peak(stream)
    assert labels > 3_000_000
    assert peak < 8_000_000
    assert psutil.Process().memory_info().rss - before < 50_000_000, "the tokenizer's memory too"
