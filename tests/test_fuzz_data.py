"""Thousands of malformed data files: each is read, or named in one line; nothing crashes or hangs."""

import json
import random
import re

import pytest

import fastforget as ff
from fastforget.data.examples import ExampleStream
from fastforget.data.sources import Source, read_source

datasets = pytest.importorskip("datasets")
ROWS = [{"text": f'Row {number}, "quoted", naïve – and\nof two lines.'} for number in range(4)]
NAMES = ("a.jsonl", "a.json", "list.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.txt")
PIECES = (
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\\", b"\\ud800", b"{", b"}", b"[" * 300, b"]", b",", b"\t",
    b"\n", b"\r\n", b"\r", b":", b"null", b"NaN", b"1e999", b"-", b"9" * 400, b"true", b'{"text": 1}', b'{"text": "a"}',
    b"PAR1", b"ARROW1", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"text", b"\xf0\x9f\x98\x80", b"\xed\xa0\x80",
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """{name: the bytes of a file that is read without an error}"""
    folder = tmp_path_factory.mktemp("good")
    dataset = datasets.Dataset.from_list(ROWS)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.json").write_text(lines)
    (folder / "list.json").write_text(json.dumps(ROWS))
    dataset.to_csv(folder / "a.csv")
    dataset.to_csv(folder / "a.tsv", sep="\t")
    dataset.to_parquet(folder / "a.parquet")
    (folder / "a.txt").write_text("\n".join(row["text"] for row in ROWS))
    dataset.save_to_disk(folder / "saved")
    (folder / "a.arrow").write_bytes(next((folder / "saved").glob("*.arrow")).read_bytes())
    return {name: (folder / name).read_bytes() for name in NAMES}


def mutated(content, draw):
    """The bytes after one to four accidents."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        start = draw.randrange(len(content) + 1)
        end = min(len(content), start + draw.choice((0, 1, 1, 4, 40, 10**6)))
        match draw.randrange(5):
            case 0:  # truncated, or a hole in it
                del content[start:end]
            case 1:  # one bit flipped
                for index in range(start, min(start + 1, len(content))):
                    content[index] ^= 1 << draw.randrange(8)
            case 2:
                content[start:end] = draw.choice(PIECES)
            case 3:  # written twice
                content[start:start] = content[start:end]
            case 4:
                content[start:start] = draw.randbytes(draw.choice((1, 4, 64)))
    return bytes(content)


def read_many(good, tokenizer, folder, seed, count):
    """Read `count` malformed files; how many were refused."""
    draw, refused = random.Random(seed), 0
    for number in range(count):
        name = draw.choice(NAMES)
        content = mutated(good[name], draw)
        path = folder / f"{number}{name[name.index('.') :]}"
        path.write_bytes(content)
        source = Source(path=path, streaming=draw.random() < 0.3)
        try:
            examples = read_source(source, tokenizer, 32)
            for example in examples.head(1000) if isinstance(examples, ExampleStream) else examples:
                assert 2 <= len(example.input_ids) <= 32
        except ff.FastforgetError as error:
            refused += 1
            assert "\n" not in str(error) and str(folder) in str(error), (error, content)
            assert not re.search("Traceback|object at 0x", str(error)), error
        except Exception as error:
            raise AssertionError(
                f"{name}, {seed}/{number}: {type(error).__name__}: {error}; {content[:2000]!r}"
            ) from error
        path.unlink()
    return refused


@pytest.mark.timeout(60)
def test_a_sample_of_malformed_files(good, tokenizer, tmp_path):
    assert 20 < read_many(good, tokenizer, tmp_path, 0, 120) < 120


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_malformed_files(good, tokenizer, tmp_path, seed):
    assert read_many(good, tokenizer, tmp_path, seed, 500) > 100
