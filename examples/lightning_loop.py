"""Lightning, by its manual optimization: precision, devices, logs and checkpoints are the Trainer's.

python examples/lightning_loop.py MODEL FORGET RETAIN OUT      (a folder or hub name; two texts; a folder)
"""

import sys
from typing import Any

import lightning
import torch

import fastforget as ff
from fastforget.models import load_tokenizer

ACCUMULATION = 2


class Unlearning(lightning.LightningModule):
    """A model that unlearns: each batch is a group of (forget, retain) pairs, one optimizer step's."""

    def __init__(self, model: torch.nn.Module, terms: str, lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.terms, self.lr = model, terms, lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ff.UnlearnStep(self.model, torch.optim.AdamW, terms=self.terms, lr=self.lr)

    def training_step(self, group: list[Any], index: int) -> None:
        optimizer = self.optimizers()
        counts = ff.count_labels(group)
        outputs = [optimizer.backward(*pair, backward=self.manual_backward, counts=counts) for pair in group]
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        optimizer.zero_grad()
        self.log("loss", sum(output.loss for output in outputs), batch_size=1)


class PrintLoss(lightning.Callback):
    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        print(f"loss {float(trainer.callback_metrics['loss']):.4f}")


def main(name: str, forget_text: str, retain_text: str, out: str) -> None:
    tokenizer = load_tokenizer(name)
    forget, retain = (ff.examples(path, tokenizer, max_length=64) for path in (forget_text, retain_text))
    pairs = ff.batches(forget, retain, batch_size=2, steps=8)
    groups = torch.utils.data.DataLoader(list(pairs), batch_size=ACCUMULATION, collate_fn=list)
    model = ff.load(name, bits=32).train()
    trainer = lightning.Trainer(max_epochs=1, default_root_dir=out, callbacks=[PrintLoss()], logger=False)
    trainer.fit(Unlearning(model, "npo", lr=1e-3), groups)
    ff.save_adapter(model, tokenizer, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
