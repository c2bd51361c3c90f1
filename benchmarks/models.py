"""Every causal LM class of transformers: a random model of each, and its loss and gradients by full logits and by ours.

    python -m benchmarks.models [--only llama,bert]

Writes benchmarks/results/models.md. The exit code is 1 where a class is wrong, or fewer than 140 are right.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import fastforget as ff
from benchmarks.tables import table

RESULTS = Path(__file__).parent / "results" / "models.md"
SECONDS = 90  # of one class, most of which building a configuration that did not become small takes
BOUND = 1e-4  # of the loss, and of the gradients' norm; all is float32
NEEDED = 140
VOCABULARY, TOKENS = 320, 20
# under all the names that configurations give them
SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    64: "hidden_size n_embd d_model embedding_size word_embed_proj_dim",
    128: "intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp "
    "max_position_embeddings n_positions",
    2: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_key_value_heads num_kv_heads "
    "num_experts_per_tok",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_local_experts "
    "num_experts n_routed_experts",
    16: "head_dim query_pre_attn_scalar q_lora_rank kv_lora_rank v_head_dim rotary_dim hidden_size_per_layer_input",
    32: "moe_intermediate_size shared_expert_intermediate_size",
    8: "qk_rope_head_dim qk_nope_head_dim state_size",
    1: "n_group topk_group pretraining_tp",
    0: "num_kv_shared_layers",
}
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BY_LAYER = ("layer_types", "mlp_layer_types", "block_types", "attention_types", "no_rope_layers")


@dataclass
class Finding:
    """One class: how its logits are had, and how far its loss and gradients are from those of full logits."""

    name: str
    path: str = ""
    joint: str = ""  # how both sides go through it in one forward
    loss_error: float | None = None
    gradient_error: float | None = None
    joint_error: float | None = None  # of the gradients, against the passes one after the other
    note: str = ""

    @property
    def errors(self) -> tuple[float | None, ...]:
        """Those of the loss, of the gradients and of the joint pass."""
        return self.loss_error, self.gradient_error, self.joint_error

    @property
    def is_right(self) -> bool:
        """Whether it was tried, and both errors are rounding."""
        return all(error is not None and error <= BOUND for error in self.errors)

    @property
    def is_wrong(self) -> bool:
        """Whether it was tried, and an error is more than rounding."""
        return self.loss_error is not None and not self.is_right


def main(arguments: list[str] | None = None) -> int:
    """Try every class, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, separated by commas; nothing is written")
    only = (parser.parse_args(arguments).only or "").split(",")
    transformers.logging.set_verbosity_error()
    findings = []
    for model_type, name in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if only == [""] or model_type in only:
            findings.append(try_class(model_type, name if isinstance(name, str) else name[0]))
            print(findings[-1], flush=True)
    right, wrong = sum(each.is_right for each in findings), [each.name for each in findings if each.is_wrong]
    if only == [""]:
        RESULTS.write_text(report(findings))
    print(f"{right} right; wrong: {', '.join(wrong) or 'none'}")
    return int(bool(wrong) or (only == [""] and right < NEEDED))


def try_class(model_type: str, name: str) -> Finding:
    """Build a small random model, and compare."""
    finding = Finding(f"{name} ({model_type})")
    model = None
    try:
        with time_limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = getattr(transformers, name)._from_config(small_config(model_type)).eval()
            model(
                input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=False
            )  # what cannot run at all says nothing about us
    except Exception as error:
        finding.note = f"not built at this size: {first_line(error)}"
        return finding
    try:
        with time_limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compare(model, finding)
    except Exception as error:
        finding.note = f"refused: {first_line(error)}"
    finally:
        del model
        gc.collect()
    return finding


def compare(model: Any, finding: Finding) -> None:
    """Fill in the path, and the errors of the loss and of all gradients."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY - 5, (2, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -10:] = 0  # so much padding that packing pays
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    unlearn = ff.UnlearnLoss(model, [ff.CE()])
    ours = unlearn({**batch, "labels": torch.full_like(ids, -100)}, batch).loss
    finding.path = "own logits" if unlearn.backbone.head.is_identity else "fused"
    found = gradients(model, ours)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()[:, :-1]
    labels = batch["labels"][:, 1:]
    full = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    finding.loss_error = float((ours - full).detach().abs() / full.detach().abs())
    finding.gradient_error = difference(found, gradients(model, full))
    other = {**batch, "input_ids": ids.flip(0, 1), "attention_mask": mask.flip(0), "labels": ids.flip(0, 1)}
    other["labels"] = other["labels"].masked_fill(other["attention_mask"] == 0, -100)
    passes = {}
    for name in ("sequential", "joint"):
        unlearn = ff.UnlearnLoss(model, [ff.NegatedCE(weight=0.5), ff.CE()], passes=name)
        passes[name] = gradients(model, unlearn(other, batch).loss)
    finding.joint = "packed" if unlearn.backbone.packs() else "padded"
    finding.joint_error = difference(passes["joint"], passes["sequential"])


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    """Return the gradients of a loss by the names of the weights that have one."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the norm of the difference of all gradients, relative to that of the expected ones."""
    nothing = torch.zeros(())
    differences = [(found.get(name, nothing) - expected.get(name, nothing)).norm() for name in found | expected]
    return float(torch.stack(differences).norm() / torch.stack([each.norm() for each in expected.values()]).norm())


def small_config(model_type: str) -> Any:
    """The default configuration, as small as attributes of the usual names make it."""
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]()
    for part in {id(each): each for each in (config, config.get_text_config(decoder=True))}.values():
        for size, names in SIZES.items():
            for name in names.split():
                set_where_given(part, name, size)
        if getattr(part, "qk_rope_head_dim", None):
            set_where_given(part, "head_dim", part.qk_rope_head_dim)  # of which the rotary table is made
        if getattr(part, "kv_lora_rank", None):  # latent attention: each head has keys of its own
            set_where_given(part, "num_key_value_heads", part.num_attention_heads)
        for name, value in TOKEN_IDS.items():
            if name in dir(part):
                setattr(part, name, value)
        for name in BY_LAYER:
            given = getattr(part, name, None)
            if isinstance(given, list) and len(given) > 2:
                setattr(part, name, given[:2])
        if getattr(part, "is_decoder", None) is False:
            part.is_decoder = True
    return copy.deepcopy(config)


def set_where_given(config: Any, name: str, value: int) -> None:
    """Set a number that the configuration has."""
    if isinstance(getattr(config, name, None), int):
        with contextlib.suppress(Exception):  # some are computed from others
            setattr(config, name, value)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError where the block takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the beginning of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:100]}"


def written(error: float | None) -> str:
    """Write an error to one digit; a dash where there is none."""
    return "–" if error is None else f"{error:.0e}"


def report(findings: list[Finding]) -> str:
    """Write the table: first what was tried, then what could not be."""
    tried = [each for each in findings if each.loss_error is not None]
    rows = [
        [
            each.name,
            each.path,
            *map(written, (each.loss_error, each.gradient_error)),
            each.joint,
            written(each.joint_error),
        ]
        for each in tried
    ]
    others = [f"* {each.name}: {each.note}" for each in findings if each.loss_error is None]
    right, fused = sum(each.is_right for each in findings), sum(each.path == "fused" for each in findings)
    parts = [
        "# Causal LM classes",
        f"transformers {transformers.__version__}, torch {torch.__version__}, float32, on the CPU. Random models, "
        f"{VOCABULARY} tokens; relative errors of the loss and of all gradients against full logits. {right} of "
        f"{len(findings)} are right, {len(tried) - right} wrong; {fused} on the fused path, the others by the model's "
        "own logits. The last two columns: `passes='joint'`, and its gradients' difference from passes one after the "
        f"other; {sum(each.joint == 'packed' for each in findings)} keep packed documents apart.",
        "\n".join(table(["class (model type)", "path", "loss", "gradients", "joint", "difference"], rows)),
        "Not tried:",
        "\n".join(others),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
