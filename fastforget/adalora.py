"""AdaLoRA (arXiv 2303.10512) in a training loop: its matrices are kept orthogonal, and ranks are shared out anew.

Both are PEFT's own: the first it adds to the loss of a forward with labels, the second a loop must call at each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ORTHOGONALITY = "adalora_orthogonality"  # in an output's terms


class AdaLora:
    """The AdaLoRA adapter of a model.

    Args:
        tuner: the `peft.AdaLoraModel`.
    """

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def matrices(self) -> list[tuple[Tensor, bool]]:
        """The P and Q of each layer's P diag(lambda) Q, and whether its rows (Q, `lora_A`) are to be orthogonal."""
        adapter = self.tuner.trainable_adapter_name
        return [
            (parameter, "lora_A" in name)
            for name, parameter in self.tuner.model.named_parameters()
            if ("lora_A" in name or "lora_B" in name) and adapter in name
        ]

    def penalty(self) -> Tensor:
        """The mean norm of P'P - I and QQ' - I, times `orth_reg_weight`; a scalar."""
        norms = []
        for matrix, by_rows in self.matrices():
            square = matrix @ matrix.T if by_rows else matrix.T @ matrix
            norms.append(torch.norm(square - torch.eye(len(square), dtype=square.dtype, device=square.device)))
        weight = self.tuner.peft_config[self.tuner.trainable_adapter_name].orth_reg_weight
        return weight * torch.stack([norm.to(norms[0].device) for norm in norms]).mean()

    def allocate(self, step: int) -> None:
        """Share out the ranks after an update, by weights and gradients; `step`: how many updates there were before.

        A weight without a gradient (behind the layer that a forward ended at) has one of 0 meanwhile.
        """
        without = [each for each in self.tuner.model.parameters() if each.requires_grad and each.grad is None]
        for parameter in without:
            parameter.grad = torch.zeros_like(parameter)
        self.tuner.update_and_allocate(step)
        for parameter in without:
            parameter.grad = None


def adalora_of(model: nn.Module) -> AdaLora | None:
    """Return the AdaLoRA adapter that trains in a PeftModel; None where there is none."""
    if not hasattr(model, "peft_config"):
        return None
    from peft import AdaLoraModel

    tuner = model.base_model
    if not isinstance(tuner, AdaLoraModel) or not any(each.requires_grad for each in tuner.parameters()):
        return None
    return AdaLora(tuner)
