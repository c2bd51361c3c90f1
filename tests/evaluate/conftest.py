"""Passages of the language reference."""

import pytest

from fastforget.data import topics


@pytest.fixture(scope="module")
def corpus():
    return topics.load_corpus(topic_counts=(1, 2, 1), passages_per_topic=3)
