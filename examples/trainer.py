"""The Trainer of transformers, with everything of its own: schedules, logs, checkpoints, `torchrun`.

python examples/trainer.py MODEL FORGET RETAIN OUT      (a folder or hub name; two texts; a folder)
"""

import sys

from transformers import TrainingArguments

import fastforget as ff
from fastforget.models import load_tokenizer


def main(name: str, forget_text: str, retain_text: str, out: str) -> None:
    tokenizer = load_tokenizer(name)
    forget, retain = (ff.examples(path, tokenizer, max_length=64) for path in (forget_text, retain_text))
    trainer = ff.UnlearnTrainer(
        ff.load(name, bits=32),
        TrainingArguments(out, per_device_train_batch_size=2, num_train_epochs=1, logging_steps=1, report_to=[]),
        terms="npo",
        forget_dataset=forget,
        retain_dataset=retain,
        eval_dataset=(forget, retain),
        processing_class=tokenizer,
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
