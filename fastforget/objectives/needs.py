"""The names by which terms ask for statistics in `Term.needs`, and what they stand for.

* a field of `TokenStats`: of the model, e.g. "log_not_label"; `SideStats.statistic` gives it.
* "ref_" and a field: of the frozen reference, e.g. "ref_log_not_label", which is cached; likewise ("ref_logp" is
  `SideStats.ref_logp` too).
* a kind of divergence from the reference, e.g. "forward_kl", or `shifted(kind, label_shift)`; in
  `SideStats.divergences`.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastforget.divergences import DIVERGENCES

OF_REFERENCE = "ref_"


def shifted(kind: str, label_shift: float) -> str:
    """The name of a divergence whose reference has `label_shift` <= 0 (nats) added to each label's logit."""
    return f"{kind}{float(label_shift):+}" if label_shift else kind


def divergences(needs: Iterable[str]) -> dict[str, tuple[str, float]]:
    """{name: (kind, label_shift)} of the divergences among `needs`."""
    found = {}
    for name in sorted(needs):
        for kind in DIVERGENCES:
            if name.startswith(kind):
                found[name] = kind, float(name.removeprefix(kind) or 0.0)
    return found


def reference_fields(needs: Iterable[str]) -> set[str]:
    """The fields of `TokenStats` that are wanted of the reference."""
    return {name.removeprefix(OF_REFERENCE) for name in needs if name.startswith(OF_REFERENCE)}
