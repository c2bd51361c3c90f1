"""Tiny models of several architectures; widths are multiples of 64, where bitsandbytes' 4-bit layers are right."""

import torch
import transformers

LLAMA = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
ARCHITECTURES = {
    "opt": (transformers.OPTConfig, {
        "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "init_std": 0.2,
    }),
    "llama": (transformers.LlamaConfig, LLAMA),
    "qwen2": (transformers.Qwen2Config, LLAMA),
    "gemma2": (transformers.Gemma2Config, {**LLAMA, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
    "mixtral": (transformers.MixtralConfig, {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def save_architecture(kind, folder, vocabulary=320):
    """Save a model of random weights; returns its folder."""
    config, options = ARCHITECTURES[kind]
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": 64}
    transformers.AutoModelForCausalLM.from_config(config(**sizes, **options)).save_pretrained(folder)
    return folder
