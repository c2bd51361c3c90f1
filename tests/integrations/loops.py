"""What tests of training loops share: rows of uneven lengths, and the loop that they must equal, with full logits."""

import torch
from helpers import VOCABULARY, load_perturbed, token_log_probs

import fastforget as ff
from fastforget.integrations.rows import row_collator

GRAD_DIFF = [ff.NegatedCE(weight=0.3), ff.CE()]


class RecordsBatches:
    """Of a Trainer: keeps the batches of each optimizer step."""

    def get_batch_samples(self, *arguments):
        batches, counts = super().get_batch_samples(*arguments)
        self.groups = [*getattr(self, "groups", []), batches]
        return batches, counts


ARGUMENTS = {  # of a Trainer
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}


def rows(count, seed, prompt=3):
    """Rows of 8 to 20 tokens, of which the first are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(8, 21, (), generator=generator))
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def flat(forget, retain):
    return row_collator()([{"forget": f} for f in forget] + [{"retain": r} for r in retain])


def grad_diff(model, batches):
    """The loss of `GRAD_DIFF` over batches that are one: 0.3 mean log p (forget) - mean log p (retain)."""
    sums, counts = [0.0, 0.0], [0, 0]
    for batch in batches:
        for side in (0, 1):
            part = {key: value[batch["role"] == side] for key, value in batch.items() if key != "role"}
            if len(part["input_ids"]):
                _, logp, labelled = token_log_probs(model, part)
                sums[side] = sums[side] + logp[labelled].sum()
                counts[side] += int(labelled.sum())
    return 0.3 * sums[0] / counts[0] - sums[1] / counts[1]


def replay(folder, groups, lr=1e-3):
    """The adapter after one AdamW step for each group of batches, and the losses."""
    model = load_perturbed(folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for group in groups:
        loss = grad_diff(model, group)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses


def assert_same_weights(model, other, bound=1e-5):
    theirs = dict(other.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            compared += 1
            difference = (parameter.detach() - theirs[name].detach()).norm()
            assert float(difference) <= bound * float(theirs[name].detach().norm()), name
    assert compared
