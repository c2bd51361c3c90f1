"""A name that is no folder, where the hub cannot be reached: said in seconds, in one line."""

import socket
import time

import pytest
from huggingface_hub import constants

import fastforget as ff
from fastforget import hub
from fastforget.models import load_tokenizer


@pytest.fixture
def online(monkeypatch):
    """The hub's client is not told that it is offline, and no host answers."""
    asked = []

    def refuse(address, **_):
        asked.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    hub.reachable.cache_clear()
    yield asked
    hub.reachable.cache_clear()


@pytest.mark.parametrize("loaded", [load_tokenizer, ff.load, ff.plan], ids=lambda each: each.__name__)
def test_an_unreachable_hub_is_one_line_at_once(online, loaded):
    start = time.perf_counter()
    with pytest.raises(
        ff.FastforgetError, match=r"no folder some/model, the hub .* cannot be reached, .* check the name"
    ):
        loaded("some/model")
    assert time.perf_counter() - start < 5.0, "the hub's own client tries for half a minute"
    assert online == [("huggingface.co", 443)] and constants.HF_HUB_OFFLINE is False


def test_a_hub_that_is_switched_off_is_not_asked(online, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ff.FastforgetError, match=r"no folder some/model, the hub .* is switched off"):
        load_tokenizer("some/model")
    assert not online and constants.HF_HUB_OFFLINE is True


def test_a_folder_needs_no_hub_and_a_path_is_none_of_its_names(online, tiny):
    load_tokenizer(tiny["llama"])
    with pytest.raises(
        ff.FastforgetError, match=r"there is no folder \./some/thing/else, and the hub has no such names"
    ):
        load_tokenizer("./some/thing/else")
    assert not online


def test_a_proxy_is_taken_to_answer(online, monkeypatch):
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub.reachable("https://huggingface.co") and not hub.reachable("http://huggingface.co") and len(online) == 1


@pytest.mark.parametrize("loaded", [load_tokenizer, ff.load, ff.plan], ids=lambda each: each.__name__)
def test_a_name_that_no_file_can_have_is_an_error_of_ours(loaded, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ff.FastforgetError):
        loaded("a" * 5000)
