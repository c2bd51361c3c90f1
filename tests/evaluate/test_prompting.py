"""Passages behind other prompts: where they stand then, and that the figures are those of the whole sequence."""

import pytest
from helpers import random_model

from fastforget.data.examples import Example
from fastforget.evaluate import prompting
from fastforget.evaluate.memorisation import memorisation


@pytest.fixture
def model(tokenizer):
    return random_model("llama", tokenizer).eval()


def example(tokenizer, text, prompt):
    ids = (tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False))
    return Example(ids, prompt_length=prompt)


def test_two_others_stand_before_a_passage_never_itself(tokenizer):
    passages = [
        example(tokenizer, text, 3) for text in ("The old oak tree.", "A river bend.", "The plan.", "A river bend.")
    ]
    for own, (prompted, split) in zip(passages, prompting.behind_others(passages, passages, tokenizer), strict=True):
        text = tokenizer.decode(prompted.input_ids)
        assert text.startswith("<s>") and text.count("<s>") == 1 and prompted.input_ids[split:] == own.input_ids[3:]
        others = text.removeprefix("<s>").removesuffix(tokenizer.decode(own.input_ids[1:]))
        assert len(others) > 10 and tokenizer.decode(own.input_ids[1:]) not in others
    alone = prompting.behind_others(passages[:1], passages[:1], tokenizer)
    assert alone == [(passages[0], 3)]


def test_figures_are_those_of_the_prompted_sequence(model, tokenizer):
    forget = [
        example(tokenizer, text, 3) for text in ("The old oak tree near the river.", "A river bend of stone and wood.")
    ]
    kept = [example(tokenizer, "Two and two are four.", 2)]
    rows = {row.treatment: row for row in prompting.prompting_rows(model, tokenizer, forget, kept, forget[:1])}
    assert list(rows) == ["behind two others to forget", "behind two that were kept", "in other words, worst of 3"]
    before = tokenizer.encode("Two and two are four.", add_special_tokens=False)
    whole = [Example((each.input_ids[0], *before, *each.input_ids[1:]), len(before) + 3) for each in forget]
    expected = memorisation(model, tokenizer, whole)
    row = rows["behind two that were kept"]
    assert (row.forget_memorisation, row.forget_extraction) == pytest.approx((expected.exact, expected.extraction))
    tries = []
    for wording in prompting.WORDINGS:
        ids = tokenizer.encode(wording, add_special_tokens=False)
        asked = [Example((each.input_ids[0], *ids, *each.input_ids[1:]), len(ids) + 3) for each in forget]
        tries.append([passage.exact for passage in memorisation(model, tokenizer, asked).passages])
    worst = [max(each) for each in zip(*tries, strict=True)]
    assert rows["in other words, worst of 3"].forget_memorisation == pytest.approx(sum(worst) / 2)
    assert len(prompting.prompting_rows(model, tokenizer, forget, [], [])) == 2


def test_what_does_not_fit_into_the_context_does_not_count(tokenizer):
    model = random_model("opt", tokenizer, context=32).eval()
    texts = ("The old oak tree near the river.", "A river bend of stone and wood.")
    long = [example(tokenizer, text, 3) for text in texts]
    assert all(16 < len(each.input_ids) <= 32 for each in long)
    rows = prompting.prompting_rows(model, tokenizer, long, [], [])
    assert rows[0].forget_memorisation is None and rows[0].unseen_memorisation is None
