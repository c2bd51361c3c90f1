"""A metric of one's own from `token_stats`: Min-K%, a sign of training data, before and after.

The mean log-prob of an answer's least likely fifth of tokens (arXiv 2310.16789): what a model was trained on has few
tokens that surprise it. No logits are stored, however large the vocabulary is.

python examples/own_metric.py MODEL FORGET RETAIN OUT      (a folder or hub name; two texts; a folder for the adapter)
"""

import sys
from collections.abc import Iterable

import torch

import fastforget as ff
from fastforget.models import load_tokenizer

SHARE = 0.2


@torch.no_grad()
def min_k(model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """The mean over all answers of the mean log-prob of their least likely tokens, in nats."""
    training = model.training
    model.eval()
    head = ff.LMHead.from_model(model)
    backbone = model.get_base_model().base_model  # all of the model but its head
    answers = []
    for batch in batches:
        inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
        hidden = backbone(**inputs).last_hidden_state[:, :-1]
        labels = batch["labels"][:, 1:].to(model.device)
        stats = ff.token_stats(hidden.flatten(0, 1), head, labels.flatten())  # 0 where a label is -100
        for logp, labelled in zip(stats.logp.view_as(labels), labels != -100, strict=True):
            count = int(labelled.sum())
            lowest = logp[labelled].sort().values[: max(1, int(SHARE * count))]
            answers.append(float(lowest.mean()))
    model.train(training)
    return sum(answers) / len(answers)


def main(name: str, forget_text: str, retain_text: str, out: str) -> None:
    tokenizer = load_tokenizer(name)
    sets = [ff.examples(path, tokenizer, max_length=64) for path in (forget_text, retain_text)]
    measured = [list(torch.utils.data.DataLoader(each, batch_size=4, collate_fn=ff.collate)) for each in sets]
    model = ff.load(name, bits=32).train()
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms="npo", lr=1e-3)
    before = [min_k(model, batches) for batches in measured]
    for pair in ff.batches(*sets, batch_size=2, steps=4):
        print(f"loss {float(step(*pair).loss):.4f}")
    for side, batches, earlier in zip(("forget", "retain"), measured, before, strict=True):
        print(f"{side} Min-{SHARE:.0%} {earlier:.3f} -> {min_k(model, batches):.3f}")
    ff.save_adapter(model, tokenizer, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
