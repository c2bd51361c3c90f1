"""`fastforget select`: what is chosen and left out, going on after an interruption, and what is refused."""

import json
import re

import pytest
from helpers import write_rows

import fastforget as ff
from fastforget.evaluate.evaluators import Dialogue
from fastforget.jobs.select import select

ROWS = [{"prompt": f"Question {number}?", "response": "bad " * (number % 4)} for number in range(1, 11)]
SAFE = [
    {
        "prompt": "P",
        "response_0": "good",
        "response_1": "bad bad bad",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
    }
]


def badness(dialogues):
    """Score by how often "bad" is said."""
    return [min(each.response.count("bad") / 3, 1.0) for each in dialogues]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_scores_enough_is_chosen_and_the_rest_is_kept_too(tmp_path):
    out = tmp_path / "forget.jsonl"
    found = select(ROWS, badness, out, threshold=0.5, quiet=True)
    chosen, left = read(out), read(tmp_path / "forget.left-out.jsonl")
    assert found["chosen"] == len(chosen) == 5 and found["left_out"] == len(left) == 5
    assert [row["score"] for row in chosen] == [row["response"].count("bad") / 3 for row in chosen]
    assert chosen[0] == {"prompt": "Question 2?", "response": "bad bad ", "source": "rows[1]", "score": 2 / 3}
    scores = read(tmp_path / "forget.scores.jsonl")
    assert [row["prompt"] for row in scores] == [row["prompt"] for row in ROWS]
    assert (tmp_path / "forget.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (tmp_path / "forget.scores.jsonl.part").exists()


def test_what_is_chosen_can_be_forgotten(tiny, tmp_path, short_continuations):
    out = tmp_path / "forget.jsonl"
    select(ROWS, badness, out, quiet=True)
    report = ff.unlearn(
        tiny["llama"], out, tmp_path / "lora", max_steps=2, max_length=48, bits=32, lora_r=2, quiet=True
    )
    assert report["forget_passages"] == 5


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_an_interrupted_run_goes_on_and_ends_alike(tmp_path, batch_size):
    whole = tmp_path / "whole.jsonl"
    select(ROWS, badness, whole, quiet=True)
    seen = []

    def interrupted(dialogues):
        if len(seen) >= 4:
            raise KeyboardInterrupt
        seen.extend(dialogues)
        return badness(dialogues)

    interrupted.__qualname__ = badness.__qualname__
    out = tmp_path / "forget.jsonl"
    if batch_size < 100:
        with pytest.raises(KeyboardInterrupt):
            select(ROWS, interrupted, out, batch_size=batch_size, quiet=True)
        part = tmp_path / "forget.scores.jsonl.part"
        part.write_text(part.read_text() + '{"prompt": "Quest')  # killed while it wrote
        assert not out.exists()
    again = []

    def counting(dialogues):
        again.extend(dialogues)
        return badness(dialogues)

    counting.__qualname__ = badness.__qualname__
    select(ROWS, counting, out, batch_size=batch_size, quiet=True)
    assert len(again) == len(ROWS) - len(seen) and out.read_text() == whole.read_text()
    for name in ("scores.jsonl", "left-out.jsonl"):
        assert (tmp_path / f"forget.{name}").read_text() == (tmp_path / f"whole.{name}").read_text()


def test_other_data_or_another_evaluator_begins_anew(tmp_path):
    def fails(dialogues):
        raise ValueError("no")

    fails.__qualname__ = badness.__qualname__
    out = tmp_path / "forget.jsonl"
    with pytest.raises(ff.FastforgetError, match=r"nothing is chosen.*highest is 0.333.*are kept"):
        select(ROWS[:1] * 3, badness, out, quiet=True)
    assert not out.exists() and len(read(tmp_path / "forget.scores.jsonl.part")) == 4
    # the same with a lower threshold scores nothing again
    assert select(ROWS[:1] * 3, fails, out, threshold=0.1, quiet=True)["chosen"] == 3
    with pytest.raises(ff.FastforgetError, match="nothing is chosen"):
        select(ROWS[:1] * 3, badness, out, quiet=True)
    with pytest.raises(ff.FastforgetError, match="failed: ValueError"):
        select([ROWS[1]], fails, out, quiet=True)


def test_own_answers_are_judged(tiny, tmp_path, short_continuations):
    seen = []

    def anything(dialogues):
        seen.extend(dialogues)
        return [1.0] * len(dialogues)

    out = tmp_path / "forget.jsonl"
    select(ROWS[:3], anything, out, generate=True, model=tiny["llama"], bits=32, quiet=True)
    assert [each.prompt for each in seen] == [row["prompt"] for row in ROWS[:3]]
    assert all(each.response != row["response"] for each, row in zip(seen, ROWS, strict=False))
    with pytest.raises(ff.FastforgetError, match=r"rows\[0\] has no prompt to answer"):
        select(["a text"], anything, tmp_path / "x.jsonl", generate=True, model=tiny["llama"], bits=32, quiet=True)


def test_formats_conversations_and_texts(tmp_path):
    found = select(SAFE, badness, tmp_path / "a.jsonl", format="saferlhf", quiet=True)
    assert found["chosen"] == 1
    chat = [{"messages": [{"role": "user", "content": "P"}, {"role": "assistant", "content": "bad bad bad"}]}]
    seen = []
    select(chat, lambda dialogues: seen.extend(dialogues) or [1.0], tmp_path / "b.jsonl", quiet=True)
    select(["a text"], lambda dialogues: seen.extend(dialogues) or [1.0], tmp_path / "c.jsonl", quiet=True)
    assert seen == [Dialogue("P", "bad bad bad"), Dialogue("", "a text")]


def test_on_the_command_line_and_one_line_with_code_2(run, tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rules.py").write_text("def score(d): return [float('bad' in each.response) for each in d]\nx = 1\n")
    data, out = str(write_rows(tmp_path / "d.jsonl", ROWS)), str(tmp_path / "o.jsonl")
    code, printed, errors = run("select", "--data", data, "--evaluator", "my_rules:score", "--out", out)
    assert code == 0 and "8 of 10 dialogues score at least 0.5" in printed, errors
    broken = str(write_rows(tmp_path / "broken.jsonl", [*ROWS, {"prompt": "P"}]))
    malformed = tmp_path / "malformed.jsonl"
    malformed.write_text(json.dumps(ROWS[0]) + "\n{no json\n")
    bad = [
        ((data, "my_rules:none"), "cannot be imported"),
        ((data, "my_rules:score", "--label", "x"), "No such option|--label"),
        ((broken, "my_rules:score"), r"broken\.jsonl:11 has no column 'response'; its columns are prompt"),
        ((str(malformed), "my_rules:score"), r"malformed\.jsonl:2 is not JSON"),
        (("a" * 5000, "my_rules:score"), "--data cannot be read: File name too long"),
        ((data, "my_rules:score", "--limit", "9" * 20), "--limit must be at least 1 and at most"),
        ((data, "my_rules:score", "--threshold", "2"), "--threshold must be at least 0 and at most 1"),
        ((data, "my_rules:score", "--generate"), "--generate needs --model"),
        ((data, "my_rules:score", "--format", "nothing"), "unknown format 'nothing'"),
        ((str(tmp_path / "none.jsonl"), "my_rules:score"), "does not exist"),
        ((data, "my_rules:score", "--out", "o" * 300), "cannot be written .File name too long.: give another --out"),
        ((data, "my_rules:score", "--out", f"{data}/x"), "cannot be written .*: give another --out"),
    ]
    before = (tmp_path / "o.jsonl").read_text()
    for (path, evaluator, *rest), words in bad:
        code, _, errors = run("select", "--data", path, "--evaluator", evaluator, "--out", out, *rest)
        assert code == 2 and re.search(words, "\n".join(errors)), (path, rest, errors)
        if "--label" not in rest:
            assert len(errors) == 1, errors
    assert (tmp_path / "o.jsonl").read_text() == before, "nothing lost"
