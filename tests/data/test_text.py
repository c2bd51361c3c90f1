"""The user's files: every token labelled once, and one clear line for what cannot be read."""

import copy
import json

import psutil
import pytest
from helpers import traced_peak
from tokenizers import processors

import fastforget as ff
from fastforget.data import text as text_module
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


def without_begin_token(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return bare


def labelled(example):
    return list(example.input_ids[max(example.prompt_length, 1) :])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("content", [b"\xef\xbb\xbfone\r\ntwo\r\n", b"one\rtwo\r", b"one\r\ntwo\r"])
def test_byte_order_mark_and_windows_line_ends_are_not_text(write, tokenizer, content, streaming):
    plain = read_examples(write("a.txt", "one\ntwo\n"), tokenizer, 64)
    source = Source(path=write("b.txt", content), streaming=streaming)
    other = list(read_source(source, tokenizer, 64))
    assert [example.input_ids for example in plain] == [example.input_ids for example in other]


def test_line_ends_and_characters_at_a_block_s_end_are_whole(write, tokenizer):
    """A block ends between \\r and \\n, and another one within a character of three bytes."""
    head = "x" * (BLOCK_CHARACTERS - 1)
    text = f"{head}\n{'y' * (BLOCK_CHARACTERS - 3)}€ end"
    chunks = list(text_module.read_chunks(write("a.txt", text.replace("\n", "\r\n"))))
    assert len(chunks) > 2 and "".join(chunks) == text


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


@pytest.mark.parametrize("begins", [True, False])
def test_prompt_and_response_label_the_response_once(write, tokenizer, begins):
    """Many tokenizers (GPT-2, Qwen) begin with no token: the very first one of a text cannot be predicted then."""
    tokenizer = tokenizer if begins else without_begin_token(tokenizer)
    rows = [{"prompt": "What is it? " * 20, "response": "A long answer. " * 30}, {"prompt": "Q ", "response": "A"}]
    rows.append({"prompt": "", "response": "The quick brown fox jumps over the lazy dog. " * 20})
    examples = read_examples(write("a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"), tokenizer, 32)
    assert all(len(example.input_ids) <= 32 for example in examples)
    for number, row in enumerate(rows, start=1):
        mine = [example for example in examples if example.source.endswith(f":{number}")]
        ids = [token for example in mine for token in labelled(example)]
        expected = [*tokenizer.encode(row["response"], add_special_tokens=False), tokenizer.eos_token_id]
        assert ids == (expected if row["prompt"] or begins else expected[1:])


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("max_length", [2, 3, 17, 64])
def test_blocks_lose_no_token_and_label_none_twice(write, tokenizer, monkeypatch, begins, streaming, max_length):
    monkeypatch.setattr(text_module, "BLOCK_CHARACTERS", 100)
    tokenizer = tokenizer if begins else without_begin_token(tokenizer)
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
    if not streaming:
        assert max(lengths) - min(lengths) <= 1 + (not begins)
    else:
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
