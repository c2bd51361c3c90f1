"""Rows into examples: which columns hold what, and conversations as a tokenizer's chat template writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from fastforget.data.examples import Example
from fastforget.data.text import answer_examples, begin_tokens, encode, text_examples
from fastforget.errors import FastforgetError

ROW_FIELDS = (("text",), ("prompt", "response"), ("messages",))  # a row is one of these; the first that it can be
ALTERNATIVE = "alternative"  # to the answer of a row: optional, and read only where its column is named
FIELDS = (*(field for fields in ROW_FIELDS for field in fields), ALTERNATIVE)
COLUMN_OPTION = "--forget-column/--retain-column"
PLACEHOLDER = "fastforget-answer"  # stands for an answer, to see what a template puts around it


def check_columns(columns: Mapping[str, str], where: str, option: str = COLUMN_OPTION) -> None:
    """Raise where a column is given for a field that does not exist, or for fields of two kinds of rows."""
    if not isinstance(columns, Mapping):
        raise FastforgetError(f"{where}: columns must be a dict, field to column, not {columns!r}")
    for field, column in columns.items():
        if field not in FIELDS:
            near = get_close_matches(str(field), FIELDS, n=1, cutoff=0.4)
            raise FastforgetError(
                f"{where} has no field {field!r} to read from a column"
                + (f"; did you mean {near[0]!r}?" if near else ".")
                + f" The fields are {', '.join(FIELDS)} ({option} FIELD=COLUMN)"
            )
        if not isinstance(column, str) or not column:
            raise FastforgetError(f"{where}: the column of {field!r} must be a name, not {column!r}")
    if sum(any(field in columns for field in fields) for fields in ROW_FIELDS) > 1:
        raise FastforgetError(
            f"{where} has columns for {' and '.join(sorted(columns))}: a row is 'text', or 'prompt' and 'response', "
            "or 'messages'"
        )
    if "text" in columns and ALTERNATIVE in columns:
        raise FastforgetError(f"{where} has a column of alternative answers, and a text has no answer")


def choose_columns(columns: Mapping[str, str], present: Iterable[str], where: str) -> dict[str, str]:
    """Map field to column, for rows with the columns `present`: as `columns` says, else by the fields' names."""
    names = [str(name) for name in present]
    given = [fields for fields in ROW_FIELDS if any(field in columns for field in fields)]
    complete = [fields for fields in ROW_FIELDS if all(field in names for field in fields)]
    begun = [fields for fields in ROW_FIELDS if any(field in names for field in fields)]
    fields = next(iter(given + complete + begun), None)
    if fields is None:
        raise FastforgetError(
            f"{where} needs 'text', or 'prompt' and 'response', or 'messages'; its columns are {name_list(names)}. "
            f"Name yours with {COLUMN_OPTION} FIELD=COLUMN"
        )
    if ALTERNATIVE in columns and fields != ("text",):
        fields = (*fields, ALTERNATIVE)
    chosen = {field: columns.get(field, field) for field in fields}
    for field, column in chosen.items():
        if column not in names:
            raise FastforgetError(
                f"{where} has no column {column!r}"
                + (f" for {field!r}" if field != column else "")
                + f"; its columns are {name_list(names)}. "
                f"Name yours with {COLUMN_OPTION} {field}=COLUMN"
            )
    return chosen


def name_list(names: Sequence[str]) -> str:
    """Join names for a message; the first twenty of them."""
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "none"


class RowReader:
    """Turns rows (a text, or a mapping of columns) into examples of at most `max_length` tokens.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: tokens of an example; longer texts and responses are cut into pieces, never dropped.
        columns: field to column name.
        chat_template: whether prompt and response are put into the tokenizer's chat template: None where it has one,
            True always (FastforgetError where it has none), False never.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        columns: Mapping[str, str] | None = None,
        chat_template: bool | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.columns = dict(columns or {})
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.use_template = self.has_template if chat_template is None else chat_template
        if self.use_template and not self.has_template:
            raise FastforgetError(
                "a chat template is required, and the tokenizer has none: take a chat model's tokenizer, set its "
                "chat_template, or do without (prompt and response are then joined as they stand)"
            )

    def examples(self, row: Any, source: str) -> list[Example]:
        """Make the examples of one row; `source` names it in messages.

        Raises:
            FastforgetError: a row without the columns, or with values that are no text or no conversation.
        """
        if isinstance(row, str):
            if self.columns:
                raise FastforgetError(f"{source} is a text and has no columns, but {self.columns} were given")
            return text_examples(row, self.tokenizer, self.max_length, source)
        if not isinstance(row, Mapping):
            raise FastforgetError(
                f"{source} is a row of type {type(row).__name__}: rows are texts, or dicts of columns"
            )
        chosen = choose_columns(self.columns, row, source)
        for field, column in chosen.items():
            if field != "messages" and not isinstance(row[column], str):
                kind = "empty (None)" if row[column] is None else f"of type {type(row[column]).__name__}"
                raise FastforgetError(f"{source} has a {column!r} that is {kind}: it must be text")
        if "text" in chosen:
            return text_examples(row[chosen["text"]], self.tokenizer, self.max_length, source)
        messages = check_messages(row[chosen["messages"]], source) if "messages" in chosen else None
        prompt, response = ("", "") if messages else (row[chosen["prompt"]], row[chosen["response"]])
        if messages is None and self.use_template:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]

        def answered(response: str, source: str) -> list[Example]:
            if messages is None:
                return self.prompt_and_response(prompt, response, source)
            return self.conversation([*messages[:-1], {**messages[-1], "content": response}], source)

        made = answered(messages[-1]["content"] if messages else response, source)
        if ALTERNATIVE not in chosen:
            return made
        others = answered(row[chosen[ALTERNATIVE]], f"{source}, alternative answer")
        if len(made) > 1 or len(others) > 1:
            raise FastforgetError(
                f"{source} is longer than {self.max_length} tokens, and an answer that has an alternative is compared "
                "as a whole: give a larger maximum length"
            )
        return [replace(made[0], alternative=others[0].answer)]

    def prompt_and_response(self, prompt: str, response: str, source: str) -> list[Example]:
        """Make examples of the two joined as they stand, and the end-of-sequence token; the response is labelled."""
        start = begin_tokens(self.tokenizer)
        answer = encode(self.tokenizer, response, source)
        if not answer:
            raise FastforgetError(f"{source} has an empty response: there is nothing to label")
        if self.tokenizer.eos_token_id is not None:
            answer.append(self.tokenizer.eos_token_id)
        context = start + encode(self.tokenizer, prompt, source)
        return answer_examples(context, answer, start, self.max_length, source)

    def conversation(self, messages: list[dict[str, Any]], source: str) -> list[Example]:
        """Make examples of a conversation, whose last answer is labelled, up to and with its end-of-turn token.

        Prompt and answer are tokenized as one where the prompt keeps its tokens by that; else each by itself, as the
        model meets them when it is asked.
        """
        if not self.use_template:
            raise FastforgetError(
                f"{source} is a conversation ('messages'), "
                + (
                    "and the tokenizer has no chat template"
                    if not self.has_template
                    else "but the chat template is off"
                )
                + ": give prompt and response columns, or take a chat model's tokenizer with its template"
            )
        if not messages[-1]["content"].strip():
            raise FastforgetError(f"{source} has an empty response: there is nothing to label")
        prompt, answer = self.render_answer(messages, source)
        # the template writes the special tokens itself
        context = encode(self.tokenizer, prompt, source)
        whole = encode(self.tokenizer, prompt + answer, source)
        if whole[: len(context)] == context:
            labelled = whole[len(context) :]
        else:
            labelled = encode(self.tokenizer, answer, source)
        bos = self.tokenizer.bos_token_id
        start = context[:1] if bos is not None and context[:1] == [bos] else []
        return answer_examples(context, labelled, start, self.max_length, source)

    def render_answer(self, messages: list[dict[str, Any]], source: str) -> tuple[str, str]:
        """Return what stands before the last answer, and the answer up to and with its end-of-turn token, as text."""
        prompt = self.render(messages[:-1], source, add_generation_prompt=True)
        whole = self.render(messages, source)
        if not whole.startswith(prompt):
            raise FastforgetError(
                f"{source}: the tokenizer's chat template writes the prompt differently once the answer follows, so "
                "the two cannot be separated; use another template, or none (then prompt and response columns only)"
            )
        blank = [*messages[:-1], {**messages[-1], "content": PLACEHOLDER}]
        before, _, after = self.render(blank, source).rpartition(PLACEHOLDER)
        answer = whole[len(prompt) :]
        if answer.endswith(after):
            answer = answer[: len(answer) - len(after)] + self.through_end_of_turn(after)
        lead = before.removeprefix(prompt)
        if len(lead) < len(before) and lead.strip() and answer.startswith(lead):
            # such as an empty <think></think>: the template's words, not the answer's. White space stays with the
            # answer, since many tokenizers make a space part of the word after it.
            prompt, answer = before, answer.removeprefix(lead)
        return prompt, answer

    def render(self, messages: list[dict[str, Any]], source: str, add_generation_prompt: bool = False) -> str:
        """Write the conversation as the chat template does."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # a template is a program: it raises what it likes (no system role, odd turns, ...)
            text = " ".join(str(error).split())
            raise FastforgetError(f"{source}: the tokenizer's chat template cannot write it: {text}") from error

    def through_end_of_turn(self, text: str) -> str:
        """Cut what a template puts behind an answer after the first token that is more than text, if there is one."""
        ends = ((text.find(token), -len(token)) for token in self.added_tokens if token in text)
        first = min(ends, default=None)
        return text if first is None else text[: first[0] - first[1]]

    @cached_property
    def added_tokens(self) -> list[str]:
        """List the tokenizer's special tokens, and others that were added to it (some end a turn with such a one)."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        names = {str(token) for token in added} | set(self.tokenizer.all_special_tokens)
        return [name for name in names if name.strip()]


def check_messages(value: Any, source: str) -> list[dict[str, Any]]:
    """Return a conversation's messages; keys without a value (as tables have them) are left out."""
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        kind = "empty (None)" if value is None else f"of type {type(value).__name__}"
        raise FastforgetError(f"{source} has 'messages' that are {kind}: they must be a list of {{role, content}}")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise FastforgetError(f"{source}: message {number} must have 'role' and 'content', both text")
        messages.append({key: part for key, part in message.items() if part is not None})
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise FastforgetError(f"{source}: messages must end with the assistant's, and one must stand before it")
    return messages
