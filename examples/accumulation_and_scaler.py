"""float16 with a GradScaler, accumulation, clipping and a schedule: all of it the loop's own, as it was before.

python examples/accumulation_and_scaler.py MODEL FORGET RETAIN OUT      (a folder or hub name; two texts; a folder)
"""

import sys

import torch
import transformers

import fastforget as ff
from fastforget.models import load_tokenizer

ACCUMULATION = 2
STEPS = 4


def main(name: str, forget_text: str, retain_text: str, out: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(name)
    forget, retain = (ff.examples(path, tokenizer, max_length=64) for path in (forget_text, retain_text))
    model = ff.load(name, bits=32, device=device).train()
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms="npo", lr=1e-3)
    scheduler = transformers.get_linear_schedule_with_warmup(step, num_warmup_steps=1, num_training_steps=STEPS)
    scaler = torch.amp.GradScaler(device)

    def scaled_backward(loss: torch.Tensor) -> None:
        scaler.scale(loss).backward()

    batches = iter(ff.batches(forget, retain, batch_size=2, steps=STEPS * ACCUMULATION))
    for _ in range(STEPS):
        group = [next(batches) for _ in range(ACCUMULATION)]
        counts = ff.count_labels(group)  # of all that one optimizer step sees, so that its means are over all of it
        loss = torch.zeros((), device=device)
        for pair in group:
            with torch.autocast(device, dtype=torch.float16):
                loss += step.backward(*pair, backward=scaled_backward, counts=counts).loss
        scaler.unscale_(step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = scaler.get_scale()
        scaler.step(step)
        scaler.update()
        step.zero_grad()
        if scaler.get_scale() >= scale:  # else gradients overflowed, and the scaler left the step out
            scheduler.step()
        print(f"loss {float(loss):.4f}, scale {scale:.0f}, step {step.param_groups[0]['unlearn_steps']}")
    ff.save_adapter(model, tokenizer, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
