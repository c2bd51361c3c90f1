"""Passages of the language reference, and the tokenizer that was trained on it."""

import pytest

from fastforget.data import topics


@pytest.fixture(scope="module")
def corpus():
    return topics.load_corpus(topic_counts=(1, 2, 1), passages_per_topic=3)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return corpus.tokenizer
