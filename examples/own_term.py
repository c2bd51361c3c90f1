"""A term of one's own: gradient ascent that leaves a token alone once it is unlikely enough.

python examples/own_term.py MODEL FORGET RETAIN OUT      (a folder or hub name; two texts; a folder for the adapter)
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import fastforget as ff
from fastforget.models import load_tokenizer
from fastforget.objectives import SideStats


@dataclass(kw_only=True)
class HingeAscent(ff.TokenTerm):
    """Ascent up to a margin, in nats per token: mean max(0, margin - NLL)."""

    name: ClassVar[str] = "hinge_ascent"
    margin: float = 6.0

    def per_token(self, stats: SideStats) -> Tensor:
        return (self.margin + stats.logp).clamp(min=0)


def main(name: str, forget_text: str, retain_text: str, out: str) -> None:
    tokenizer = load_tokenizer(name)
    forget, retain = (ff.examples(path, tokenizer, max_length=64) for path in (forget_text, retain_text))
    model = ff.load(name, bits=32).train()
    terms = [HingeAscent(margin=8.0, weight=ff.Linear(0.1, 1.0, steps=4)), ff.CE(), ff.KL()]
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=terms, lr=1e-3)
    for pair in ff.batches(forget, retain, batch_size=2, steps=4):
        output = step(*pair)
        print(f"loss {float(output.loss):.4f}, hinge {float(output.terms['hinge_ascent']):.4f}")
    ff.save_adapter(model, tokenizer, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
