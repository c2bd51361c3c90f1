"""What a causal LM computes on its way, kept from a call of the model as the user gave it, every wrapper included."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastforget.errors import FastforgetError
from fastforget.shards import is_shard, is_sharded

End = Literal["layer", "head", "logits"]  # of a forward
AGAIN = -1  # where states go that enter the head a second time in one forward
HOOK = "fastforget"  # one key for every call: a compiled model's guards compare the keys of hooks


class _LayerReachedError(Exception):
    """Ends a forward whose further layers nobody wants; never leaves this module."""


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a module, hooks around it left; what was there is put back, also after an exception."""
    own = vars(module).get("forward")  # of one that somebody else has replaced (Accelerate, `fastforget.fuse`)
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextlib.contextmanager
def hook_added(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """A forward hook that runs after a module's others, and always has the same key."""
    module._forward_hooks[HOOK] = hook  # type: ignore[index]
    try:
        yield
    finally:
        module._forward_hooks.pop(HOOK, None)  # type: ignore[call-overload]


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Run what torch.compile took as plain Python: for a few tokens, of which no graph shall be made."""
    # without dynamo nothing is compiled yet, and importing it takes seconds
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def let_graphs_see_hooks() -> None:
    """Let torch.compile notice hooks that are added to the modules inside; a setting of the whole process."""
    import torch._dynamo.config as config

    config.skip_nnmodule_hook_guards = False


@contextlib.contextmanager
def without_warning_of_views() -> Iterator[None]:
    """Let FSDP2 not warn that a model's output is a view: nobody writes to the states that are handed through."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        yield


class Captures:
    """Calls a model, and keeps what enters its head and what its layers put out.

    The head's forward hands its input through for that call, so no logits are computed and no row of them is stored.
    What is put in place is the same object at each call: a graph that torch.compile made of one call serves the next.
    """

    def __init__(self, outer: nn.Module, causal_lm: Any) -> None:
        self.outer = outer
        self.causal_lm = causal_lm
        self.sharded = is_sharded(outer)
        self.head: nn.Module = causal_lm.get_output_embeddings()
        wrappers = itertools.takewhile(lambda module: module is not causal_lm, outer.modules())
        self._up_to_head: list[nn.Module] = [*wrappers, causal_lm, self.head]
        self._states: dict[int | None, Tensor] = {}
        self._last: int | None = None  # the layer that ends the forward
        self._with_grad = True
        self._whole_forward: Callable[..., Any] = causal_lm.forward
        self._hooks: dict[int, Callable[..., Any]] = {}

    def around_head(self) -> list[Any]:
        """The head, what calls it, and what users have put around both: hooks, and forwards of their own."""
        found: list[Any] = []
        for module in self._up_to_head:
            hooks = [[*each.values()] for each in (module._forward_pre_hooks, module._forward_hooks)]
            found.append((type(module), vars(module).get("forward"), hooks))
        return found

    def logits_and_dtype(self, inputs: Mapping[str, Any]) -> tuple[Tensor, torch.dtype | None]:
        """The model's own logits (B, T, V), and the dtype that its head put out; None where the head did not run."""
        dtypes: list[torch.dtype] = []
        with hook_added(self.head, lambda _module, _inputs, output: dtypes.append(output.dtype)):
            logits = self.outer(**inputs, use_cache=False).logits
        return logits, dtypes[0] if dtypes else None

    def run(
        self,
        inputs: Mapping[str, Any],
        stack: nn.ModuleList,
        layers: Collection[int],
        end: End,
    ) -> dict[int | None, Tensor]:
        """One forward: the states (B, T, D) that some layers put out by their numbers, and under None what `end` says.

        A layer that does not run is missing from it, and so is None where the model does not call its head.

        Args:
            stack: the decoder layers, of which `layers` are numbers counted from the front.
            end: "head": None is what enters the head; "logits": the model's own logits (B, T, V); "layer": there is no
                None, and the forward ends at the deepest of the layers. Wrappers around the model see it return.

        Raises:
            FastforgetError: the head ran more than once.
        """
        self._last = max(layers) if end == "layer" else None
        self._with_grad = torch.is_grad_enabled()
        try:
            with contextlib.ExitStack() as changes:
                if end == "layer" and any(getattr(each, "gradient_checkpointing", False) for each in stack):
                    for following in stack[max(layers) + 1 :][:1]:
                        changes.callback(following.register_forward_pre_hook(self._stop, prepend=True).remove)
                if self.sharded:
                    changes.enter_context(without_warning_of_views())
                for layer in layers:
                    hook = self._hooks.setdefault(layer, functools.partial(self._keep, layer))
                    changes.enter_context(hook_added(stack[layer], hook))
                if end == "head":
                    changes.enter_context(forward_replaced(self.head, self._hand_through))
                elif end == "layer":
                    # a bound method is made anew at each look, and compares equal
                    if self._whole_forward != self.causal_lm.forward:
                        self._whole_forward = self.causal_lm.forward
                    changes.enter_context(forward_replaced(self.causal_lm, self._forward_to_layer))
                output = self.outer(**inputs, use_cache=False)
            states = dict(self._states)
            if AGAIN in states:
                raise FastforgetError(
                    "the model's head ran more than once in one forward (a hook that calls the model again?), so it is "
                    "not known which states are the batch's: remove that hook while a step runs"
                )
        finally:
            self._states.clear()  # they hold the graph
        return states | {None: output.logits} if end == "logits" else states

    def _hand_through(self, hidden: Tensor, *_arguments: Any, **_named: Any) -> Tensor:
        """The head's forward; tensor parallelism gives it a DTensor, whole in each process."""
        local = hidden.to_local() if is_shard(hidden) else hidden  # type: ignore[attr-defined]
        self._states[AGAIN if None in self._states else None] = local
        return hidden

    def _keep(self, layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """A layer's hook."""
        self._states[layer] = output[0] if isinstance(output, tuple) else output
        # of transformers 5.0 a hook may run inside reentrant checkpointing, where nothing has a gradient yet
        if layer == self._last and torch.is_grad_enabled() == self._with_grad:
            raise _LayerReachedError

    def _stop(self, _module: nn.Module, _inputs: Any) -> None:
        """The next layer's hook, where the one before could not end the forward."""
        if self._last in self._states:
            raise _LayerReachedError

    def _forward_to_layer(self, *arguments: Any, **named: Any) -> Any:
        """The causal LM's forward where it ends at a layer: what that layer puts out."""
        try:
            return self._whole_forward(*arguments, **named)
        except _LayerReachedError:
            return self._states[self._last]
