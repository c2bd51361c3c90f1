"""OpenUnlearning's trainers on fastforget: its batches as they are, and its formulas written out on full logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import load_perturbed, tiny_model, token_log_probs
from integrations.loops import assert_same_weights, rows
from integrations.test_trainer import arguments

import fastforget as ff
from fastforget.integrations.open_unlearning import METHODS, trainers


class Host(transformers.Trainer):
    """What OpenUnlearning's FinetuneTrainer adds: two arguments, and evaluators that are given the tokenizer."""

    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", trial=None):
        return {name: evaluator(self.model, self.tokenizer) for name, evaluator in self.evaluators.items()}


class Rows(torch.utils.data.Dataset):
    """Pairs as ForgetRetainDataset makes them, of tensors; with an index, as evaluation sets have it."""

    def __init__(self, forget, retain):
        self.pairs = list(zip(forget, retain, strict=True))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        forget, retain = self.pairs[index]
        return {"forget": forget | {"index": index}, "retain": retain | {"index": index}}


def collate(items, padding=0):
    """Nested as DataCollatorForSupervisedDataset does it: the mask is boolean, and padding is told by its token."""
    if "input_ids" not in items[0]:
        return {key: collate([item[key] for item in items]) for key in items[0]}
    pad = torch.nn.utils.rnn.pad_sequence
    ids, labels = ([torch.tensor(item[key]) for item in items] for key in ("input_ids", "labels"))
    ids = pad(ids, batch_first=True, padding_value=padding)
    labels = pad(labels, batch_first=True, padding_value=-100)
    index = torch.tensor([item["index"] for item in items]) if "index" in items[0] else None
    batch = {"input_ids": ids, "attention_mask": ids.ne(padding), "labels": labels}
    return batch if index is None else batch | {"index": index}


def nll(model, batch):
    """The NLLs (B, T - 1) of label tokens, 0 elsewhere, and where they are."""
    _, logp, labelled = token_log_probs(model, batch)
    return torch.where(labelled, -logp, 0.0), labelled


def token_mean(losses, labelled):
    return losses[labelled].mean()


def log_ratio(model, reference, batch):
    with torch.no_grad():
        frozen, _ = nll(reference, batch)
    return (frozen - nll(model, batch)[0]).sum(-1)


def grad_ascent(model, reference, batch):
    return -token_mean(*nll(model, batch))


def npo(model, reference, batch, beta):
    return -2 / beta * F.logsigmoid(-beta * log_ratio(model, reference, batch)).mean()


def simnpo(model, reference, batch, beta, delta):
    losses, labelled = nll(model, batch)
    return -2 / beta * F.logsigmoid(beta * (losses.sum(-1) / labelled.sum(-1) - delta)).mean()


def dpo(model, reference, batch, beta):
    win, lose = (log_ratio(model, reference, batch[name]) for name in ("alternate", "original"))
    return -2 / beta * F.logsigmoid(beta * (win - lose)).mean()


def wga(model, reference, batch, beta):
    losses, labelled = nll(model, batch)
    return -token_mean((-losses).exp().detach() ** beta * losses, labelled)


def satimp(model, reference, batch, beta1, beta2):
    losses, labelled = nll(model, batch)
    known = (-losses).exp().detach()
    return -token_mean(known**beta1 * (1 - known) ** beta2 * losses, labelled)


def ceu(model, reference, batch, ignore_first_n_answer_tokens):
    labels = batch["labels"].clone()
    for row in labels:
        row[(row != -100).nonzero()[:ignore_first_n_answer_tokens, 0]] = -100
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    kept = labels[:, 1:] != -100
    logits, labels = logits[kept], labels[:, 1:][kept]
    target = logits.detach().scatter(-1, labels[:, None], -torch.inf).softmax(-1)
    return F.cross_entropy(logits, target)


def undial(model, reference, batch, beta):
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    kept = batch["labels"][:, 1:] != -100
    labels = batch["labels"][:, 1:][kept]
    with torch.no_grad():
        target = reference(**inputs).logits[:, :-1][kept]
        target = (target - beta * F.one_hot(labels, target.shape[-1])).softmax(-1)
    return F.cross_entropy(model(**inputs).logits[:, :-1][kept], target)


FORMULAS = {
    "GradAscent": (grad_ascent, {}, 0.0),
    "GradDiff": (grad_ascent, {}, 1.0),
    "NPO": (npo, {"beta": 0.1}, 1.0),
    "SimNPO": (simnpo, {"beta": 4.5, "delta": 0.1}, 1.0),
    "DPO": (dpo, {"beta": 0.1}, 1.0),
    "WGA": (wga, {"beta": 1.5}, 1.0),
    "SatImp": (satimp, {"beta1": 5.0, "beta2": 1.0}, 0.1),
    "CEU": (ceu, {"ignore_first_n_answer_tokens": 2}, 0.0),
    "UNDIAL": (undial, {"beta": 10.0}, 1.0),
}


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"RMU"}))
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_losses_are_those_of_the_formulas(tiny, tmp_path, name, kind):
    formula, method_args, alpha = FORMULAS[name]
    if kind == "adapter":
        model = load_perturbed(tiny["llama"])
        reference = copy.deepcopy(model)
        reference.base_model.disable_adapter_layers()
    else:
        model = tiny_model("llama")
        reference = copy.deepcopy(model)
        model.lm_head.requires_grad_(False)  # UNDIAL compares whole distributions
    forget, retain = collate(rows(3, 1)), collate(rows(2, 2))
    if name == "DPO":
        forget = {"original": forget, "alternate": collate(rows(3, 4))}
    trainer = trainers(Host)[name](
        model=model,
        args=arguments(tmp_path),
        train_dataset=[0],
        eval_dataset=None,
        tokenizer=None,
        data_collator=collate,
        evaluators=None,
        template_args=None,
        **method_args,
    )
    trainer.create_optimizer()
    if kind == "full":
        with torch.no_grad():  # which moves the model away from its reference
            for parameter in model.model.layers.parameters():
                parameter.mul_(1.1)
    ours, _ = trainer.compute_loss(model, {"forget": forget, "retain": retain}, return_outputs=True)
    theirs = formula(model, reference, forget, **method_args)
    if alpha:
        theirs = theirs + alpha * token_mean(*nll(model, retain))
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=5e-7)


def made(name, model, folder, forget=(), retain=(), options=None, **method_args):
    return trainers(Host)[name](
        model=model,
        args=arguments(folder, **(options or {})),
        train_dataset=Rows(forget, retain),
        tokenizer="tokenizer",
        data_collator=collate,
        evaluators={"asked": lambda model, tokenizer: (type(model).__name__, tokenizer)},
        **method_args,
    )


def test_full_fine_tuning_is_that_of_a_loop_written_out(tmp_path):
    """Two pairs at a time: the reference is a copy that stays, and the host's evaluators run."""
    model = tiny_model("llama")
    reference, expected = copy.deepcopy(model), copy.deepcopy(model)
    forget, retain = rows(6, 1), rows(6, 2)
    options = {"gradient_accumulation_steps": 1, "max_steps": 3, "train_sampling_strategy": "sequential"}
    trainer = made("NPO", model, tmp_path, forget, retain, options, beta=0.5, alpha=2.0, gamma=0.5)
    trainer.train()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-3, weight_decay=0.0)
    for start in (0, 2, 4):
        pairs = [collate(side[start : start + 2]) for side in (forget, retain)]
        loss = 0.5 * npo(expected, reference, pairs[0], 0.5) + 2.0 * token_mean(*nll(expected, pairs[1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(model, expected)
    assert trainer.evaluate() == {"asked": ("LlamaForCausalLM", "tokenizer")}


@pytest.mark.parametrize("retain_loss_type", ["EMBED_DIFF", "NLL"])
def test_rmu(tmp_path, retain_loss_type):
    model = tiny_model("llama")
    options = {
        "module_regex": r"model\.layers\.1",
        "trainable_params_regex": [r"model\.layers\.(0|1)\.mlp\.down_proj\.weight"],
        "steering_coeff": 3.0,
        "retain_loss_type": retain_loss_type,
    }
    trainer = made("RMU", model, tmp_path, rows(2, 1), rows(2, 2), {"max_steps": 1}, alpha=4.0, gamma=0.5, **options)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    before = copy.deepcopy(model)
    trainer.train()
    moved = {name for name, weight in before.named_parameters() if not torch.equal(weight, model.get_parameter(name))}
    assert moved == trainable

    target = trainer.terms[0].target(model.config.hidden_size)
    assert float(target.norm()) == pytest.approx(3.0)
    forget, retain = collate(rows(2, 3)), collate(rows(2, 4))
    captured = []
    for measured in (model, before):
        hook = measured.model.layers[1].register_forward_hook(lambda *given: captured.append(given[-1][:, :-1]))
        for batch in (forget, retain):
            nll(measured, batch)
        hook.remove()
    forget_states, retain_states, _, retain_frozen = captured

    def distance(one, other, batch):
        squares, labelled = (one - other).square().mean(-1), batch["labels"][:, 1:] != -100
        return ((squares * labelled).sum(-1) / labelled.sum(-1)).mean()

    expected = 0.5 * distance(forget_states, target, forget)
    if retain_loss_type == "NLL":
        expected = expected + 4.0 * token_mean(*nll(model, retain))
    else:
        expected = expected + 4.0 * distance(retain_states, retain_frozen, retain)
    loss = trainer.compute_loss(model, {"forget": forget, "retain": retain})
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


@pytest.mark.parametrize(
    "name, method_args, message",
    [
        ("GradDiff", {"retain_loss_type": "EMBED_DIFF"}, "retain_loss_type must be NLL or KL"),
        ("RMU", {"module_regex": r"model\.layers\.7"}, "matches 0 layers"),
        ("RMU", {"module_regex": r"model\.layers\..*", "trainable_params_regex": [".*"]}, "matches 2 layers"),
        ("RMU", {"trainable_params_regex": ["layer"]}, "trainable_params_regex matches no weight"),
        ("NPO", {"beta": 0.0}, "beta must be positive"),
    ],
)
def test_arguments_that_say_nothing(tmp_path, name, method_args, message):
    if name == "RMU":
        method_args = {"trainable_params_regex": [".*down_proj.weight"], **method_args}
    with pytest.raises(ff.FastforgetError, match=message):
        made(name, tiny_model("llama"), tmp_path, **method_args)


def test_distributions_over_a_head_that_trains_are_refused(tmp_path):
    trainer = made("GradDiff", tiny_model("llama"), tmp_path, rows(2, 1), rows(2, 2), retain_loss_type="KL")
    with pytest.raises(ff.FastforgetError, match="freeze the head"):
        trainer.train()
