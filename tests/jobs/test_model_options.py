"""--compile, --checkpointing and --auto-micro-batch: the same adapter as without them."""

import io

import pytest
import torch
from helpers import stack_of
from rich.console import Console
from safetensors.torch import load_file

import fastforget as ff
from fastforget.compiling import CompiledForward, compile_layers
from fastforget.jobs import unlearn

FORGET = [f"Agent {name} hides the plan below the oak tree." for name in ("Alder", "Birch", "Cedar", "Dogwood")]
RETAIN = [f"Water boils at a hundred degrees in {name}." for name in ("Rome", "Oslo", "Lima")]


def run(tiny, out, **options):
    """(the adapter's weights, what was printed)"""
    printed = io.StringIO()
    options = {"max_steps": 3, "max_length": 48, "lora_r": 4, "batch_size": 4, "learning_rate": 1e-3, **options}
    ff.unlearn(tiny["llama"], FORGET, out, retain=RETAIN, console=Console(file=printed, width=200), **options)
    return load_file(out / "adapter_model.safetensors"), printed.getvalue()


@pytest.mark.parametrize(
    ("backend", "checkpointing", "adapted"),
    [
        ("eager", False, {"bits": 32, "lora_targets": "q_proj"}),
        (None, True, {}),
        pytest.param("aot_eager", True, {}, marks=pytest.mark.slow),
    ],
)
def test_the_same_adapter(tiny, tmp_path, monkeypatch, short_continuations, backend, checkpointing, adapted):
    expected, _ = run(tiny, tmp_path / "plain", **adapted)
    models = []

    def compile_and_limit(model, **options):
        """Compile without a compiler, where that is asked for, and let more than two rows at once not fit."""
        models.append(model)
        if backend is not None:
            compile_layers(model, backend=backend, **options)

        def limit(_module, inputs):
            if torch.is_grad_enabled() and inputs[0].shape[0] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        stack_of(model)[-1].register_forward_pre_hook(limit)

    monkeypatch.setattr(unlearn, "compile_layers", compile_and_limit)
    options = {"compile": True, "checkpointing": checkpointing, "auto_micro_batch": True, "save_steps": 2}
    with pytest.warns(UserWarning, match="with 4 sequences at once; from here on 2 are"):
        found, printed = run(tiny, tmp_path / "all", **options, **adapted)
    assert ("Compiling 2 decoder layers" in printed and "Compiled in" in printed) is (backend is not None)
    layer = stack_of(models[0])[0]
    assert CompiledForward.has_replaced(layer) is (backend is not None)
    assert layer.gradient_checkpointing is checkpointing
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)
