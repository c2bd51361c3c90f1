"""A guard over the steps of an optimizer: none is taken on NaN, and an update that led to NaN is taken back.

The loss and the gradient of a step say whether the weights *that it began with* can be computed with. Where they can,
these weights are kept as the last good ones, and the update is made. Where they cannot, the batch may be bad, or the
last update: no update is made, and the weights become the last good ones. Nothing here waits for the device: what is to
happen is decided there (`copy_where`), and the host reads a handful of numbers when the next step begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from fastforget.errors import DivergenceError, FastforgetError, NonFiniteLossError, RetainNLLError
from fastforget.objectives import Term, reaches_head
from fastforget.output import UnlearnOutput
from fastforget.shards import local, whole

SKIPPED = "unlearn_skipped"  # in an optimizer's first group, where `state_dict` carries it
LOSS, GRADIENT, RETAIN, WEIGHTS = "loss", "gradient", "retain NLL", "adapter's weights"


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """When an `UnlearnStep` gives up.

    Args:
        bad_steps: after so many skipped steps in a row. Two good ones end a row: the first begins with weights that
            were known to be good.
        max_retain_nll: at the first step whose retain batch has an NLL above it (nats per label token); None: never.

    Raises:
        FastforgetError: a number out of its range.
    """

    bad_steps: int = 3
    max_retain_nll: float | None = None

    def __post_init__(self) -> None:
        if self.bad_steps < 1:
            raise FastforgetError(f"bad_steps must be at least 1, not {self.bad_steps}")
        if self.max_retain_nll is not None and not 0 < self.max_retain_nll < math.inf:
            raise FastforgetError(f"max_retain_nll must be positive and finite, not {self.max_retain_nll}")

    def check(self, terms: Sequence[Term]) -> None:
        """Raise FastforgetError where the retain NLL is bounded and these terms do not compute it."""
        answers = [term for term in terms if term.on == "retain" and "answer" in term.streams]
        if self.max_retain_nll is not None and not (answers and reaches_head(answers)):
            raise FastforgetError("max_retain_nll: no term computes the NLL of the retain set's answers; add one (ce)")


@dataclass
class Reading:
    """Numbers of a step on their way to the host."""

    names: tuple[str, ...]
    values: Tensor  # (len(names),) float32, on the CPU once `copied` has come to pass
    copied: torch.cuda.Event | None
    step: int  # from 1
    begins: bool  # they say whether the weights that the step began with are good
    ends: bool  # the update has been made, or undone

    def numbers(self) -> dict[str, float]:
        """The numbers by name."""
        if self.copied is not None:
            self.copied.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


class Guard:
    """Watches the steps of an optimizer whose first group counts them in `unlearn_steps`.

    It holds one more copy of the parameters: the last good ones. A skipped step leaves the parameters as they were when
    the loss was last finite, and counts in `skipped`; the optimizer's own state takes a gradient of 0.

    Args:
        settings: None: it watches nothing.
        optimizer: the base optimizer.
    """

    def __init__(self, settings: GuardSettings | None, optimizer: torch.optim.Optimizer) -> None:
        self.settings, self.optimizer = settings, optimizer
        self.good_steps = 0  # after so many steps the parameters were the last good ones
        self._good: list[Tensor] = []
        self._good_of: list[Tensor] = []
        self._best: list[Tensor] = []
        self._best_figure = math.inf
        self._bad_in_a_row = self._good_in_a_row = 0
        self._reading: Reading | None = None
        self._is_good: Tensor | None = None  # () bool, of the step that is being made
        self._unread: dict[str, Tensor] = {}
        self._forget_noted()

    @property
    def skipped(self) -> int:
        """How many steps were skipped, as far as the host knows (`settle` reads the last one too)."""
        return self.optimizer.param_groups[0].get(SKIPPED, 0)

    @property
    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _forget_noted(self) -> None:
        self._loss: Tensor | None = None
        self._retain: Tensor | None = None
        self._means = 0
        self._inspected = False

    def note(self, out: UnlearnOutput, is_part: bool) -> None:
        """Take what one backward computed: parts of a batch's means add up to them, means of their own do not."""
        if self.settings is None:
            return
        self._inspected = False
        self._means += not is_part
        self._loss = out.loss if self._loss is None else self._loss + out.loss
        if "retain_nll" in out.stats:
            value = out.stats["retain_nll"]
            self._retain = value if self._retain is None else self._retain + value

    def before_update(self, scaled: bool = False) -> None:
        """Judge the loss and the gradient that the step is about to use; a bad gradient becomes 0.

        Args:
            scaled: a scaler is in between, which looks for infinite gradients itself, skips the step and lowers its
                scale: they are left to it, and only the loss is judged.

        Raises:
            NonFiniteLossError, RetainNLLError: as `settle`, of the step before.
        """
        if self.settings is None or self._inspected or self._loss is None:
            return
        self.settle()
        with torch.no_grad():
            self._hold()
            self._unread = self._noted()
            gradients = [each.grad for each in self._parameters if each.grad is not None and not scaled]
            if not scaled:
                self._unread[GRADIENT] = norm(gradients, self._parameters[0].device)
            self._is_good = self._judge(self._unread)
            blend_where(self._is_good, self._good, self._good_of)
            zero_where(~self._is_good, gradients)
        self._inspected = True

    def around(self, closure: Callable[[], float]) -> Callable[[], float]:
        """A closure whose gradient is judged each time."""

        def judged() -> float:
            loss = closure()
            self.before_update()
            return loss

        return judged

    def after_update(self) -> Tensor | None:
        """Undo the update where it was none, or broke the parameters; whether it stands, () bool on the device."""
        if self._is_good is None:
            return None
        with torch.no_grad():
            weights = norm(self._good_of, self._is_good.device)
            stands = self._is_good & weights.isfinite()
            copy_where(~stands, self._good_of, self._good)
        self._send({**self._unread, WEIGHTS: weights}, begins=bool(self._unread), ends=True)
        self._is_good = None
        self._forget_noted()
        return stands

    def without_update(self) -> None:
        """Gradients were cleared: where no step used them (a scaler skips some), a bad loss counts all the same."""
        if self._loss is not None and not self._inspected:
            self.settle()
            with torch.no_grad():
                self._hold()
                numbers = self._noted()
                copy_where(~self._judge(numbers), self._good_of, self._good)
            self._send(numbers, begins=False, ends=False)
        self._is_good, self._unread = None, {}
        self._forget_noted()

    def check(self) -> None:
        """Judge and read at once what `step` would judge and the next one read; raise as `settle`."""
        self.before_update()
        if self._unread:
            self._send(self._unread, begins=True, ends=False)
            self.settle()

    def settle(self) -> None:
        """Read what the last step sent; the host waits where it is still to be computed.

        Raises:
            NonFiniteLossError: so many steps in a row were skipped as the settings allow.
            RetainNLLError: the retain NLL was above its bound. In both cases the parameters are the last good ones.
        """
        reading, self._reading = self._reading, None
        if reading is None or self.settings is None:
            return
        numbers = reading.numbers()
        bad = self.verdict(numbers)
        of_the_update = bad is not None and bad[1].startswith(f"the {WEIGHTS}")
        if reading.begins and (bad is None or of_the_update):
            self.good_steps = reading.step - 1
        if bad is None:
            self._good_in_a_row += reading.ends
            self._bad_in_a_row *= self._good_in_a_row < 2
            return
        error, what = bad
        when = f"{'after the update of' if of_the_update else 'at'} step {reading.step}"
        if error is NonFiniteLossError:
            self._good_in_a_row = 0
            self._bad_in_a_row += 1
            self.optimizer.param_groups[0][SKIPPED] = self.skipped + 1
            if self._bad_in_a_row < self.settings.bad_steps:
                return
            if self._bad_in_a_row > 1:
                when += f", the last of {self._bad_in_a_row} in a row"
        raise self.give_up(error, f"{what} {when}")

    def verdict(self, numbers: Mapping[str, float]) -> tuple[type[DivergenceError], str] | None:
        """Say what is wrong with numbers of a step, and by which error; None where nothing is."""
        what = first_not_finite(numbers)
        if what is not None:
            return NonFiniteLossError, f"the {what}"
        bound = None if self.settings is None else self.settings.max_retain_nll
        if bound is not None and numbers.get(RETAIN, 0.0) > bound:
            return RetainNLLError, f"the retain NLL rose to {numbers[RETAIN]:.2f}, above {bound:g},"
        return None

    def give_up(self, error: type[DivergenceError], what: str) -> DivergenceError:
        """Put the last good parameters back; return the error to raise."""
        copy(self._good_of, self._good)
        self._is_good, self._unread = None, {}
        self._forget_noted()
        advice = f"the adapter is as it was after {self.good_steps} steps (a lower learning rate may help)"
        return error(f"{what}; {advice}", self.good_steps)

    def accept(self) -> None:
        """Take the parameters as they are for good ones: the caller has computed something with them."""
        self._hold()
        copy(self._good, self._good_of)
        self.good_steps = self.optimizer.param_groups[0]["unlearn_steps"]

    def begin(self) -> None:
        """Drop the last good parameters and what is known of steps: others have been, or are about to be, loaded."""
        self._good, self._good_of = [], []
        self._bad_in_a_row = self._good_in_a_row = 0
        self._reading = self._is_good = None
        self._unread = {}
        self._forget_noted()

    def keep_best(self, figure: float) -> bool:
        """Keep a copy of the parameters where a figure of the caller's is the lowest so far; whether it is."""
        if not figure < self._best_figure:  # NaN is not
            return False
        self._best_figure = figure
        self._best = [each.detach().clone() for each in self._parameters]
        return True

    def restore_best(self) -> float:
        """Put the parameters of the best figure back; return the figure.

        Raises:
            FastforgetError: no figure was given, or parameters have been added since.
        """
        if len(self._best) != len(self._parameters):
            raise FastforgetError("there is no best adapter: call guard.keep_best(figure) after evaluating one")
        copy(self._parameters, self._best)
        return self._best_figure

    def _hold(self) -> None:
        """Have a copy of the parameters there are; those that were added are as good as any."""
        now = self._parameters
        if len(now) != len(self._good_of) or any(a is not b for a, b in zip(now, self._good_of, strict=True)):
            if not self._good_of:
                self.good_steps = self.optimizer.param_groups[0]["unlearn_steps"]
            known = {id(each): good for each, good in zip(self._good_of, self._good, strict=True)}
            self._good = [known[id(each)] if id(each) in known else each.detach().clone() for each in now]
            self._good_of = now

    def _noted(self) -> dict[str, Tensor]:
        """The loss, and the retain NLL where it is bounded, of all backwards since gradients were cleared."""
        assert self.settings is not None and self._loss is not None
        device = self._parameters[0].device
        numbers = {LOSS: self._loss.detach().to(device, non_blocking=True)}
        if self.settings.max_retain_nll is not None and self._retain is not None:
            numbers[RETAIN] = self._retain.to(device, non_blocking=True) / max(self._means, 1)
        return numbers

    def _judge(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """Whether all numbers are finite and within their bounds, () bool on their device."""
        assert self.settings is not None
        good = torch.stack(list(numbers.values())).isfinite().all()
        bound = self.settings.max_retain_nll
        return good & (numbers[RETAIN] <= bound) if bound is not None and RETAIN in numbers else good

    def _send(self, numbers: Mapping[str, Tensor], begins: bool, ends: bool) -> None:
        """Let numbers travel to the host, which does not wait."""
        step = self.optimizer.param_groups[0]["unlearn_steps"] + 1
        values = torch.stack([each.float() for each in numbers.values()])
        copied = None
        if values.is_cuda:
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._reading = Reading(tuple(numbers), values.cpu(), copied, step, begins, ends)
        self._unread = {}


def first_not_finite(numbers: Mapping[str, float]) -> str | None:
    """Say what became no finite number ("loss became nan"); None where all are finite."""
    return next((f"{name} became {value}" for name, value in numbers.items() if not math.isfinite(value)), None)


def norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The norm of all tensors together, () float32: infinite also where their squares are too large for float32."""
    wide = [each.float() if each.dtype == torch.float16 else each for each in tensors]  # whose squares are so soon
    return whole(get_total_norm(wide)).to(device, torch.float32, non_blocking=True)


def on_host(flag: Tensor) -> bool:
    """Whether reading a flag waits for no device."""
    return flag.device.type == "cpu"


@torch.no_grad()
def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others."""
    torch._foreach_copy_([local(each) for each in targets], [local(each) for each in sources])


def copy_where(flag: Tensor, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others where a flag, () bool, is true; a flag on a device is not read."""
    if on_host(flag):
        if flag.numpy():
            copy(targets, sources)
        return
    flags = {device: flag.to(device, non_blocking=True) for device in {each.device for each in targets}}
    for target, source in zip(map(local, targets), map(local, sources), strict=True):
        torch.where(flags[target.device], source, target, out=target)


def blend_where(flag: Tensor, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """As `copy_where`, of finite tensors, in a few launches however many there are."""
    if on_host(flag):
        copy_where(flag, targets, sources)
        return
    for device in {each.device for each in targets}:
        taken = flag.to(device, torch.float32, non_blocking=True)
        own = [local(each) for each in targets if each.device == device]
        theirs = [local(each.detach()) for each in sources if each.device == device]
        torch._foreach_mul_(own, 1.0 - taken)
        torch._foreach_add_(own, torch._foreach_mul(theirs, taken))


def zero_where(flag: Tensor, tensors: Sequence[Tensor]) -> None:
    """Set tensors to 0 where a flag, () bool, is true; a flag on a device is not read."""
    if on_host(flag):
        for tensor in map(local, tensors) if flag.numpy() else ():
            tensor.zero_()
        return
    flags = {device: flag.to(device, non_blocking=True) for device in {each.device for each in tensors}}
    for tensor in map(local, tensors):
        tensor.masked_fill_(flags[tensor.device], 0)
