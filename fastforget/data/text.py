"""Text into examples: files read block by block, and token sequences cut to the length that a model takes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastforget.data.examples import Example
from fastforget.errors import FastforgetError
from fastforget.files import open_text

LONGEST_LINE = 1 << 26  # characters: a file without line ends would be in memory as one row
BLOCK_CHARACTERS = 1 << 16  # tokenized at once: a tokenizer takes some hundred bytes a token while it works


def read_chunks(path: Path) -> Iterator[str]:
    """Read a file's text in chunks; raise as `open_text` does."""
    with open_text(path) as file:
        while chunk := file.read(BLOCK_CHARACTERS):
            yield chunk


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`path:line`, object) of each line of a JSONL file that is not blank; one is in memory at a time."""
    empty = True
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        empty = False
        source = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise FastforgetError(f"{source} is not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError):  # a number of thousands of digits, brackets thousands deep
            raise FastforgetError(f"{source} is JSON that cannot be read: too large a number or too deep") from None
        if not isinstance(row, dict):
            raise FastforgetError(f"{source} is not a JSON object with 'text', or 'prompt' and 'response'")
        yield source, row
    if empty:
        raise FastforgetError(f"{path} is empty")


def read_lines(path: Path) -> Iterator[str]:
    """Yield a file's lines, without their ends. (U+2028 ends none: JSON strings may hold it as it is.)"""
    with open_text(path) as file:
        for number in itertools.count(1):
            line = file.readline(LONGEST_LINE)
            if len(line) == LONGEST_LINE:
                raise FastforgetError(f"{path}:{number} is longer than {LONGEST_LINE:,} characters: a row is one line")
            if not line:
                return
            yield line.removesuffix("\n")


def text_examples(text: str, tokenizer: Any, max_length: int, source: str) -> list[Example]:
    """Cut a plain text into pieces of nearly equal length; every token once, all labelled."""
    return cut_text(text_ids(chunks_of(text), tokenizer, source), tokenizer, max_length, source)


def file_examples(path: Path, tokenizer: Any, max_length: int) -> list[Example]:
    """Cut a text file as `text_examples` does; all its tokens are in memory at once, the text itself never is."""
    return cut_text(text_ids(not_blank(path), tokenizer, str(path)), tokenizer, max_length, str(path))


def cut_text(blocks: Iterable[list[int]], tokenizer: Any, max_length: int, source: str) -> list[Example]:
    """Cut all tokens of a text into pieces of nearly equal length."""
    longest = longest_piece(tokenizer, max_length)
    ids = [token for block in blocks for token in block]
    start = begin_tokens(tokenizer)
    return [text_piece(ids, begin, end, start, source) for begin, end in pieces(len(ids), longest)]


def stream_file(path: Path, tokenizer: Any, max_length: int) -> Iterator[Example]:
    """Yield a text file's examples, one after the other; only a block of it is in memory.

    The same tokens as `file_examples`, each once, but in pieces of the full length, as it is not known beforehand how
    many there are; only the last two are evened out.
    """
    longest = longest_piece(tokenizer, max_length)
    start = begin_tokens(tokenizer)
    ids: list[int] = []  # those not yet given out, after the one before them
    done = 0  # 1 where ids[0] was given out already, and is there as context only
    for block in text_ids(not_blank(path), tokenizer, str(path)):
        ids += block
        begin = done
        while len(ids) - begin > 2 * longest:
            yield text_piece(ids, begin, begin + longest, start, str(path))
            begin += longest
        done = min(begin, 1)
        del ids[: begin - done]
    for begin, end in pieces(len(ids) - done, longest):
        yield text_piece(ids, begin + done, end + done, start, str(path))


def text_piece(ids: list[int], begin: int, end: int, start: list[int], source: str) -> Example:
    """Make an example of tokens `begin` to `end`, all labelled, after `start` or, without it, the token before them.

    (Nothing stands before the first token of a sequence, so that one would never be predicted.)
    """
    if start:
        return Example((*start, *ids[begin:end]), source=source)
    return Example(tuple(ids[max(0, begin - 1) : end]), min(begin, 1), source)


def longest_piece(tokenizer: Any, max_length: int) -> int:
    """Count the tokens of a text that fit in an example: one place is the beginning's, or the token's before."""
    check_length(max_length)
    return max_length - max(len(begin_tokens(tokenizer)), 1)


def check_length(max_length: int) -> None:
    """Raise where an example could hold no token with one before it."""
    if max_length < 2:
        raise FastforgetError(f"max_length must be at least 2 tokens, not {max_length}: the first is never predicted")


def answer_examples(
    prompt: list[int], response: list[int], start: list[int], max_length: int, source: str
) -> list[Example]:
    """Join a prompt and its labelled response; cut a long one into pieces, each with the tokens before it as prompt.

    `start` are the tokens with which `prompt` begins and with which a later piece begins too: a sequence begins as the
    model knows it.
    """
    check_length(max_length)
    whole = prompt + response
    context = min(max(len(prompt), 1), max_length // 2)
    examples = []
    for begin, end in pieces(len(response), max_length - context):
        first = max(0, len(prompt) + begin - context)
        ids = whole[first : len(prompt) + end]
        if first > 0 and start:
            ids[: len(start)] = start
        examples.append(Example(tuple(ids), prompt_length=len(ids) - (end - begin), source=source))
    return examples


def begin_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens with which this tokenizer begins a sequence: its beginning-of-sequence token, or none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []


def pieces(length: int, longest: int) -> list[tuple[int, int]]:
    """Cut `length` tokens into the fewest pieces of at most `longest`, as equal as can be: no short tail."""
    count = -(-length // longest)
    bounds = [round(index * length / count) for index in range(count + 1)] if count else [0]
    return list(pairwise(bounds))


def not_blank(path: Path) -> Iterator[str]:
    """Yield a file's chunks; raise FastforgetError at its end where all of it was white space."""
    blank = True
    for chunk in read_chunks(path):
        blank = blank and not chunk.strip()
        yield chunk
    if blank:
        raise FastforgetError(f"{path} is empty")


def chunks_of(text: str) -> Iterator[str]:
    """Yield a text in chunks, as a file gives them."""
    return (text[start : start + BLOCK_CHARACTERS] for start in range(0, len(text), BLOCK_CHARACTERS))


def text_ids(chunks: Iterable[str], tokenizer: Any, source: str) -> Iterator[list[int]]:
    """Yield the tokens of each block of a text, without special tokens."""
    for block in text_blocks(chunks):
        yield encode(tokenizer, block, source)


def encode(tokenizer: Any, text: str, source: str) -> list[int]:
    """Return a text's tokens as they stand, without special tokens around them."""
    try:
        # verbose=False: what is longer than the model's context is cut afterwards
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    except (UnicodeEncodeError, TypeError):  # tokenizers raise a TypeError for it
        raise FastforgetError(
            f"{source} holds half a surrogate pair (such as \\ud83d), which is no character"
        ) from None


def text_blocks(chunks: Iterable[str]) -> Iterator[str]:
    """Yield blocks of at most BLOCK_CHARACTERS, cut where tokens most likely end; joined they are the text."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) > BLOCK_CHARACTERS:
            cut = cut_point(rest, BLOCK_CHARACTERS)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def cut_point(text: str, longest: int) -> int:
    """Choose where to cut a text that is longer than `longest`: at a line end, else at white space, else at `longest`.

    Behind the last line end with no white space after it, since tokenizers join runs of white space; and before a
    space, since many make it part of the word after it.
    """
    last = line_end = text.rfind("\n", 0, longest)
    while line_end >= 0 and text[line_end + 1].isspace():
        line_end = text.rfind("\n", 0, line_end)
    if max(line_end, last) >= 0:
        return (line_end if line_end >= 0 else last) + 1
    return next((index for index in range(longest - 1, 0, -1) if text[index].isspace()), longest)
