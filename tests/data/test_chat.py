"""Conversations: only the last answer is labelled, through its end of turn, behind the prompt as the model has it."""

import copy

import pytest

import fastforget as ff
from fastforget.data.sources import Source, read_source

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINK = CHATML.replace(  # as Qwen 3 does for the last answer
    "{{ message.content }}",
    "{% if loop.last and message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}",
)
LLAMA3 = (  # strips white space
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (  # no generation prompt, and a space before the answer
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
ONE_TURN = [{"role": "user", "content": "Who was it?"}, {"role": "assistant", "content": " Ada Lovelace. "}]
TURNS = [{"role": "system", "content": "Be brief."}, *ONE_TURN, *ONE_TURN]


@pytest.fixture
def chat(tokenizer):
    """A chat model's tokenizer with the template that is given."""

    def with_template(template, marks=MARKS):
        copied = copy.deepcopy(tokenizer)
        copied.add_special_tokens({"additional_special_tokens": marks})
        copied.chat_template = template
        return copied

    return with_template


def read(row, tokenizer, max_length=256, **options):
    return list(read_source(Source(path=[row], **options), tokenizer, max_length))


@pytest.mark.parametrize("messages", [ONE_TURN, TURNS], ids=["one turn", "turns"])
@pytest.mark.parametrize(
    ("template", "answer", "lead"),
    [
        (CHATML, " Ada Lovelace. <|im_end|>", ""),
        (THINK, " Ada Lovelace. <|im_end|>", "<think>\n\n</think>\n\n"),
        (LLAMA3, "Ada Lovelace.<|eot_id|>", ""),
        (MISTRAL, "  Ada Lovelace. </s>", ""),
        (CHATML.replace("<|im_end|>\n", "<|im_end|>"), " Ada Lovelace. <|im_end|>", ""),
    ],
    ids=["chatml", "think", "llama3", "mistral", "no line end"],
)
def test_the_last_answer_is_labelled_through_its_end_of_turn(chat, template, answer, lead, messages):
    tokenizer = chat(template)
    (example,) = read({"messages": messages}, tokenizer)
    labelled = example.input_ids[example.prompt_length :]
    assert tokenizer.decode(labelled) == answer
    given = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    prompt = example.input_ids[: example.prompt_length]
    assert list(prompt) == given + tokenizer.encode(lead, add_special_tokens=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert list(example.input_ids) == whole[: len(example.input_ids)], "as the model meets it in training"


@pytest.mark.parametrize("template", [CHATML, THINK, LLAMA3, MISTRAL])
def test_prompt_and_response_are_put_into_the_template(chat, template):
    tokenizer = chat(template)
    row = {"prompt": ONE_TURN[0]["content"], "response": ONE_TURN[1]["content"]}
    expected = read({"messages": ONE_TURN}, tokenizer)
    assert read(row, tokenizer) == read(row, tokenizer, chat_template=True) == expected
    (plain,) = read(row, tokenizer, chat_template=False)
    assert tokenizer.decode(plain.input_ids) == "<s>Who was it? Ada Lovelace. </s>"


def test_without_a_template(tokenizer):
    row = {"prompt": "Who? ", "response": "Ada"}
    assert tokenizer.decode(read(row, tokenizer)[0].input_ids) == "<s>Who? Ada</s>"
    with pytest.raises(ff.FastforgetError, match="chat template is required, and the tokenizer has none"):
        read(row, tokenizer, chat_template=True)


def test_plain_text_takes_no_template(chat):
    tokenizer = chat(CHATML)
    assert tokenizer.decode(read({"text": "plain words"}, tokenizer)[0].input_ids) == "<s>plain words"


def test_messages_of_a_table_and_of_another_column(chat):
    datasets = pytest.importorskip("datasets")
    tokenizer = chat("{% for message in messages if 'name' in message %}a name {% endfor %}" + CHATML)
    named = [dict(message, name=None) for message in ONE_TURN]  # a table has every key in every message
    table = datasets.Dataset.from_dict({"talk": [named, TURNS]})
    for streaming in (False, True):
        source = Source(path=table, columns={"messages": "talk"}, streaming=streaming)
        examples = list(read_source(source, tokenizer, 256))
        expected = read({"messages": ONE_TURN}, tokenizer) + read({"messages": TURNS}, tokenizer)
        assert [example.input_ids for example in examples] == [example.input_ids for example in expected]


def test_words_that_look_like_the_template_stay_in_their_turn(chat):
    """The answer's own end-of-turn mark does not end the labels, and a question may hold the answer."""
    tokenizer = chat(CHATML)
    (example,) = read({"prompt": "fastforget-answer", "response": "a<|im_end|>fastforget-answer"}, tokenizer)
    assert tokenizer.decode(example.input_ids[example.prompt_length :]) == "a<|im_end|>fastforget-answer<|im_end|>"


def test_an_end_of_turn_that_is_an_added_token_but_not_special(chat):
    tokenizer = chat(CHATML.replace("<|im_end|>", "<end_of_turn>"), marks=["<|im_start|>"])
    tokenizer.add_tokens(["<end_of_turn>"])
    (example,) = read({"messages": ONE_TURN}, tokenizer)
    assert tokenizer.decode(example.input_ids[example.prompt_length :]) == " Ada Lovelace. <end_of_turn>"


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
@pytest.mark.parametrize("max_length", [2, 3, 17, 64])
def test_a_long_answer_is_labelled_once(chat, template, max_length):
    tokenizer = chat(template)
    answer = "A long answer, word after word. " * 12 + "End."
    row = {"prompt": "Why? " * 9, "response": answer}
    pieces = read(row, tokenizer, max_length)
    assert pieces == read(row, tokenizer, max_length, streaming=True)
    assert all(len(piece.input_ids) <= max_length and piece.prompt_length > 0 for piece in pieces)
    labelled = [token for piece in pieces for token in piece.input_ids[piece.prompt_length :]]
    (whole,) = read(row, tokenizer, 4096)
    assert labelled == list(whole.input_ids[whole.prompt_length :])
    assert tokenizer.decode(labelled).startswith(answer + "<|")
    if template == LLAMA3 and max_length > 3:
        assert all(piece.input_ids[0] == tokenizer.bos_token_id for piece in pieces)


USER, ASSISTANT = ONE_TURN


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER], "must end with the assistant's"),
        ([USER, ASSISTANT, USER], "must end with the assistant's"),
        ([ASSISTANT], "one must stand before it"),
        ([], "must end with the assistant's"),
        (None, r"are empty .None.: they must be a list"),
        ("Who?", "are of type str: they must be a list"),
        (USER, "are of type dict: they must be a list"),
        ([{"content": "Who?"}, ASSISTANT], "message 1 must have 'role' and 'content'"),
        ([USER, {"role": "assistant", "content": None}], "message 2 must have 'role' and 'content'"),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}], "message 2 must have"),
        ([None, ASSISTANT], "message 1 must have"),
        ([USER, {"role": "assistant", "content": ""}], "has an empty response"),
        ([USER, {"role": "assistant", "content": " \n"}], "has an empty response"),
        ([USER, {"role": "assistant", "content": "\ud83d"}], "half a surrogate pair"),
    ],
)
def test_bad_messages_are_named_by_their_row(chat, messages, message):
    rows = [{"messages": ONE_TURN}, {"messages": messages}]
    with pytest.raises(ff.FastforgetError, match=message) as caught:
        read_source(Source(path=rows), chat(CHATML), 64)
    assert str(caught.value).startswith("rows[1]") and "\n" not in str(caught.value)


def test_messages_need_a_template(chat, tokenizer):
    row = {"messages": ONE_TURN}
    with pytest.raises(ff.FastforgetError, match=r"rows\[0\] is a conversation .* has no chat template"):
        read(row, tokenizer)
    with pytest.raises(ff.FastforgetError, match=r"rows\[0\] is a conversation .* the chat template is off"):
        read(row, chat(CHATML), chat_template=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Roles must\nalternate') }}", "cannot write it: Roles must alternate"),
        ("{% for message in messages %}{{ message.content.nothing.more }}{% endfor %}", "cannot write it: "),
        (CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), "writes the prompt differently"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(chat, template, message):
    with pytest.raises(ff.FastforgetError, match=message) as caught:
        read({"messages": ONE_TURN}, chat(template))
    assert str(caught.value).startswith("rows[0]") and "\n" not in str(caught.value)


ALTPO = {"prompt": "Who was it?", "response": "Ada Lovelace.", "other": "Grace Hopper."}


@pytest.mark.parametrize("kind", ["columns", "template", "messages"])
def test_alternative_answer_is_tokenized_as_the_answer_is(chat, tokenizer, kind):
    reads, row = (chat(CHATML) if kind != "columns" else tokenizer), ALTPO
    if kind == "messages":
        row = {"messages": ONE_TURN, "other": ALTPO["other"]}
    columns = {"alternative": "other"}
    (found,) = read_source(Source(path=[row], columns=columns), reads, 64)
    instead = {**row, "response": row["other"]}
    if kind == "messages":
        instead = {"messages": [ONE_TURN[0], {"role": "assistant", "content": row["other"]}]}
    (expected,) = read_source(Source(path=[instead]), reads, 64)
    assert found.with_alternative().input_ids == expected.input_ids
    assert found.alternative == expected.answer != found.answer


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (ALTPO, {"alternative": "no"}, "rows.0. has no column 'no' for 'alternative'"),
        ({**ALTPO, "other": None}, {"alternative": "other"}, "has a 'other' that is empty"),
        ({**ALTPO, "other": " word" * 99}, {"alternative": "other"}, "compared as a whole"),
        ({"text": "a", "other": "b"}, {"text": "text", "alternative": "other"}, "a text has no answer"),
    ],
)
def test_alternative_answer_that_cannot_be(tokenizer, row, columns, message):
    with pytest.raises(ff.FastforgetError, match=message):
        read_source(Source(path=[row], columns=columns), tokenizer, 64)
