"""How far a layer's states are from what a term holds them against: an anchor, or the nearest of some centres."""

from __future__ import annotations

from torch import Tensor

from fastforget.backbone import Backbone
from fastforget.errors import FastforgetError
from fastforget.objectives import SideStats, StateDistances, StateRequest
from fastforget.reference import Entry, LayerStates
from fastforget.stats import hidden_stats, label_anchor


class Distances:
    """Answers what terms ask of hidden states; anchors and centres are copied to the model's device once."""

    def __init__(self, backbone: Backbone, backend: str) -> None:
        self.backbone, self.backend = backbone, backend
        # by the user's tensor, which is held: an id alone could become another tensor's
        self._constants: dict[Tensor, Tensor] = {}

    def of(
        self, request: StateRequest, hidden: Tensor, reference: Entry, labels: Tensor, stats: SideStats
    ) -> StateDistances:
        """What a term asked of a layer's hidden states (n, D)."""
        if self.backbone.head.is_identity and (request.layer is None or request.from_label):
            raise FastforgetError(
                "this model's head cannot be read, so the states that enter it are not known, nor its rows: give the "
                "term a layer (layer=-1 is the last), and another anchor than 'label'"
            )
        anchor: Tensor | None
        if isinstance(request.anchor, str):
            if request.from_reference:
                anchor = reference[LayerStates(request.layer)]
            else:
                anchor = label_anchor(request.anchor, self.backbone.head, labels)
        else:
            given = request.anchor
            anchor = self.constant(given(hidden.shape[1]) if callable(given) else given)
        if request.level == "sequence":
            hidden = stats.sequence_average(hidden)
            anchor = stats.sequence_average(anchor) if anchor is not None and anchor.dim() == 2 else anchor
        centres = self.constant(request.centres)
        return StateDistances(
            *hidden_stats(hidden, anchor, centres, request.metric, request.margin, backend=self.backend)
        )

    def constant(self, tensor: Tensor | None) -> Tensor | None:
        """A term's own tensor on the model's device, copied there once."""
        if tensor is None:
            return None
        if tensor not in self._constants:
            self._constants[tensor] = tensor.to(self.backbone.device)
        return self._constants[tensor]
