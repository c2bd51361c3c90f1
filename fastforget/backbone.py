"""From a batch to the hidden states that enter the head, for any Hugging Face causal LM."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastforget.batch import CheckedBatch, PreparedSide, prepare, rows_of
from fastforget.captures import Captures, End, let_graphs_see_hooks, uncompiled
from fastforget.collectives import any_process, failures_told, process_count
from fastforget.errors import FastforgetError, NonFiniteLossError
from fastforget.head import LMHead, base_causal_lm, context_length, is_compiled, unwrapped
from fastforget.layouts import (
    MOVED,
    documents_stay_apart,
    longest_row,
    moved_by_padding,
    names_positions,
    packing_pays,
)
from fastforget.shards import check_engine, check_shards, is_shard, is_sharded, reshard

CHECK_TOKENS = 16


def every_module(model: nn.Module) -> list[nn.Module]:
    """Each module of a model once, in no order: `modules()` takes ten times as long, as it makes up their names."""
    found = {model: None}
    waiting = [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return list(found)


@contextlib.contextmanager
def training_flags_restored(model: nn.Module) -> Iterator[None]:
    """Put every module's `training` flag back at the end, also after an exception."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout off; every module's `training` flag is restored, also after an exception.

    transformers drops out in dropout modules and, as OPT does, in functions that look at the flag of the module around
    them: both go to evaluation mode. Other modules without children keep the mode they are in: they hold the weights,
    and bitsandbytes' 8-bit layers compute something else in evaluation mode (they quantise the activations too).
    """
    switched = [
        module
        for module in every_module(model)
        if module.training and (module._modules or isinstance(module, nn.modules.dropout._DropoutNd))
    ]
    try:
        for module in switched:
            module.training = False
        yield
    finally:
        for module in switched:
            module.training = True


def place_of(number: int, count: int) -> int:
    """A layer's number counted from the front, of `count` layers; raises FastforgetError where there is none."""
    if not -count <= number < count:
        raise FastforgetError(f"the model has no layer {number}: its layers are 0 to {count - 1}")
    return number % count


class Backbone:
    """The model up to its head, and the head as an `LMHead`.

    Every forward is a call of the model as it was given, its outermost wrapper included (torch.compile's,
    DistributedDataParallel's, what Accelerate puts around `forward` for autocast), and the user's hooks run.

    On the first batch the head checks itself: its logits of a few tokens against the model's own. Where they differ the
    model does something between its states and its logits that `LMHead` does not know; then, with a warning, the
    model's own logits are used (`LMHead(None)`): slower and larger, still right. It is checked again where a hook or
    another forward was put on the head since, or on what calls it.

    Where FSDP2 shards the model each method that runs it must be called in all processes, and the head's weight is a
    shard but within `whole_head`.

    Args:
        model: a Hugging Face causal LM, wrapped or not; `Backbone.model` is the one inside, a PeftModel where it has an
            adapter.

    Raises:
        FastforgetError: what `LMHead.from_model` and `check_shards` refuse.
    """

    def __init__(self, model: Any) -> None:
        check_engine(model)
        self.model = unwrapped(model)
        self.sharded = is_sharded(self.model)
        reshard(self.model)
        check_shards(self.model)
        self.head = self.read_head()
        self.checked = False
        self.changes = 0  # how often something around the head became another
        self._captures = Captures(model, base_causal_lm(self.model))
        self._around_head = self._captures.around_head()
        self._takes_positions: bool | None = None
        self._packs: bool | None = None
        if is_compiled(model):
            let_graphs_see_hooks()

    @property
    def outer(self) -> nn.Module:
        """The model as it was given."""
        return self._captures.outer

    @property
    def device(self) -> torch.device:
        """Where the batch goes: where the token embeddings lie."""
        return base_causal_lm(self.model).get_input_embeddings().weight.device

    @property
    def shares_batches(self) -> bool:
        """Whether all processes work on one batch, as a head with a shard of the vocabulary in each says."""
        shard = self.head.shard
        return shard is not None and dist.get_world_size(shard.group) == process_count()

    def failures_told(self) -> contextlib.AbstractContextManager[None]:
        """As `collectives.failures_told` where all processes work on one batch; else nothing."""
        return failures_told() if self.shares_batches else contextlib.nullcontext()

    @property
    def vocabulary(self) -> int:
        """The number of logits."""
        return base_causal_lm(self.model).get_output_embeddings().weight.shape[0]

    @contextlib.contextmanager
    def whole_head(self, needed: bool = True) -> Iterator[None]:
        """Have all of the head's weight, gathered once for all sweeps within, where processes hold shards of it."""
        if not needed or self.head.is_identity or not is_shard(self.head.weight):
            yield
            return
        shard = self.head
        self.head = shard.gathered()
        try:
            yield
        finally:
            if not self.head.is_identity:  # as a check may have left it
                self.head = shard

    def fill_in(self, layers: Collection[int | None], trains_head: bool = False) -> Tensor:
        """Take part in a forward to these layers that other processes run: 0, with a graph like theirs.

        Args:
            trains_head: the head, if it trains, is in that graph.
        """
        ids = torch.ones((1, 2), dtype=torch.int64, device=self.device)
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        states = self.states({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (nothing, nothing), layers)
        parts = [state.float().sum() for state in states.values()]
        if trains_head and not self.head.is_identity:
            parts += [each[:0].float().sum() for each in (self.head.weight, self.head.bias) if each is not None]
        return torch.stack(parts).sum()

    def prepare(self, batch: CheckedBatch) -> PreparedSide | None:
        """A checked batch, made ready for this model; None where it has no label. Raises as `check_tokens`."""
        self.check_tokens(batch)
        return prepare(batch, self.device, self.takes_positions)

    def check_tokens(self, batch: CheckedBatch) -> None:
        """Raise FastforgetError for a token without an embedding; warn of rows longer than the model's context.

        They are no error: many models go on beyond what their config says, if badly.
        """
        ids = batch.inputs["input_ids"].cpu()
        known = base_causal_lm(self.model).get_input_embeddings().weight.shape[0]
        wrong = ids[(ids < 0) | (ids >= known)]
        if len(wrong):
            raise FastforgetError(
                f"{batch.name} has token {int(wrong[0])}, and the model has embeddings of {known} tokens: the "
                "tokenizer is another model's, or its new tokens have none yet (resize_token_embeddings)"
            )
        context = context_length(self.model)
        if context is not None and ids.shape[1] > context:
            longest = int((batch.inputs["attention_mask"] != 0).sum(dim=1).max())
            if longest > context:
                warnings.warn(
                    f"{batch.name} has a row of {longest} tokens, and the model's context is {context}: cut it "
                    "(ff.examples(..., max_length=...)), as it says nothing useful beyond, or fails",
                    stacklevel=2,
                )

    def takes_positions(self) -> bool:
        """Whether left padding changes nothing once `position_ids` count without it.

        The model must take them, and is tried once, with and without padding: convolutions may see through a mask.
        """
        if self._takes_positions is None:
            causal_lm = base_causal_lm(self.model)
            self._takes_positions = names_positions(causal_lm) and moved_by_padding(self.trial, causal_lm) < MOVED
        return self._takes_positions

    def packs(self, tokens: int = 0) -> bool:
        """Whether documents in one row of so many tokens, told apart by `position_ids` alone, are as in their own.

        That is up to the attention: most of transformers' classes let eager, SDPA, FlashAttention and flex do so,
        convolutions and state spaces do not. The model is tried once.
        """
        if self._packs is None:
            causal_lm = base_causal_lm(self.model)
            packs = names_positions(causal_lm) and documents_stay_apart(self.trial, causal_lm)
            if self.head.shard is not None:  # each process looks at logits of its own
                packs = not any_process(not packs, self.device)
            self._packs = packs
        return self._packs and tokens <= longest_row(base_causal_lm(self.model).config.get_text_config())

    def trial(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (1, T, V) of a few tokens, in float32: no gradients, no dropout, nothing compiled."""
        with torch.no_grad(), without_dropout(self.model), uncompiled():
            logits = self._captures.run(inputs, nn.ModuleList(), (), "logits")[None]
        return logits.float()

    def packing_pays(self, packed: torch.Size, padded: torch.Size) -> bool:
        """Whether one row of N tokens (1, N) takes less than padded rows (B, T) in this model."""
        return packing_pays(base_causal_lm(self.model).config.get_text_config(), packed, padded)

    def states(
        self, inputs: dict[str, Any], positions: tuple[Tensor, Tensor], layers: Collection[int | None] = (None,)
    ) -> dict[int | None, Tensor]:
        """Hidden states (n, D) by layer, at positions of the batch: the row and the column (n,) of each.

        Without None among the layers the forward ends at the deepest of them: neither later layers nor the final norm
        run, and the head is not checked.

        Args:
            layers: None is what enters the head (after a failed check: logits (n, V)); a number is what that decoder
                layer puts out, counted as in the model's own list of layers, -1 the last.

        Raises:
            FastforgetError: a layer that the model does not have, or that its forward left out (layer drop); a head
                that it did not call; or states of other positions than the batch's (`logits_to_keep` among its keys).
        """
        wanted = {layer for layer in layers if layer is not None}
        stack = self.stack() if wanted else nn.ModuleList()
        numbers: dict[int, list[int]] = {}  # place in the stack -> what the caller calls it
        for number in wanted:
            numbers.setdefault(place_of(number, len(stack)), []).append(number)
        to_the_end = None in layers
        if to_the_end:
            self.check_once(inputs)
        end: End = "layer" if not to_the_end else "logits" if self.head.is_identity else "head"
        states = self._captures.run(inputs, stack, numbers, end)
        captured: dict[int | None, Tensor] = {}
        for place in numbers.keys() & states.keys():
            captured |= dict.fromkeys(numbers[place], states[place])
        for number in wanted - captured.keys():
            raise FastforgetError(f"layer {number} did not run in this forward: switch layer drop off")
        if to_the_end:
            if None not in states:
                raise FastforgetError(
                    "the model did not call the head that it had when it was given: if that was replaced "
                    "(resize_token_embeddings), make a new UnlearnStep or UnlearnLoss, or call step.attach(model)"
                )
            # autocast leaves the states in another dtype than the head's, and casts both
            captured[None] = states[None] if self.head.is_identity else states[None].to(self.head.weight.dtype)
        expected = inputs["input_ids"].shape
        for layer, state in captured.items():
            if state.shape[:2] != expected:  # indexed with the batch's positions, other tokens would be taken
                raise FastforgetError(
                    f"the states that {'enter the head' if layer is None else f'layer {layer} puts out'} are "
                    f"{tuple(state.shape)}, and the batch is {tuple(expected)}: there must be one for each of its "
                    "tokens (leave logits_to_keep out; DataParallel is not supported)"
                )
        return {layer: state[positions] for layer, state in captured.items()}

    def layer(self, number: int) -> nn.Module:
        """One decoder layer, by its number in the model's own list of layers."""
        stack = self.stack()
        return stack[place_of(number, len(stack))]

    def check_layers(self, layers: Iterable[int | None]) -> None:
        """Raise FastforgetError for a layer that the model does not have."""
        for number in layers:
            if number is not None:
                self.layer(number)

    def stack(self) -> nn.ModuleList:
        """The model's list of decoder layers."""
        causal_lm = base_causal_lm(self.model)
        count = causal_lm.config.get_text_config().num_hidden_layers
        stacks = [m for m in causal_lm.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        if not stacks:
            raise FastforgetError(f"{type(causal_lm).__name__} has no list of {count} layers, so none can be taken")
        return stacks[0]

    def read_head(self) -> LMHead:
        """The head as the model has it now; of a vocabulary that processes share, this one's part."""
        head = LMHead.from_model(self.model)
        return head if self.sharded else head.own_part()

    def check_again(self) -> None:
        """Let the next forward check the head where something around it became another in any process; all must ask."""
        if any_process(self.checked and self._captures.around_head() != self._around_head, self.device):
            self.checked = False
            self.changes += 1

    def check_once(self, inputs: dict[str, Any]) -> None:
        """Check the head on the first batch, and on one before which something around it became another."""
        around = self._captures.around_head()
        together = self.sharded or self.head.shard is not None
        if self.checked and (together or around == self._around_head):
            return
        self.changes += self.checked
        if not self.head.is_identity:
            self.check(inputs)
        elif not self.sharded:  # where the head is gathered around this call; the model's own logits stay right
            self.head = self.read_head()
            self.check(inputs)
        self._around_head = around

    def check(self, inputs: dict[str, Tensor]) -> None:
        """Compare the head with the model's own logits, on the first row's last tokens; costs two short forwards."""
        causal_lm = base_causal_lm(self.model)
        size = inputs["input_ids"].shape[0]
        # only ids: a short row of its own, so that no other input has to be cut to fit
        short = {"input_ids": inputs["input_ids"][:1, -CHECK_TOKENS:]}
        if set(inputs) - {"input_ids", "attention_mask", "position_ids"}:
            short = rows_of(inputs, slice(1), size)
        with torch.no_grad(), without_dropout(self.model), uncompiled(), self.whole_head():
            own, dtype = self._captures.logits_and_dtype(short)
            own = own.float()
            if own.shape[-1] == self.vocabulary:
                own = own[..., self.head.own_tokens]
            try:
                hidden = self._captures.run(short, nn.ModuleList(), (), "head").get(None)
            except (RuntimeError, TypeError, ValueError, IndexError):
                hidden = None  # what follows the head wants logits of their size, or calls it again
            fits = hidden is not None and hidden.shape == (*own.shape[:2], self.head.weight.shape[1])
            ours = self.head.own_logits(hidden) if fits and hidden is not None else torch.full_like(own, torch.nan)
        precision = 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2
        if not own.isfinite().all():
            raise NonFiniteLossError(
                "the model's own logits are not finite on the first batch: the model itself is broken"
            )
        difference = float((ours - own).abs().max())
        differs = not difference <= precision * max(1.0, float(own.abs().max()))
        if any_process(differs, self.device) if self.sharded or self.head.shard is not None else differs:
            found = f"{type(causal_lm).__name__}: logits from its head differ from its own by {difference:.3g}"
            if self.head.shard is not None:
                raise FastforgetError(
                    f"{found}, and of these each process may hold a part: remove what changes them (a hook, another "
                    "forward), or do not shard the head"
                )
            warnings.warn(
                f"{found}; using the model's own logits instead (slower and larger, still right)", stacklevel=2
            )
            self.head = LMHead(None)
        self.checked = True
