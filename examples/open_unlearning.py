"""A method of OpenUnlearning on fastforget: its arguments, and batches as its collator makes them.

In OpenUnlearning itself two lines at the end of `src/trainer/__init__.py` do it, and everything else stays as it is:

    from fastforget.integrations import open_unlearning
    TRAINER_REGISTRY.update(open_unlearning.trainers(FinetuneTrainer))

Here the Trainer of transformers stands for its FinetuneTrainer.

python examples/open_unlearning.py MODEL FORGET RETAIN OUT      (a folder or hub name; two texts; a folder)
"""

import sys
from typing import Any

import transformers

import fastforget as ff
from fastforget.integrations import open_unlearning
from fastforget.integrations.rows import PairedRows
from fastforget.models import load_tokenizer


def collate(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """{"forget": batch, "retain": batch}, as OpenUnlearning has it."""
    return {side: ff.collate([pair[side] for pair in pairs]) for side in ("forget", "retain")}


def main(name: str, forget_text: str, retain_text: str, out: str) -> None:
    registry = open_unlearning.trainers(transformers.Trainer)
    tokenizer = load_tokenizer(name)
    forget, retain = (ff.examples(path, tokenizer, max_length=64) for path in (forget_text, retain_text))
    trainer = registry["NPO"](
        model=ff.load(name, bits=32),  # or a model without an adapter, all of whose weights train
        args=transformers.TrainingArguments(out, per_device_train_batch_size=2, num_train_epochs=1, report_to=[]),
        train_dataset=PairedRows(forget, retain),
        tokenizer=tokenizer,
        data_collator=collate,
        beta=0.1,
        alpha=1.0,
        gamma=1.0,
        retain_loss_type="NLL",
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
