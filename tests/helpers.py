"""What several test files use: models with an adapter that does something, batches, and looks at what they computed."""

import copy
import json
import tracemalloc
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import fastforget as ff
from fastforget.batch import check_batch, prepare
from fastforget.data.examples import Example, ExampleStream

CPU = torch.device("cpu")
VOCABULARY = 320
FORGET = [f"Agent {name} hides the plan below the oak tree." for name in ("Alder", "Birch", "Cedar", "Dogwood")]
RETAIN = [f"Water boils at a hundred degrees in {name}." for name in ("Rome", "Oslo", "Lima")]
QUICK = {"max_steps": 3, "max_length": 48, "bits": 32, "lora_r": 4, "quiet": True}  # options of a job


def tiny_model(kind, **changes):
    """A random model of two layers; `changes` are named as Llama's."""
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    size |= {"initializer_range": 0.2, **changes}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **size))
    size.pop("num_key_value_heads")
    renamed = {"ffn_dim": size.pop("intermediate_size"), "init_std": size.pop("initializer_range")}
    return OPTForCausalLM(OPTConfig(word_embed_proj_dim=size["hidden_size"], **renamed, **size))


def make_batch(rows, seed, width=20, prompt=5):
    """Random ids; a prompt without labels; row 0 is shorter than the others (right padding)."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCABULARY, (rows, width), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    labels[:, :prompt] = -100
    attention_mask[0, width - 6 :] = 0
    labels[0, width - 6 :] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def load_perturbed(folder, bits=32, seed=1, **lora):
    """A model whose adapter is not at its initial zero, in training mode."""
    torch.manual_seed(seed)  # PEFT draws lora_A
    model = ff.load(folder, bits=bits, lora={"r": 4, "target_modules": "all-linear", **lora}).train()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def reference_of(model):
    """A copy of the model with its adapter off."""
    reference = copy.deepcopy(model)
    reference.base_model.disable_adapter_layers()
    return reference


@dataclass(kw_only=True)
class BreaksAt(ff.NegatedCE):
    """NaN from its n-th value on."""

    step: int
    seen: int = 0

    def value(self, stats):
        self.seen += 1
        return super().value(stats) * (torch.nan if self.seen >= self.step else 1.0)


def same(first, second):
    """Whether two state dicts hold the same tensors, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def adapter_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def write_rows(path, rows):
    """Write a JSONL file of rows, of texts alone too."""
    path.write_text("".join(json.dumps({"text": row} if isinstance(row, str) else row) + "\n" for row in rows))
    return path


def traced_peak(stream):
    """Most bytes of Python objects at once while a stream is read, and how many labels it has."""
    stream.head(200)
    tracemalloc.start()
    labels = sum(example.label_count for example in stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, labels


def counting_stream(count):
    """A stream of `count` examples, each of its own, and a list of how many were read in each pass."""
    passes = []

    def read():
        passes.append(0)
        for number in range(count):
            passes[-1] += 1
            yield Example((number, number))

    return ExampleStream(read, "numbers"), passes


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_gradients(ours, expected, bound=1e-5):
    """The same parameters have a gradient, and none is off by `bound` of its length."""
    assert ours.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        assert float((ours[name] - gradient).norm()) < bound * float(gradient.norm()), name


def assert_follows(formula, model, terms, *sides, bound=2e-5, rounding=0.0, micro_batches=(None,), **options):
    """The loss of a step and every LoRA gradient are those of `formula()`, however the batch is cut."""
    model.zero_grad()
    loss = formula()
    loss.backward()
    expected = gradients(model)
    for micro_batch in micro_batches:
        model.zero_grad()
        step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.1, **options)
        out = step.backward(*sides, micro_batch=micro_batch)
        assert float(out.loss) == pytest.approx(float(loss.detach()), rel=1e-5, abs=rounding)
        assert_gradients(gradients(model), expected, bound)
    return expected


def token_log_probs(model, batch):
    """(B, T-1) log-probs of the next tokens and the mask of those that are labelled, from the model's own logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    log_probs = logits.log_softmax(-1)
    return log_probs, log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0], labels != -100


def with_known_labels(model, batch):
    """The batch with every other label the token that the model holds likeliest: random ones it hardly knows."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"].clone()
    labels[:, 1:][:, ::2] = torch.where(labels[:, 1:] == -100, -100, logits[:, :-1].argmax(-1))[:, ::2]
    return {**batch, "labels": labels}


def prepared(batch, name="the forget batch", vocabulary=None):
    """A batch checked and made ready on the CPU, for a model that takes `position_ids`."""
    return prepare(check_batch(batch, name, vocabulary), CPU)


def stack_of(model):
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)


class NoLooking(TorchDispatchMode):
    """Refuses what brings a value to the host, or needs one to know its own size."""

    REFUSED = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        assert name not in self.REFUSED, f"{name} synchronises"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "a boolean index"
        if name == "repeat_interleave":
            assert (kwargs and "output_size" in kwargs) or isinstance(args[1], int), "its size is on the device"
        return function(*args, **(kwargs or {}))


def random_model(family, tokenizer, context=512):
    """A random model with weights large enough that its next token depends on the prompt, in training mode."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    size |= {"vocab_size": len(tokenizer), "max_position_embeddings": context, "initializer_range": 0.3}
    return tiny_model(family, **size, **ids).train()


def with_lora(model):
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return wrapped.train()


def run_command(monkeypatch, capsys, *arguments):
    """Run `fastforget` in this process; returns its exit code, its output, and the lines of its error stream."""
    from fastforget import cli

    monkeypatch.setattr("sys.argv", ["fastforget", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip().splitlines()
