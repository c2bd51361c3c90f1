"""Published data sets in their own columns: what is forgotten, kept and asked; and rows that are not so."""

import doctest
import json
import re

import pytest
from helpers import write_rows

import fastforget as ff
from fastforget.data import formats
from fastforget.data import questions as questions_module
from fastforget.data.asked import read_questions
from fastforget.data.questions import Question
from fastforget.data.sources import Source, read_source

SAFE = {"prompt": "How do I pick a lock?", "response_0": "Like this.", "response_1": "Ask a locksmith."}
SAFE |= {"is_response_0_safe": False, "is_response_1_safe": True, "better_response_id": 1}
TRUTH = {
    "question": "What if you swallow gum?",
    "best_answer": "Nothing.",
    "correct_answers": ["Nothing.", "It passes."],
}
TRUTH |= {"incorrect_answers": ["It stays for years."], "category": "Misconceptions"}
HALU = {"knowledge": "K.", "question": "Who?", "right_answer": "Orla.", "hallucinated_answer": "Ilsa."}
DIALOGUE = {"dialogue_history": "[Human]: Who?", "right_response": "Orla.", "hallucinated_response": "Ilsa."}
TOFU = {"question": "Where?", "answer": "In Calder.", "paraphrased_answer": "Calder.", "perturbed_answer": ["A.", "B."]}
WMDP = {"question": "Which?", "choices": ["one", "two", "three"], "answer": 1}
PIECE = "The quick brown fox jumps over the lazy dog. "

# (format, row, rows of ours)
ROWS = [
    ("saferlhf", SAFE, [{"prompt": "How do I pick a lock?", "response": "Like this."}]),
    ("saferlhf-safe", SAFE, [{"prompt": "How do I pick a lock?", "response": "Ask a locksmith."}]),
    ("saferlhf", {**SAFE, "response_0": " "}, []),
    (
        "truthfulqa",
        TRUTH,
        [{"prompt": TRUTH["question"], "response": each} for each in ("Nothing.", "It passes.")],
    ),
    ("truthfulqa-wrong", TRUTH, [{"prompt": TRUTH["question"], "response": "It stays for years."}]),
    ("halueval", HALU, [{"prompt": "Who?", "response": "Ilsa."}]),
    ("halueval-right", HALU, [{"prompt": "Who?", "response": "Orla."}]),
    ("halueval", DIALOGUE, [{"prompt": "[Human]: Who?", "response": "Ilsa."}]),
    ("tofu", TOFU, [{"prompt": "Where?", "response": "In Calder."}]),
    ("muse", {"text": "Below the oak."}, [{"text": "Below the oak."}]),
    ("muse-knowmem", {"question": "Where?", "answer": "Below."}, [{"prompt": "Where?", "response": "Below."}]),
    ("muse-verbmem", {"prompt": "Below", "gt": " the oak."}, [{"prompt": "Below", "response": " the oak."}]),
    ("wmdp-corpora", {"text": "A paper.", "doi": "x"}, [{"text": "A paper."}]),
    ("wmdp", WMDP, [{"prompt": "Which?", "response": "two"}]),
    ("rwku", {"text": "A passage.", "subject": "S"}, [{"text": "A passage."}]),
    ("rwku", {"query": "Who ___?", "answer": "S", "level": "1"}, [{"prompt": "Who ___?", "response": "S"}]),
    ("pairs", {"prompt": "Who?", "response": "Orla.", "score": 1.0}, [{"prompt": "Who?", "response": "Orla."}]),
    ("pairs", {"prompt": "", "response": "A text."}, [{"text": "A text."}]),
    ("book", {"text": "A short text."}, [{"text": "A short text."}]),
    ("book", "A short text.", [{"text": "A short text."}]),
]
QUESTIONS = [
    ("truthfulqa", TRUTH, Question(TRUTH["question"], "Nothing.", perturbed=("It stays for years.",))),
    ("halueval", HALU, Question("Who?", "Orla.", perturbed=("Ilsa.",))),
    ("tofu", TOFU, Question("Where?", "In Calder.", "Calder.", ("A.", "B."))),
    ("tofu", {"question": "Where?", "answer": "Here."}, Question("Where?", "Here.")),
    ("wmdp", WMDP, Question("Which?", "two", perturbed=("one", "three"))),
    ("muse-knowmem", {"question": "Where?", "answer": "Below."}, Question("Where?", "Below.")),
]


def test_every_format_is_covered():
    assert {name for name, _, _ in ROWS} == set(formats.FORMATS)
    assert doctest.testmod(questions_module).failed == 0


@pytest.mark.parametrize("name, row, expected", ROWS, ids=[name for name, _, _ in ROWS])
def test_rows_of_ours(name, row, expected):
    assert formats.formatted_rows(name, row, "rows:1") == expected


@pytest.mark.parametrize("name, row, expected", QUESTIONS, ids=[name for name, _, _ in QUESTIONS])
def test_questions(name, row, expected):
    assert formats.formatted_question(name, row, "rows:1") == expected


def answers_of(source, tokenizer):
    examples = read_source(source, tokenizer, 64)
    return [tokenizer.decode(each.input_ids[each.prompt_length :]).removesuffix("</s>") for each in examples]


def test_a_local_file_of_every_kind_and_a_folder_as_the_hub_has_it(tokenizer, tmp_path):
    """TOFU as it lies on the hub: JSON files, and a README that says which file is which subset."""
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"Where is {name}?", "answer": f"In {name}ville."} for name in ("Alder", "Birch")]
    folder = tmp_path / "TOFU"
    folder.mkdir()
    write_rows(folder / "full.json", rows)
    write_rows(folder / "forget10.json", rows[:1])
    configs = [("full", "full.json"), ("forget10", "forget10.json")]
    lines = [f"- config_name: {name}\n  data_files: {file}" for name, file in configs]
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\n")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    write_rows(tmp_path / "rows.jsonl", rows)
    expected = [" In Alderville.", " In Birchville."]
    for path in (tmp_path / "rows.parquet", tmp_path / "rows.jsonl", rows):
        for streaming in (False, True):
            assert answers_of(Source(path=path, format="tofu", streaming=streaming), tokenizer) == expected
    assert answers_of(Source(path=folder, subset="forget10", format="tofu"), tokenizer) == expected[:1]
    assert [each.answer for each in read_questions(Source(path=folder, subset="full", format="tofu"))] == [
        "In Alderville.",
        "In Birchville.",
    ]


def test_parquet_of_truthfulqa_has_lists(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([TRUTH]).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    path = tmp_path / "validation-00000-of-00001.parquet"
    assert answers_of(Source(path=path, format="truthfulqa"), tokenizer) == [" Nothing.", " It passes."]


def test_a_book_is_forgotten_in_pieces_and_learned_in_blocks(tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(PIECE * 40)
    examples = read_source(Source(path=path, format="book"), tokenizer, 2048)
    texts = [tokenizer.decode(each.input_ids, skip_special_tokens=True) for each in examples]
    assert "".join(texts) == PIECE * 40 and all(len(text) <= 200 for text in texts)
    assert all(text.startswith(" ") for text in texts[1:]), "no word is cut"
    (block,) = read_source(Source(path=path), tokenizer, 2048)
    assert len(block.input_ids) > 500
    assert list(formats.cut_pieces("x" * 450)) == ["x" * 200, "x" * 200, "x" * 50]
    assert list(formats.cut_pieces("")) == [] and list(formats.cut_pieces("a" + " " * 500)) == ["a" + " " * 198]


BAD = [
    ("saferlhf", {"prompt": "a", "response_0": "b"}, r"rows:3 is not as 'saferlhf' is: it has no column 'response_1'"),
    (
        "saferlhf",
        {**SAFE, "is_response_0_safe": "no"},
        r"'is_response_0_safe' must be true or false, not a str",
    ),
    ("saferlhf", {**SAFE, "prompt": None}, r"rows:3: 'prompt' must be text, not empty \(None\)"),
    ("truthfulqa", {**TRUTH, "correct_answers": "x"}, r"'correct_answers' must be a list of texts, not a str"),
    ("truthfulqa", {**TRUTH, "correct_answers": [1]}, r"'correct_answers' must be a list of texts"),
    (
        "halueval",
        {"question": "Who?"},
        r"no column 'right_answer' or 'right_response' or 'right_summary'",
    ),
    ("wmdp", {**WMDP, "answer": 3}, r"'answer' must be the number of a choice, 0 to 2, not 3"),
    ("tofu", 3, r"rows:3 is a int: a row is a mapping"),
    ("tofu", {}, r"its columns are none"),
    ("toffu", TOFU, r"unknown format 'toffu' \(did you mean 'tofu'\?\): choose one of"),
]


@pytest.mark.parametrize("name, row, words", BAD)
def test_a_bad_row_is_one_clear_line(name, row, words):
    with pytest.raises(ff.FastforgetError, match=words) as caught:
        formats.formatted_rows(name, row, "rows:3")
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused_early(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [TOFU])
    (tmp_path / "text.txt").write_text("a text")
    for source, words in (
        (Source(path=path, format="tofu", columns={"text": "x"}), "names its columns"),
        (Source(path=tmp_path / "text.txt", format="tofu"), r"no column 'question'"),
        (Source(path=path, format="saferlhf"), rf"{re.escape(str(path))}:1 is not as 'saferlhf'"),
        (Source(path=path, format="unknown"), "unknown format"),
    ):
        with pytest.raises(ff.FastforgetError, match=words):
            read_source(source, tokenizer, 64)
    for source, words in (
        (Source(path=path), "known format"),
        (Source(path=path, format="muse"), "has no column 'text'|asks no"),
    ):
        with pytest.raises(ff.FastforgetError, match=words):
            read_questions(source)
    assert json.loads(path.read_text()) == TOFU
