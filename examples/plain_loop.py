"""A training loop of one's own, with accumulation: the means are those of the whole batch.

python examples/plain_loop.py MODEL FORGET RETAIN OUT      (a folder or hub name; two texts; a folder for the adapter)
"""

import sys

import torch

import fastforget as ff
from fastforget.models import load_tokenizer

ACCUMULATION = 2


def main(name: str, forget_text: str, retain_text: str, out: str) -> None:
    tokenizer = load_tokenizer(name)
    forget, retain = (
        torch.utils.data.DataLoader(
            ff.examples(path, tokenizer, max_length=64),
            batch_size=2,
            shuffle=True,
            collate_fn=ff.collate,
        )
        for path in (forget_text, retain_text)
    )
    model = ff.load(name, bits=32).train()
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms="npo", lr=1e-3)
    pairs = list(zip(forget, retain, strict=False))
    for start in range(0, len(pairs), ACCUMULATION):
        group = pairs[start : start + ACCUMULATION]
        counts = ff.count_labels(group)
        outputs = [step.backward(*pair, counts=counts) for pair in group]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step.step()
        step.zero_grad()
        print(f"loss {sum(float(output.loss) for output in outputs):.4f}")
    ff.save_adapter(model, tokenizer, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
