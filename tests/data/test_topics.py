"""The demo's corpus: passages of the right size, deterministic, and no text in two of its parts."""

import random
from itertools import combinations

import pytest

from fastforget.data import topics
from fastforget.errors import FastforgetError

PARTS = ("forget", "retain", "unseen")


@pytest.fixture(scope="module")
def corpus():
    return topics.load_corpus(seed=0)


def topic_of(passage):
    return passage.source.split(":")[1]


def test_sizes(corpus):
    assert [len(getattr(corpus, part)) for part in PARTS] == [24, 48, 24]
    for part in PARTS:
        for passage in getattr(corpus, part):
            assert len(passage.input_ids) == topics.PASSAGE_TOKENS and passage.prompt_length == 0
            assert passage.input_ids[0] == corpus.tokenizer.bos_token_id
            text = corpus.tokenizer.decode(passage.input_ids, skip_special_tokens=True)
            assert len(text) >= topics.PASSAGE_CHARACTERS


def test_passages_are_pieces_of_their_topic_in_order(corpus):
    for part in PARTS:
        starts = {}
        for passage in getattr(corpus, part):
            # A cut may fall inside a character of several bytes, at either end.
            text = corpus.tokenizer.decode(passage.input_ids, skip_special_tokens=True).strip("\ufffd")
            found = topics.python_topics()[topic_of(passage)].find(text)
            assert found > starts.get(topic_of(passage), -1)
            starts[topic_of(passage)] = found


def test_parts_share_no_text(corpus):
    words = {
        part: [
            topics.word_runs(corpus.tokenizer.decode(passage.input_ids, skip_special_tokens=True), length=12)
            for passage in getattr(corpus, part)
        ]
        for part in PARTS
    }
    for part in PARTS:
        assert all(words[part])
    for one, other in combinations(PARTS, 2):
        assert {topic_of(passage) for passage in getattr(corpus, one)}.isdisjoint(
            topic_of(passage) for passage in getattr(corpus, other)
        )
        for runs in words[one]:
            assert all(topics.shared_part(runs, others) <= topics.SHARED_PART for others in words[other])


def test_seed_only_shuffles_which_topic_goes_where(corpus):
    again, other = topics.load_corpus(seed=0), topics.load_corpus(seed=1)
    for part in PARTS:
        assert getattr(again, part) == getattr(corpus, part)
    assert other.forget != corpus.forget
    assert {passage for part in PARTS for passage in getattr(other, part)} == {
        passage for part in PARTS for passage in getattr(corpus, part)
    }


def test_tokenizer_gives_back_any_text_and_begins_with_bos(corpus, tmp_path):
    text = "naïve – “quoted”\n\tif x:\n    y  =  1 ☃"
    corpus.tokenizer.save_pretrained(tmp_path)
    reloaded = topics.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for tokenizer in (corpus.tokenizer, reloaded):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len({corpus.tokenizer.pad_token_id, corpus.tokenizer.bos_token_id, corpus.tokenizer.eos_token_id}) == 3


def made_up_topics(count, seed=0):
    """Unrelated texts of random words, the later the longer; lengths differ by more than 127 tokens' worth."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    lexicon = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(500)]
    return {f"topic{index}": " ".join(draw.choices(lexicon, k=300 + 100 * index)) for index in range(count)}


def test_topic_that_holds_a_chosen_one_is_left_out():
    texts = made_up_topics(4)
    texts["all"] = " ".join(texts.values())
    texts["copy"] = texts["topic1"]
    tokenizer = topics.train_tokenizer(texts.values())
    chosen = topics.choose_topics(texts, tokenizer, 4, 1)
    assert len(chosen) == 4 and "all" not in chosen
    assert len({"copy", "topic1"} & set(chosen)) == 1
    with pytest.raises(FastforgetError, match="only 4 of the 6 topics"):
        topics.choose_topics(texts, tokenizer, 5, 1)


def test_pieces_with_little_text_and_tails_are_dropped():
    texts = made_up_topics(2)
    tokenizer = topics.train_tokenizer(texts.values())
    text = texts["topic1"]
    whole = topics.cut_passages(text, tokenizer, characters=0)
    assert len(whole) == len(tokenizer.encode(text, add_special_tokens=False)) // (topics.PASSAGE_TOKENS - 1)
    assert topics.cut_passages(text, tokenizer, characters=10**6) == []
    symbols = "".join(random.Random(0).choices("☃☂☁★☄", k=300))  # seldom merged, so few characters a token
    assert topics.cut_passages(symbols, tokenizer, characters=0) != []
    assert topics.cut_passages(symbols, tokenizer) == []


def test_unwrap_joins_prose_and_leaves_code_tables_and_grammar():
    full = "word " * 13
    prose = f"Title\n*****\n\n{full}\ngoes on here.\nNot after a short line.\n"
    assert topics.unwrap(prose) == f"Title\n*****\n\n{full} goes on here.\nNot after a short line.\n"
    kept = f"{full}\n   indented = code\n\n| {full} |\n| {full} |\n\nname ::= {full}\n{full}\n"
    assert topics.unwrap(kept) == kept
