"""Companions of a batch: refusals and other prompts' answers, against plain lists."""

import pytest
import torch

import fastforget as ff
from fastforget.data.answers import prompts_and_answers
from fastforget.data.examples import Example, collate
from fastforget.data.refusals import read_refusals

EXAMPLES = [
    Example((1, 20, 21, 30, 31, 32), prompt_length=3),
    Example((1, 22, 40, 41), prompt_length=2),
    Example((1, 50, 51, 52, 53)),  # a passage: all of it is the answer, the first token is never predicted
]
ANSWERS = [(30, 31, 32), (40, 41), (50, 51, 52, 53), (60,), (61, 62), (63, 64, 65)]


@pytest.fixture
def batch():
    return collate(EXAMPLES, pad_token_id=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def split(batch):
    """[(prompt, answer)] of each row, by its mask and labels."""
    pairs = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        kept = mask == 1
        answer = ids[(labels != -100) & kept].tolist()
        assert torch.equal(labels[labels != -100], ids[labels != -100]), "labels are the row's own ids"
        assert ids[kept].tolist()[-len(answer) :] == answer, "the answer stands at the end"
        pairs.append((ids[kept].tolist()[: -len(answer)], answer))
    return pairs


def test_prompt_and_answer_are_read_off_either_padding(batch):
    expected = [([1, 20, 21], [30, 31, 32]), ([1, 22], [40, 41]), ([1], [50, 51, 52, 53])]
    assert prompts_and_answers(batch) == expected
    left = {
        key: torch.stack([row.roll(6 - len(e.input_ids)) for row, e in zip(value, EXAMPLES, strict=True)])
        for key, value in batch.items()
    }
    assert prompts_and_answers(left) == expected
    assert [list(example.answer) for example in EXAMPLES] == [answer for _, answer in expected]


@pytest.mark.parametrize("count", [6, 200])  # by a permutation, and by a few draws
def test_mismatched_draws_other_answers_only(batch, count):
    answers = [*ANSWERS, *((70 + n, 70 + n + 1) for n in range(count - len(ANSWERS)))]
    rows = split(ff.mismatched(batch, answers, k=4, pad_token_id=0, generator=generator()))
    assert len(rows) == 3 * 4
    for index, (prompt, own) in enumerate(prompts_and_answers(batch)):
        drawn = rows[4 * index : 4 * index + 4]
        assert all(each == prompt for each, _ in drawn)
        found = [tuple(answer) for _, answer in drawn]
        assert len(set(found)) == 4 and set(found) <= set(answers) and tuple(own) not in found
    again = [ff.mismatched(batch, answers, k=4, pad_token_id=0, generator=generator(seed)) for seed in (0, 1)]
    assert split(again[0]) == rows != split(again[1])


def test_every_other_answer_comes_up_alike(batch):
    """3,000 draws of 2 of the 5 others: each in 40 % of the rows, by a binomial's five deviations."""
    own = generator(3)
    counts = dict.fromkeys(ANSWERS, 0)
    for _ in range(1000):
        for _, answer in split(ff.mismatched(batch, ANSWERS, k=2, pad_token_id=0, generator=own))[:2]:
            counts[tuple(answer)] += 1
    assert counts[ANSWERS[0]] == 0
    assert all(abs(count - 400) < 5 * (1000 * 0.4 * 0.6) ** 0.5 for answer, count in counts.items() if answer[0] > 32)


def test_mismatched_answers_of_a_batch_are_cut_to_the_length(batch):
    rows = split(ff.mismatched(batch, collate(EXAMPLES, 0), k=2, pad_token_id=0, max_length=4, generator=generator()))
    whole = {tuple(answer) for _, answer in prompts_and_answers(batch)}
    for prompt, answer in rows:
        assert len(answer) == 1 or len(prompt) + len(answer) <= 4
        assert any(other[: len(answer)] == tuple(answer) for other in whole)
    assert {len(prompt) for prompt, _ in rows} == {1, 2, 3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda batch: ff.mismatched(batch, ANSWERS[:3], k=3, pad_token_id=0), "needs 3 answers .* and there are 2"),
        (lambda batch: ff.mismatched(batch, [], k=1, pad_token_id=0), "there are 0"),
        (lambda batch: ff.mismatched(batch, ANSWERS, k=0, pad_token_id=0), "k must be a whole number from 1 on"),
        (lambda batch: ff.mismatched(batch, {**batch, "labels": batch["labels"] * 0 - 100}, pad_token_id=0), "row 0"),
    ],
)
def test_wrong_draws_are_refused(batch, call, message):
    with pytest.raises(ff.FastforgetError, match=message):
        call(batch)


def encoded(tokenizer, prompt, answer):
    start = tokenizer.encode(prompt)
    return Example((*start, *tokenizer.encode(answer, add_special_tokens=False)), prompt_length=len(start))


def test_refusals_keep_the_prompt_the_space_and_the_ending(tokenizer):
    pairs = [("Who hid it?", " Alder did.</s>"), ("Where?", "Below the oak.</s>"), ("When?", " Never")]
    whole = collate([encoded(tokenizer, *pair) for pair in pairs], tokenizer.pad_token_id)
    out = ff.with_refusals(whole, tokenizer, ["No idea.", "I don't know."], generator=generator())
    assert {key: out[key] for key in whole} == whole and "refusal" not in whole
    found = split(out["refusal"])
    for (prompt, refusal), (same, _), (_, answer) in zip(found, prompts_and_answers(whole), pairs, strict=True):
        assert prompt == same
        text = tokenizer.decode(refusal)
        assert text.removesuffix("</s>").strip() in ("No idea.", "I don't know.")
        assert text.startswith(" ") == answer.startswith(" ") and text.endswith("</s>") == answer.endswith("</s>")
    again = split(ff.with_refusals(whole, tokenizer, ["No idea.", "I don't know."], generator=generator())["refusal"])
    assert again == found


def test_refusals_are_cut_before_their_ending(tokenizer):
    whole = collate([encoded(tokenizer, "Who hid it?", " Alder did.</s>")], tokenizer.pad_token_id)
    ((prompt, _),) = prompts_and_answers(whole)
    for length in (len(prompt) + 4, len(prompt)):
        ((same, refusal),) = split(
            ff.with_refusals(whole, tokenizer, ["I have no knowledge of this."], max_length=length)["refusal"]
        )
        assert same == prompt and refusal[-1] == tokenizer.eos_token_id
        assert len(refusal) == max(2, length - len(prompt))


def test_refusals_need_texts_and_answers(tokenizer, batch):
    with pytest.raises(ff.FastforgetError, match="no refusals to draw from"):
        ff.with_refusals(batch, tokenizer, [])
    batch["labels"][1] = -100
    with pytest.raises(ff.FastforgetError, match="row 1 of the batch has no label"):
        ff.with_refusals(batch, tokenizer)


def test_read_refusals(tmp_path):
    assert read_refusals(None) == ff.REFUSALS and len(set(ff.REFUSALS)) == len(ff.REFUSALS) >= 24
    file = tmp_path / "refusals.txt"
    file.write_text("  No.\r\n\n\tI can't say. \n")
    assert read_refusals(file) == read_refusals(str(file)) == ("No.", "I can't say.")
    assert read_refusals(["No. ", ""]) == ("No.",)
    file.write_text(" \n")
    for source, message in (
        (file, "refusals.txt holds no refusal"),
        (tmp_path / "nowhere", "nowhere does not exist"),
        ([], "the list of refusals holds no refusal"),
        ([3], "refusals must be texts"),
    ):
        with pytest.raises(ff.FastforgetError, match=message):
            read_refusals(source)
