"""The user's own text: plain files, and JSONL with `text` or with `prompt` and `response`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastforget.data.examples import Example
from fastforget.errors import FastforgetError

JSONL_SUFFIXES = (".jsonl", ".ndjson")


def read_examples(path: str | os.PathLike[str], tokenizer: Any, max_length: int) -> list[Example]:
    """Read a file into examples of at most `max_length` tokens; no token of it is dropped, and each is labelled once.

    A `.jsonl` file holds one object a line: `text`, all of which is labelled, or `prompt` and `response`, of which the
    response is (the two are joined as they stand). Any other file is one plain text. What is longer than `max_length`
    is cut into pieces of nearly equal length; a piece of a long response has the tokens before it as its prompt.

    Raises:
        FastforgetError: a missing, empty or undecodable file, or a line that is not as above; it is named.
    """
    path = Path(path)
    text = read_text(path)
    examples: list[Example] = []
    if path.suffix.lower() in JSONL_SUFFIXES:
        for number, row in read_rows(path, text):
            examples += row_examples(row, tokenizer, max_length, f"{path}:{number}")
    else:
        examples = text_examples(text, tokenizer, max_length, str(path))
    examples = [example for example in examples if example.label_count > 0]
    if not examples:
        raise FastforgetError(f"{path} holds no text that could be learned or forgotten")
    return examples


def read_text(path: Path) -> str:
    """The file as text, without a byte-order mark, line ends as \\n."""
    if path.is_dir():
        raise FastforgetError(f"{path} is a folder: give a text file, or a .jsonl file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FastforgetError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise FastforgetError(f"{path} is not UTF-8 (byte {error.start}): convert it, e.g. with iconv") from None
    except OSError as error:
        raise FastforgetError(f"{path} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise FastforgetError(f"{path} is empty")
    return text


def read_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise FastforgetError(f"{path}:{number} is not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError):  # a number of thousands of digits, brackets thousands deep
            raise FastforgetError(
                f"{path}:{number} is JSON that cannot be read: too large a number or too deep"
            ) from None
        if not isinstance(row, dict):
            raise FastforgetError(f"{path}:{number} is not a JSON object with 'text', or 'prompt' and 'response'")
        yield number, row


def row_examples(row: dict[str, Any], tokenizer: Any, max_length: int, source: str) -> list[Example]:
    """The examples of one line."""
    fields = ("text",) if "text" in row else ("prompt", "response")
    for field in fields:
        if not isinstance(row.get(field), str):
            raise FastforgetError(
                f"{source} needs 'text', or 'prompt' and 'response', as strings; it has {sorted(row)}"
            )
    if fields == ("text",):
        return text_examples(row["text"], tokenizer, max_length, source)
    start = begin_tokens(tokenizer)
    prompt = start + tokenizer.encode(row["prompt"], add_special_tokens=False)
    response = tokenizer.encode(row["response"], add_special_tokens=False)
    if not response:
        raise FastforgetError(f"{source} has an empty response: there is nothing to label")
    if tokenizer.eos_token_id is not None:
        response.append(tokenizer.eos_token_id)
    whole = prompt + response
    context = min(max(len(prompt), 1), max_length // 2)
    examples = []
    for begin, end in pieces(len(response), max_length - context):
        first = max(0, len(prompt) + begin - context)
        ids = whole[first : len(prompt) + end]
        if first > 0 and start:
            ids[: len(start)] = start  # a sequence begins as the model knows it
        examples.append(Example(tuple(ids), prompt_length=len(ids) - (end - begin), source=source))
    return examples


def text_examples(text: str, tokenizer: Any, max_length: int, source: str) -> list[Example]:
    """A plain text in pieces of nearly equal length."""
    start = begin_tokens(tokenizer)
    # verbose=False: a whole file is longer than the model's context, and is cut below
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if start:
        cuts = pieces(len(ids), max_length - len(start))
        return [Example((*start, *ids[begin:end]), source=source) for begin, end in cuts]
    # nothing stands before a piece's first token, so it would never be predicted: the token before it comes along
    cuts = pieces(len(ids), max_length - 1)
    return [Example(tuple(ids[max(0, begin - 1) : end]), min(begin, 1), source) for begin, end in cuts]


def begin_tokens(tokenizer: Any) -> list[int]:
    """The tokens with which this tokenizer begins a sequence: its beginning-of-sequence token, or none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []


def pieces(length: int, longest: int) -> list[tuple[int, int]]:
    """Cut `length` tokens into the fewest pieces of at most `longest`, as equal as can be: no short tail."""
    count = -(-length // longest)
    bounds = [round(index * length / count) for index in range(count + 1)] if count else [0]
    return list(pairwise(bounds))
