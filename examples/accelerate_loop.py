"""A loop on Accelerate: its precision, accumulation and checkpoints; `accelerate launch` runs it in several processes.

python examples/accelerate_loop.py MODEL FORGET RETAIN OUT      (a folder or hub name; two texts; a folder)
"""

import sys

import accelerate
import torch

import fastforget as ff
from fastforget.integrations.rows import PairedRows, row_collator
from fastforget.models import load_tokenizer

ACCUMULATION = 2


def main(name: str, forget_text: str, retain_text: str, out: str) -> None:
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=ACCUMULATION, mixed_precision="bf16")
    tokenizer = load_tokenizer(name)
    sets = [ff.examples(path, tokenizer, max_length=64) for path in (forget_text, retain_text)]
    collator = row_collator(tokenizer.pad_token_id)
    loader = torch.utils.data.DataLoader(PairedRows(*sets), batch_size=2, shuffle=True, collate_fn=collator)
    loader = accelerator.prepare(loader)
    model = ff.load(name, bits=32, device=accelerator.device).train()
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms="npo", lr=1e-3)
    step.prepare(accelerator)
    batches = list(loader)
    for start in range(0, len(batches), ACCUMULATION):
        group = batches[start : start + ACCUMULATION]
        counts = ff.count_labels(group)
        for batch in group:
            with accelerator.accumulate(step.model):
                output = step.backward(batch, counts=counts)
                step.step()
                step.zero_grad()
        accelerator.print(f"loss of the last part {float(output.loss):.4f}")
    accelerator.save_state(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
