"""Tiny models and a tokenizer trained on the spot, saved as ordinary Hugging Face folders."""

import glob
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not glob.glob("/dev/nvidia*"):  # without a GPU the kernels run in Triton's interpreter; read when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from fastforget.backends import tiling
from fastforget.data.topics import python_topics, train_tokenizer

VOCABULARY = 320


def tiny_model(kind):
    torch.manual_seed(0)
    if kind == "opt":
        config = OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            word_embed_proj_dim=64,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            init_std=0.2,
        )
        return OPTForCausalLM(config)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tokenizer():
    text = sorted(python_topics().values(), key=len)[:40]
    return train_tokenizer(text, vocabulary_size=VOCABULARY)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer):
    """{"opt": folder, "llama": folder}"""
    folders = {}
    for kind in ("opt", "llama"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        tiny_model(kind).save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


def make_batch(rows, seed, width=20, prompt=5):
    """Random ids; a prompt without labels; row 0 is shorter than the others (right padding)."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCABULARY, (rows, width), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    labels[:, :prompt] = -100
    attention_mask[0, width - 6 :] = 0
    labels[0, width - 6 :] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks and tiles so small that a test's rows and vocabulary are many of each."""
    monkeypatch.setenv(tiling.OVERRIDE, "4x16")


@pytest.fixture
def batch():
    return make_batch
