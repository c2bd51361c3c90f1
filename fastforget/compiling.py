"""Compile a model's decoder layers in place: torch.compile(dynamic=True), one graph for all layers that are alike.

Only the `forward` of each layer is replaced, on the instance, so names, weights, saving and PEFT stay as they are. Not
by `nn.Module.compile`: that compiles the hooks around a layer too, and takes no notice of those that come or go later
(RMU's), and it would compile a generation, whose layers write into a cache.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastforget.backbone import Backbone, training_flags_restored
from fastforget.captures import let_graphs_see_hooks
from fastforget.errors import FastforgetError
from fastforget.fusing import LayerForward
from fastforget.head import base_causal_lm
from fastforget.reference_modes import reference_mode

# graphs of one layer's code: adapter on or off, one row or more, with a mask or without, in training or not, and each
# kind of attention (Gemma's); beyond torch's own limit of 8 it would silently run uncompiled
RECOMPILE_LIMIT = 64
TRIAL_ROWS, TRIAL_TOKENS = 3, 19  # numbers that no other size of a layer is: equal sizes count as one in a graph


class CompiledForward(LayerForward):
    """That of a compiled layer."""


@dataclass
class LayerCompiler:
    """The compiled forwards of one model's layers, which run as they were from the first failure on.

    Attributes:
        backend: of torch.compile.
        failed: a layer could not be compiled.
    """

    backend: str
    failed: bool = False
    compiled: dict[type, Callable[..., Any]] = field(default_factory=dict)

    def run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward of a layer, compiled unless it is given a cache."""
        from torch._dynamo.exc import TorchDynamoException
        from transformers.cache_utils import Cache

        kind = type(layer)
        if self.failed or any(isinstance(given, Cache) for given in (*args, *kwargs.values())):
            return kind.forward(layer, *args, **kwargs)
        if kind not in self.compiled:
            self.compiled[kind] = torch.compile(kind.forward, dynamic=True, backend=self.backend)
        try:
            return self.compiled[kind](layer, *args, **kwargs)
        except TorchDynamoException as error:
            self.give_up(error)
            return kind.forward(layer, *args, **kwargs)

    def give_up(self, error: Exception) -> None:
        """Run every layer as it was, and warn."""
        self.failed = True
        reason = " ".join(str(error).split("\n")[:2])  # of a backend's failure the first line says only that it failed
        warnings.warn(
            f"the decoder layers cannot be compiled, and run as they are, right but slower: {type(error).__name__}: "
            f"{reason}",
            stacklevel=3,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"backend": self.backend, "failed": self.failed, "compiled": {}}  # compiled code cannot be copied


def to_stderr(line: str) -> None:
    """Print a line where progress is shown."""
    print(line, file=sys.stderr, flush=True)


def compile_layers(
    model: nn.Module, *, backend: str = "inductor", progress: Callable[[str], object] | None = to_stderr
) -> bool:
    """Compile every decoder layer of a Hugging Face causal LM for training and for the reference.

    They are compiled now, on a few tokens, forward and backward, with the adapter on and off; batches of other sizes
    compile nothing more, apart from a first one of a single row, or without padding. Layers that are given a cache
    (generation) run as they were. Where compiling fails, a warning says why, and all layers run as they were.

    Two settings of torch.compile change for the whole process: as many as 64 graphs of one function, and graphs that
    notice hooks which are added to the modules inside.

    Args:
        backend: of `torch.compile`.
        progress: called with a line of text before and one after; default they go to standard error.

    Returns:
        Whether the layers are compiled.
    """
    layers = [layer for layer in Backbone(model).stack() if not CompiledForward.has_replaced(layer)]
    if not layers:
        return True
    compiler = LayerCompiler(backend)
    if progress is not None:
        progress(f"Compiling {len(layers)} decoder layers (once, a minute or so) ...")
    start = time.perf_counter()
    try:
        set_up_dynamo()
        for layer in layers:
            if "forward" in vars(layer):
                raise FastforgetError("something else has replaced the forward of a layer")
            CompiledForward.replace(layer, compiler.run)
        try_layers(model)
    except Exception as error:
        if not compiler.failed:
            compiler.give_up(error)
    if compiler.failed:
        for layer in layers:
            if CompiledForward.has_replaced(layer):
                del layer.forward
    elif progress is not None:
        progress(f"Compiled in {time.perf_counter() - start:.0f} s.")
    return not compiler.failed


def set_up_dynamo() -> None:
    """Let torch.compile keep as many graphs as layers need, and notice hooks."""
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    let_graphs_see_hooks()


def try_layers(model: nn.Module) -> None:
    """Send a few tokens through the model and back, and through its reference; gradients and flags stay as they are."""
    causal_lm = base_causal_lm(model)
    embeddings = causal_lm.get_input_embeddings().weight
    ids = torch.arange(TRIAL_ROWS * TRIAL_TOKENS, device=embeddings.device).view(TRIAL_ROWS, -1) % len(embeddings)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0

    def states() -> Tensor:
        return causal_lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]

    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with training_flags_restored(model), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            model.train()
            with torch.enable_grad():
                final = states()
                if final.requires_grad:
                    for parameter, _ in before:
                        parameter.grad = None
                    final.float().square().mean().backward()
            if hasattr(model, "peft_config"):
                with reference_mode(model):
                    states()
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
