"""One model in shards over several processes (FSDP2), which `torchrun` starts; each has batches of its own.

torchrun --nproc-per-node=2 examples/fsdp2.py MODEL FORGET RETAIN OUT      (a folder or hub name; two texts; a folder)
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import fastforget as ff
from fastforget.models import load_tokenizer


def main(name: str, forget_text: str, retain_text: str, out: str) -> None:
    rank = dist.get_rank()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(name)
    sets = [ff.examples(path, tokenizer, max_length=64) for path in (forget_text, retain_text)]
    model = ff.load(name, bits=32, device=device).train()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms="npo", lr=1e-3)  # over the shards: made after them
    for forget, retain in ff.batches(*sets, batch_size=2, steps=4, seed=rank):
        output = step(forget, retain)  # the means are over all processes' batches
        if rank == 0:
            print(f"loss {float(output.loss):.4f}")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(model, options=options)  # all processes gather, the first one has it
    if rank == 0:
        model.save_pretrained(out, state_dict=weights, save_embedding_layers=False)


if __name__ == "__main__":
    dist.init_process_group()
    main(*sys.argv[1:])
    dist.destroy_process_group()
