"""TRL's SFTTrainer, with everything of its own: chat templates, completion-only labels, truncation, its metrics.

python examples/trl_sft.py MODEL FORGET RETAIN OUT      (a folder or hub name; two texts, a passage a line; a folder)
"""

import sys
from pathlib import Path

import datasets
import trl

import fastforget as ff
from fastforget.integrations.trl import UnlearnSFTTrainer
from fastforget.models import load_tokenizer


def main(name: str, forget_text: str, retain_text: str, out: str) -> None:
    # or rows of "messages", or of "prompt" and "completion", of which only the answers are forgotten
    forget, retain = (
        datasets.Dataset.from_dict({"text": [line for line in Path(path).read_text().splitlines() if line.strip()]})
        for path in (forget_text, retain_text)
    )
    trainer = UnlearnSFTTrainer(
        ff.load(name, bits=32),
        trl.SFTConfig(out, max_length=64, per_device_train_batch_size=2, logging_steps=1, bf16=False, report_to=[]),
        terms="npo",
        forget_dataset=forget,
        retain_dataset=retain,
        eval_dataset=(forget, retain),
        processing_class=load_tokenizer(name),
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
