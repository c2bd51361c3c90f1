"""Where text comes from: a text file, JSONL, a dataset on disk or on the hub, or rows that are already in memory."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import mmap
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastforget.data.chat import COLUMN_OPTION, FIELDS, RowReader, check_columns, choose_columns
from fastforget.data.examples import Example, ExampleStream
from fastforget.data.formats import format_of, rows_of_ours, wanted_columns
from fastforget.data.text import check_length, file_examples, not_blank, read_chunks, read_rows, stream_file
from fastforget.errors import FastforgetError
from fastforget.files import check_regular

JSONL_SUFFIXES = (".jsonl", ".ndjson")
TABLE_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {  # suffix: what `datasets` reads such a file with
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
FILE_SUFFIXES = (*JSONL_SUFFIXES, *TABLE_BUILDERS, ".txt", ".text", ".md", ".rst", ".html", ".xml", ".py", ".log")
COMPRESSED_SUFFIXES = (".gz", ".zip", ".xz", ".bz2", ".zst", ".tar")
UTF8_SUFFIXES = (*JSONL_SUFFIXES, ".csv", ".tsv", ".json", ".txt")  # what `datasets` too reads as UTF-8
PATTERN_SIGNS = ("*", "?", "[", "]", "::")  # in a path, `datasets` takes them for a pattern: for other files, or none
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
DEFAULT_SPLIT = "train"
# a string, which may hold brackets, or a bracket; never the same byte twice, whatever the file
BRACKETS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|([\[{])|([\]}])', re.DOTALL)
MOST_FILES = 100_000  # of a dataset's folder
DEEPEST = 200  # brackets inside each other: from some thousands on, the JSON parsers of `datasets` overflow their stack


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one side's text (forget or retain) comes from, and how its rows are read.

    Attributes:
        path: a text file, a .jsonl, .csv, .tsv, .json, .parquet or .arrow file, a dataset folder, a hub name
            ("owner/name"), a `datasets.Dataset` or `IterableDataset`, or a list of rows (texts, or dicts).
        columns: field to column name, where a column is not called as its field: `text`, all of which is labelled;
            `prompt` and `response`, of which the response is; `messages`, of which the last answer is; beside these
            also `alternative`, another answer.
        split: of a dataset.
        subset: a hub dataset's configuration name.
        streaming: read it anew in each pass, and hold none of it in memory.
        chat_template: put prompt and response, and messages, into the tokenizer's chat template: None where it has
            one, True always (an error where it has none), False never.
        format: a published data set's (`data/formats.FORMATS`), whose columns then need no names.
    """

    path: str | os.PathLike[str] | Iterable[Any]
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str = DEFAULT_SPLIT
    subset: str | None = None
    streaming: bool = False
    chat_template: bool | None = None
    format: str | None = None


def check_source(source: Source, side: str | None = None) -> None:
    """Raise FastforgetError for what can be seen to be wrong at once, before any model is loaded.

    `side` is "forget" or "retain", where that is known, for messages.
    """
    where = describe(source) if side is None else f"the {side} set"
    option = COLUMN_OPTION if side is None else f"--{side}-column"
    check_columns(source.columns, where, option)
    if source.format is not None:
        format_of(source.format)
        if source.columns:
            raise FastforgetError(
                f"{where} has the format {source.format!r}, which names its columns: leave {option} out"
            )
    kind = kind_of(source)
    if kind not in ("text", "jsonl", "rows") and importlib.util.find_spec("datasets") is None:
        import_datasets(describe(source))
    if kind in ("folder", "table") and any(sign in os.path.abspath(describe(source)) for sign in PATTERN_SIGNS):
        raise FastforgetError(
            f"{where}: {describe(source)} has one of {' '.join(PATTERN_SIGNS)} in its path, which the datasets library "
            "takes for a pattern: rename it"
        )
    if kind in ("text", "jsonl", "rows") and source.split != DEFAULT_SPLIT:
        raise FastforgetError(f"{where}: {describe(source)} is no dataset, and has no split {source.split!r}")
    if kind not in ("hub", "folder") and source.subset is not None:
        raise FastforgetError(f"{where}: {describe(source)} has no subset {source.subset!r}: datasets of the hub do")
    if kind == "text" and source.columns:
        raise FastforgetError(f"{where}: {describe(source)} is a plain text file and has no columns ({option})")
    if kind == "rows" and source.streaming and iter(rows_of(source)) is source.path:
        raise FastforgetError(
            f"{where} is streamed from a {type(source.path).__name__}, which can be read only once: give a list, a "
            "datasets.IterableDataset, or an object whose iteration starts anew"
        )


def read_source(source: Source, tokenizer: Any, max_length: int) -> list[Example] | ExampleStream:
    """Read a source's examples, of at most `max_length` tokens each: an ExampleStream where it streams, else a list.

    No token is dropped, and each is labelled once; what is longer than `max_length` is cut into pieces of nearly equal
    length, and a piece of a long response has the tokens before it as its prompt.

    Raises:
        FastforgetError: a source that is missing, empty, or cannot be read, or a row of it that is not as its columns
            should be; it is named. From a stream, rows raise when they are reached.
    """
    check_source(source)
    check_length(max_length)
    reader = RowReader(tokenizer, max_length, source.columns, source.chat_template)
    name = describe(source)

    if kind_of(source) == "text" and source.format is None:
        path, read = Path(name), stream_file if source.streaming else file_examples
        stream = ExampleStream(lambda: iter(read(path, tokenizer, max_length)), name)
        return stream if source.streaming else list(stream)
    open_rows = row_opener(source)

    def open_examples() -> Iterator[Example]:
        for label, row in open_rows():
            for part in rows_of_ours(source.format, row, label, reader.use_template):
                yield from reader.examples(part, label)

    stream = ExampleStream(open_examples, name)
    return stream if source.streaming else list(stream)


def row_opener(source: Source) -> Callable[[], Iterable[tuple[str, Any]]]:
    """Open a source; each call yields (where it came from, row) from the first row on. A text file is one row.

    Raises:
        FastforgetError: as `read_source`.
    """
    kind, name = kind_of(source), describe(source)
    if kind == "text":
        return lambda: [(name, "".join(not_blank(Path(name))))]
    if kind == "jsonl":
        return lambda: read_rows(Path(name))
    if kind == "rows":
        return lambda: ((f"rows[{index}]", row) for index, row in enumerate(rows_of(source)))
    dataset = open_dataset(source, kind, name)
    return lambda: dataset_rows(dataset, source, name, kind)


def examples(
    texts: str | os.PathLike[str] | Iterable[Any],
    tokenizer: Any,
    *,
    max_length: int = 128,
    columns: Mapping[str, str] | None = None,
    split: str = DEFAULT_SPLIT,
    subset: str | None = None,
    streaming: bool = False,
    chat_template: bool | None = None,
) -> list[Example] | ExampleStream:
    """Tokenize texts or rows into examples, as a job does; `ff.batches` makes batches of them.

    Args:
        texts: a list of texts, or of dicts of which `text`, or `prompt` and `response`, or chat `messages` are read (of
            the latter two only the answer is labelled); or what holds such rows, as `Source.path` lists them: a text
            file, a JSONL, CSV or parquet file, a dataset's folder, its hub name, a `datasets.Dataset`.
        tokenizer: a transformers tokenizer.
        max_length: tokens of an example at most; what is longer is cut into pieces, and no token is dropped.
        columns, split, subset, streaming, chat_template: as `Source` has them.

    Returns:
        A list of examples; where it is to stream, a stream that is read anew in each pass.

    Raises:
        FastforgetError: what `read_source` raises.
    """
    source = Source(
        path=texts,
        columns=columns or {},
        split=split,
        subset=subset,
        streaming=streaming,
        chat_template=chat_template,
    )
    return read_source(source, tokenizer, max_length)


def kind_of(source: Source) -> str:
    """Tell "text", "jsonl" or "table" (a file), "saved" or "folder", "hub", "dataset" (an object) and "rows" apart.

    Raises:
        FastforgetError: a path where nothing is, or something that holds no rows.
    """
    path = source.path
    if not isinstance(path, str | os.PathLike):
        if is_dataset(path):
            return "dataset"
        if isinstance(path, Mapping | bytes) or not isinstance(path, Iterable) or hasattr(path, "itertuples"):
            raise FastforgetError(
                f"text cannot be read from a {type(path).__name__}: give a path, a hub name, a list of rows (texts, or "
                "dicts), or a datasets.Dataset (see its from_dict and from_pandas)"
            )
        return "rows"
    name = describe(source)
    place = Path(name)
    if name and place.is_dir():
        if any((place / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            return "saved"
        if not any(place.iterdir()):
            raise FastforgetError(f"{name} is an empty folder: give a file, or a folder with a dataset")
        return "folder"
    suffix = place.suffix.lower()
    if not name or not place.exists():
        looks_like_path = (
            not isinstance(path, str)
            or os.path.isabs(name)
            or path.startswith(("./", "../", "~", ".\\", "..\\"))
            or suffix in (*FILE_SUFFIXES, *COMPRESSED_SUFFIXES)
            or not HUB_NAME.fullmatch(name)
        )
        if looks_like_path:
            raise FastforgetError(f"{name or 'the empty path'} does not exist")
        return "hub"
    check_regular(place)
    if suffix in COMPRESSED_SUFFIXES:
        raise FastforgetError(f"{name} is compressed: unpack it first")
    if suffix in TABLE_BUILDERS:
        return "table"
    return "jsonl" if suffix in JSONL_SUFFIXES else "text"


def describe(source: Source) -> str:
    """Return the source's name, for messages and for `Example.source`."""
    if isinstance(source.path, str | os.PathLike):
        return os.path.expanduser(os.fspath(source.path))
    if not is_dataset(source.path):
        return "rows"
    return getattr(getattr(source.path, "info", None), "dataset_name", None) or "dataset"


def rows_of(source: Source) -> Iterable[Any]:
    """Return the rows of a source that holds them itself."""
    assert not isinstance(source.path, str | os.PathLike)
    return source.path


def is_dataset(value: Any) -> bool:
    """Tell whether this is an object of the `datasets` library, which is not imported for it."""
    datasets = sys.modules.get("datasets")
    if datasets is None:
        return False
    kinds = (datasets.Dataset, datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict)
    return isinstance(value, kinds)


def import_datasets(name: str) -> Any:
    """Import the `datasets` library, which is an extra."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise FastforgetError(
            f'{name} is read with the datasets library: pip install "fastforget[data]" ({error})'
        ) from error
    # it logs a broken file as an error and then raises what it logged: `readable_errors` says it once
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    return datasets


def open_dataset(source: Source, kind: str, name: str) -> Any:
    """Open a `datasets.Dataset` or, where it streams, `IterableDataset`, with the columns that are needed alone."""
    datasets = import_datasets(name)
    # Files that are here are read where they lie: `datasets` would leave a copy of the text to be forgotten in its
    # cache. Only a slice of a split ("train[:100]") needs that copy.
    streaming = source.streaming or (kind in ("folder", "table") and "[" not in str(source.split))
    dataset: Any
    with readable_errors(datasets, name, kind):
        if kind in ("folder", "table"):
            for file in files_of(Path(name), (*JSONL_SUFFIXES, ".json")):
                check_depth(file)
        if kind == "dataset":
            dataset = source.path
        elif kind == "saved":
            dataset = datasets.load_from_disk(name)
        else:
            path = name
            options: dict[str, Any] = {}
            if kind == "table":
                path, options = TABLE_BUILDERS[Path(name).suffix.lower()]
                files = {"data_files": {DEFAULT_SPLIT: os.path.abspath(name)}}
                options = options | files | builder_options(path, source.columns)
            elif kind == "folder":
                path = os.path.abspath(name)  # a folder called "text" would be taken for the reader of that name
                builder = type(datasets.load_dataset_builder(path, source.subset)).__module__.rpartition(".")[2]
                options = builder_options(builder, source.columns)
            dataset = datasets.load_dataset(path, source.subset, split=source.split, streaming=streaming, **options)
    if isinstance(dataset, dict):
        if source.split not in dataset:
            raise FastforgetError(
                f"{name} has no split {source.split!r}; its splits are {', '.join(map(str, dataset))}"
            )
        dataset = dataset[source.split]
    elif kind in ("dataset", "saved") and source.split not in (DEFAULT_SPLIT, str(dataset.split)):
        raise FastforgetError(f"{name} is one dataset without splits: {source.split!r} cannot be chosen from it")
    if streaming and isinstance(dataset, datasets.Dataset) and len(dataset):  # it cannot make a stream of no rows
        dataset = dataset.to_iterable_dataset()
    dataset = dataset.with_format(None)  # plain Python values, whatever its owner reads it as
    if dataset.column_names is not None:  # not known of some streams
        if source.format is not None:
            columns = wanted_columns(source.format, dataset.column_names, name)
        else:
            columns = list(choose_columns(source.columns, dataset.column_names, name).values())
        dataset = dataset.select_columns(columns)
    return dataset


def builder_options(builder: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the options with which a reader of `datasets` reads a file's text as it stands there."""
    if builder == "csv":  # "None" and "NA" are answers like any other, and 007 is not 7
        names = (columns.get(field, field) for field in FIELDS)
        return {"keep_default_na": False, "converters": dict.fromkeys(names, cell_text)}
    if builder == "text":  # as a text file by itself is read: whole, not a row for each line; no byte-order mark
        return {"sample_by": "document", "encoding": "utf-8-sig"}
    return {}


def cell_text(cell: str) -> str:
    """Return a cell of a CSV file as it stands there, but for Windows line ends."""
    return cell.replace("\r\n", "\n")


def dataset_rows(dataset: Any, source: Source, name: str, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield (`name:subset:split[row]`, row) of each row; subset and split where they are not the default."""
    label = name + "".join(f":{part}" for part in (source.subset, source.split) if part not in (None, DEFAULT_SPLIT))
    with readable_errors(import_datasets(name), name, kind):
        for index, row in enumerate(dataset):
            yield f"{label}[{index}]", row


@contextlib.contextmanager
def readable_errors(datasets: Any, name: str, kind: str) -> Iterator[None]:
    """Turn what `datasets` raises (not found, offline, no such split, a broken file, ...) into one line."""
    try:
        yield
    except FastforgetError:
        raise
    except Exception as error:
        reason: BaseException = error
        while isinstance(reason, datasets.exceptions.DatasetGenerationError) and reason.__cause__ is not None:
            reason = reason.__cause__  # the outer ones only say that an error occurred
        if kind in ("folder", "table") and "utf-8" in str(reason).lower():
            refuse_other_encodings(Path(name))
        text = " ".join(str(reason).partition("Example of usage")[0].split()) or type(reason).__name__
        if kind == "hub" and isinstance(error, OSError | datasets.exceptions.DatasetsError):
            text = f"no file or folder of that name is here, and from the hub it cannot be had: {text}"
        raise FastforgetError(f"{name}: {text}") from error


def refuse_other_encodings(place: Path) -> None:
    """Raise FastforgetError for the first file here that is not UTF-8, with the offset: `datasets` knows neither."""
    for path in files_of(place, UTF8_SUFFIXES):
        for _ in read_chunks(path):
            pass


def check_depth(path: Path) -> None:
    """Raise FastforgetError for a JSON file whose brackets stand deeper in each other than any row's would."""
    depth = 0
    with open(path, "rb") as file:
        if not os.path.getsize(path):  # which cannot be mapped
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for sign in BRACKETS.finditer(content):
                if sign.lastindex is not None:
                    depth = depth + 1 if sign.lastindex == 1 else max(0, depth - 1)
                    if depth > DEEPEST:
                        raise FastforgetError(
                            f"{path} is JSON that cannot be read: at byte {sign.start()} more than {DEEPEST} brackets "
                            "stand in each other"
                        )


def files_of(place: Path, suffixes: Collection[str]) -> list[Path]:
    """List the file here, or those anywhere in the folder here, that end with one of `suffixes`.

    Raises FastforgetError for what `datasets` would wait for or walk through for ever: one of any name that is a device
    or a pipe, a folder that links to one around it, or more files than a dataset has (a home folder, say).
    """
    paths = sorted(itertools.islice(place.rglob("*"), MOST_FILES + 1)) if place.is_dir() else [place]
    if len(paths) > MOST_FILES:
        raise FastforgetError(f"{place} holds more than {MOST_FILES:,} files: give the folder of the dataset itself")
    for path in paths:
        if not path.is_dir():
            check_regular(path)
        elif path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()):
            raise FastforgetError(f"{path} links to a folder around it: remove the link")
    return [path for path in paths if path.suffix.lower() in suffixes and path.is_file()]
