"""Where text may come from: files, folders, `datasets` objects, rows in memory, the hub; and what is refused."""

import json
import sys

import pytest
from helpers import traced_peak, write_rows

import fastforget as ff
from fastforget.data.sources import Source, check_source, read_source

datasets = pytest.importorskip("datasets")
pandas = pytest.importorskip("pandas")

COLUMNS = {"prompt": "question", "response": "answer"}
TABLE = {"question": ["What is it?", "Who?", "Which?"], "answer": ["A thing.", "NA", "007"], "number": [1, 2, 3]}
ROWS = [dict(zip(TABLE, row, strict=True)) for row in zip(*TABLE.values(), strict=True)]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same rows in each kind of file and folder; folders have a split "test" with the first row alone."""
    root = tmp_path_factory.mktemp("places")
    train = datasets.Dataset.from_dict(TABLE)
    test = train.select([0])
    train.save_to_disk(root / "saved")
    datasets.DatasetDict(train=train, test=test).save_to_disk(root / "saved_splits")
    for kind in ("csv", "json", "parquet"):
        (root / kind).mkdir()  # a relative folder of this name is not the reader of that name either
        for path, part in ((f"{kind}/train", train), (f"{kind}/test", test), ("one", train)):
            getattr(part, f"to_{kind}")(root / f"{path}.{kind}")
    train.to_csv(root / "one.tsv", sep="\t")
    (root / "list.json").write_text(json.dumps(ROWS, indent=1))
    write_rows(root / "one.jsonl", ROWS)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where `datasets` would leave copies."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def labelled_texts(source, tokenizer, max_length=64):
    """The labelled text of each example, without the end-of-sequence token behind a response."""
    examples = list(read_source(source, tokenizer, max_length))
    texts = [tokenizer.decode(example.input_ids[max(example.prompt_length, 1) :]) for example in examples]
    return [text.removesuffix(tokenizer.eos_token) for text in texts]


def refusal(source, tokenizer):
    """The message of one line with which a source is refused."""
    with pytest.raises(ff.FastforgetError) as caught:
        list(read_source(source, tokenizer, 64))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


FOLDERS = ["saved", "saved_splits", "csv", "json", "parquet"]
FILES = ["one.csv", "one.tsv", "one.json", "list.json", "one.parquet", "saved/data-00000-of-00001.arrow", "one.jsonl"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FOLDERS + FILES)
def test_any_table_gives_the_same_answers_and_no_copy_is_left(places, tokenizer, cache, monkeypatch, name, streaming):
    monkeypatch.chdir(places)
    source = Source(path=name, columns=COLUMNS, streaming=streaming)
    check_source(source, "forget")
    assert labelled_texts(source, tokenizer) == TABLE["answer"]
    first = read_source(source, tokenizer, 64)
    assert list(first) == list(first) == list(read_source(source, tokenizer, 64)), "read anew"
    label = f"{name}:1" if name.endswith(".jsonl") else f"{name}[0]"
    assert next(iter(first)).source == label
    assert not list(cache.rglob("*.arrow")), "the text to be forgotten"


@pytest.mark.parametrize("name", [*FOLDERS, "one.csv", "one.parquet", "one.jsonl"])
def test_a_missing_column_names_those_that_there_are(places, tokenizer, name):
    missing = refusal(Source(path=places / name, columns=COLUMNS | {"response": "reply"}), tokenizer)
    assert "has no column 'reply' for 'response'" in missing and "response=COLUMN" in missing
    assert "its columns are question, answer, number." in missing
    none = refusal(Source(path=places / name), tokenizer)
    assert "needs 'text', or 'prompt' and 'response'" in none and "columns are question, answer, number." in none


@pytest.mark.parametrize("name", ["saved_splits", "csv", "json", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_is_chosen_and_a_missing_one_names_the_splits(places, tokenizer, name, streaming):
    source = Source(path=places / name, columns=COLUMNS, split="test", streaming=streaming)
    assert labelled_texts(source, tokenizer) == TABLE["answer"][:1]
    assert next(iter(read_source(source, tokenizer, 64))).source == f"{places / name}:test[0]"
    missing = refusal(Source(path=places / name, columns=COLUMNS, split="dev", streaming=streaming), tokenizer)
    assert "dev" in missing and "train" in missing and "test" in missing


def test_splits_of_what_has_none(places, tokenizer):
    for path in (places / "saved", datasets.Dataset.from_dict(TABLE)):
        assert "without splits" in refusal(Source(path=path, columns=COLUMNS, split="test"), tokenizer)
    for path in (places / "one.jsonl", ROWS):
        assert "has no split 'test'" in refusal(Source(path=path, columns=COLUMNS, split="test"), tokenizer)
    assert "Available splits: ['train']" in refusal(Source(path=places / "one.csv", split="test"), tokenizer)


def test_a_slice_of_a_split(places, tokenizer):
    source = Source(path=places / "csv", columns=COLUMNS, split="train[1:]")
    assert labelled_texts(source, tokenizer) == ["NA", "007"]


def generated():
    yield from ROWS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        tuple(ROWS),
        datasets.Dataset.from_dict(TABLE),
        datasets.Dataset.from_dict(TABLE).with_format("pandas"),
        datasets.Dataset.from_pandas(pandas.DataFrame(TABLE)),
        datasets.Dataset.from_dict(TABLE).to_iterable_dataset(),
        datasets.IterableDataset.from_generator(generated),  # its columns are not known beforehand
        datasets.DatasetDict(train=datasets.Dataset.from_dict(TABLE)),
    ],
    ids=["list", "tuple", "Dataset", "with_format", "from_pandas", "IterableDataset", "from_generator", "DatasetDict"],
)
def test_rows_in_memory(tokenizer, rows, streaming):
    source = Source(path=rows, columns=COLUMNS, streaming=streaming)
    assert labelled_texts(source, tokenizer) == TABLE["answer"]
    if streaming:
        stream = read_source(source, tokenizer, 64)
        assert list(stream) == list(stream) and stream.head(2) == list(stream)[:2]
    assert "no column 'reply'" in refusal(Source(path=rows, columns=COLUMNS | {"response": "reply"}), tokenizer)


def test_a_list_of_texts_and_a_generator(tokenizer):
    assert labelled_texts(Source(path=["one", "two"], streaming=True), tokenizer) == ["one", "two"]
    assert labelled_texts(Source(path=(text for text in ["one", "two"])), tokenizer) == ["one", "two"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (pandas.DataFrame(TABLE), "from a DataFrame: give a path, .* from_pandas"),
        (b"text", "from a bytes: give a path"),
        (TABLE, "from a dict: give a path, .* from_dict"),
        (None, "from a NoneType"),
        (7, "from a int"),
        ([], "rows holds no text"),
        (["one", 2], r"rows\[1\] is a row of type int"),
        ([b"one"], r"rows\[0\] is a row of type bytes"),
        ([{"text": "one"}, {"text": None}], r"rows\[1\] has a 'text' that is empty .None"),
        (datasets.Dataset.from_dict({"text": []}), "holds no text"),
        (datasets.IterableDataset.from_generator(lambda: (1 / 0 for _ in "a")), "division by zero"),
    ],
)
def test_other_objects_are_refused(tokenizer, path, message):
    with pytest.raises(ff.FastforgetError, match=message):
        list(read_source(Source(path=path), tokenizer, 64))


def test_what_can_be_read_only_once_is_not_streamed():
    with pytest.raises(ff.FastforgetError, match=r"the retain set is streamed from a generator, .* only once"):
        check_source(Source(path=(text for text in "ab"), streaming=True), "retain")


@pytest.mark.parametrize("path", ["owner/name", "squad"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_name_offline(tokenizer, monkeypatch, path, streaming):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = Source(path=path, streaming=streaming)
    check_source(source, "forget")
    message = refusal(source, tokenizer)
    assert message.startswith(f"{path}: no file or folder of that name is here, and from the hub it cannot be had: ")


@pytest.mark.parametrize("name", ["none.txt", "./none", "no such/thing/here", "none.csv.gz", "", "~/no such"])
def test_a_path_that_is_not_there_is_no_hub_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ff.FastforgetError, match="does not exist"):
        check_source(Source(path=name), "forget")
    with pytest.raises(ff.FastforgetError, match="does not exist"):
        check_source(Source(path=tmp_path.relative_to(tmp_path.parent) / "none"), "forget")


def test_options_that_do_not_fit(places, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("words")
    for source, message in [
        (Source(path=text, columns={"text": "body"}), "plain text file and has no columns .--forget-column"),
        (Source(path=places / "one.csv", subset="en"), "one.csv has no subset 'en'"),
        (Source(path=ROWS, columns={"promt": "a"}), r"no field 'promt' .*; did you mean 'prompt'\? The fields are"),
        (Source(path=ROWS, columns={"zz": "a"}), "no field 'zz' to read from a column. The fields are"),
        (Source(path=ROWS, columns={"text": "a", "prompt": "b"}), "columns for prompt and text"),
        (Source(path=ROWS, columns={"text": None}), "column of 'text' must be a name"),
    ]:
        with pytest.raises(ff.FastforgetError, match=message):
            check_source(source, "forget")


def test_without_the_datasets_library_the_extra_is_named(places, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in (places / "csv", places / "one.parquet", places / "saved", "owner/name"):
        with pytest.raises(ff.FastforgetError, match=r'pip install "fastforget\[data\]"'):
            check_source(Source(path=path), "forget")
    assert labelled_texts(Source(path=places / "one.jsonl", columns=COLUMNS), tokenizer) == TABLE["answer"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "folder/a.csv", "folder/a.txt"])
@pytest.mark.parametrize("streaming", [False, True])
def test_windows_files_and_other_encodings(tmp_path, tokenizer, name, streaming):
    lines = ['"text"', '"one\ntwo"', '"three"']
    if "json" in name:
        lines = ['{"text": "one\\ntwo"}', '{"text": "three"}']
    content = "\n".join(lines).encode() + b"\n"
    examples = []
    for number, data in enumerate((content, b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))):
        path = tmp_path / str(number) / name
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        source = Source(path=path.parent if "folder" in name else path, streaming=streaming)
        examples.append([example.input_ids for example in read_source(source, tokenizer, 64)])
    assert examples[0] == examples[1] and len(examples[0]) == (1 if name.endswith(".txt") else 2)
    path.write_bytes(content + content.replace(b"three", b"caf\xe9"))
    assert f"{path} is not UTF-8 (byte {len(content) + content.index(b'three') + 3})" in refusal(source, tokenizer)


def test_csv_cells_are_text_whatever_stands_before_them(tmp_path, tokenizer):
    """`datasets` reads 10,000 rows at once, and would take a column of figures for numbers in each such part."""
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "word\n" * 10_000 + "007\n1e3\nTrue\nnull\n")
    assert labelled_texts(Source(path=path), tokenizer)[-4:] == ["007", "1e3", "True", "null"]


def test_a_folder_of_text_files_is_read_as_each_by_itself(tmp_path, tokenizer):
    text = "".join(f"Line {number}.\n\n" for number in range(50))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(text)
    alone = [example.input_ids for example in read_source(Source(path=tmp_path / "a.txt"), tokenizer, 32)]
    assert [example.input_ids for example in read_source(Source(path=tmp_path), tokenizer, 32)] == 2 * alone


@pytest.mark.parametrize("name", ["a[1].csv", "a*.csv", "folder[1]/a.csv"])
def test_signs_that_would_read_other_files_are_refused(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("text\none\n")
    with pytest.raises(ff.FastforgetError, match="takes for a pattern: rename it"):
        check_source(Source(path=path.parent if "folder" in name else path), "forget")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv: No columns"),
        ("a.csv", "text\n", "holds no text"),
        ("a.csv", "text\na\nb,c\n", "Expected 1 fields in line 3"),
        ("a.json", '[{"text":', "a.json: "),
        ("a.json", '[{"text": 7}]', r"a.json\[0\] has a 'text' that is of type int"),
        ("a.parquet", "text", "a.parquet: .*Parquet"),
        ("a.txt.gz", "text", "is compressed: unpack it first"),
        ("folder/a.xyz", "text", "folder: No .supported. data files"),
        ("folder/state.json", "{}", "folder: .*neither a `Dataset` directory"),
    ],
)
def test_broken_files_and_folders_are_named_in_one_line(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    text = refusal(Source(path=path.parent if "folder" in name else path), tokenizer)
    with pytest.raises(ff.FastforgetError, match=message):
        raise ff.FastforgetError(text)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("max_length", [2, 7, 64])
def test_every_token_of_every_row_is_labelled_once(tmp_path, tokenizer, kind, max_length):
    texts = [f"Row {number} " + "has words. " * (number % 40) for number in range(60)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_rows(path, texts)
    else:
        getattr(pandas.DataFrame({"text": texts}), f"to_{kind}")(path, index=False)
    listed, streamed = (
        list(read_source(Source(path=path, streaming=streaming), tokenizer, max_length)) for streaming in (False, True)
    )
    assert listed == streamed and max(len(example.input_ids) for example in listed) <= max_length
    expected = [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)]
    assert [token for example in listed for token in example.input_ids[1:]] == expected


def test_streamed_rows_take_the_memory_of_a_few(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [f"Row {number}: " + "words " * 50 for number in range(2500)])
    stream = read_source(Source(path=path, streaming=True), tokenizer, 128)
    peak, labels = traced_peak(stream)
    assert labels > 2500 * 50 and path.stat().st_size > 800_000
    assert peak < 400_000
