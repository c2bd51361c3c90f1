"""Pictures: forget and retain NLL over an unlearning job's steps, and how an evaluator's scores are spread.

Needs matplotlib, the optional extra `fastforget[plot]`. It draws into a figure of its own, so that pyplot's state, its
backend and the figures that a user has open are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastforget.errors import FastforgetError
from fastforget.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = "curves.png"
HOW_TO_GET_IT = "pip install 'fastforget[plot]'"
COLOURS = {"forget": "#d55e00", "retain": "#0072b2"}  # the colour-blind see the difference too
WIDEST_WINDOW = 51
SCORE_BINS = 20


def plot_curves(
    path: Path,
    forget_nll: Sequence[float],
    retain_nll: Sequence[float] = (),
    *,
    title: str = "",
    measured: Mapping[str, tuple[float, float]] | None = None,
    steps: int | None = None,
) -> Path | None:
    """Draw the NLL of each step's batch, thin as it is and thick as a moving mean, and write it as a PNG.

    Both lists are `JobResult`'s: entry i is the NLL of the batch that came after i updates. Without a retain set (or
    without terms on it) `retain_nll` is empty, and only the forget curve is drawn.

    Args:
        measured: "forget" or "retain" -> NLL of that whole set (before, after), drawn as points at both ends.
        steps: updates taken in all; as many as entries unless given (one fewer where the job stopped at a batch's NLL).

    Returns:
        `path`, written whole or not at all; None where matplotlib is not installed, and then nothing is written.

    Raises:
        FastforgetError: both lists are empty, or the file cannot be written.
    """
    curves = {name: values for name, values in (("forget", forget_nll), ("retain", retain_nll)) if len(values)}
    if not curves:
        raise FastforgetError("there is no curve to draw: the job took no step")
    axes = new_axes()
    if axes is None:
        return None
    from matplotlib.ticker import MaxNLocator

    for name, values in curves.items():
        draw_curve(axes, name, values)
        if measured is not None and name in measured:
            label = f"{name}, whole set, before and after"
            ends = [0, len(values) if steps is None else steps]
            axes.plot(ends, measured[name], "o", color=COLOURS[name], clip_on=False, label=label)
    axes.set_title(title, parse_math=False)  # a $ in a name is no formula
    axes.set_xlabel("updates taken (steps)")
    axes.set_ylabel("NLL (nats per label token)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return write_png(path, axes)


def plot_scores(path: Path, scores: Sequence[float], threshold: float) -> Path | None:
    """Draw a histogram of scores from 0 to 1, and the threshold; returns and raises as `plot_curves` does."""
    axes = new_axes()
    if axes is None:
        return None
    edges = np.linspace(0.0, 1.0, SCORE_BINS + 1)
    axes.hist(list(scores), bins=list(edges), color=COLOURS["retain"])
    axes.axvline(threshold, color=COLOURS["forget"], label=f"threshold {threshold:g}")
    axes.set_xlabel("score")
    axes.set_ylabel("dialogues")
    axes.set_xlim(0.0, 1.0)
    axes.legend(frameon=False)
    return write_png(path, axes)


def new_axes() -> Axes | None:
    """Make a figure of its own with one pair of axes; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(7.5, 4.5), layout="constrained").add_subplot()


def write_png(path: Path, axes: Axes) -> Path:
    """Write the axes' figure, whole or not at all; raise FastforgetError where that is not possible."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    try:
        with written_whole(path) as scratch, scratch.open("wb") as file:
            FigureCanvasAgg(axes.get_figure(root=True)).print_png(file)
    except OSError as error:
        raise FastforgetError(f"the plot {path} cannot be written: {error.strerror}") from error
    return path


def draw_curve(axes: Axes, name: str, values: Sequence[float]) -> None:
    """Draw one thin line of the values as they are, one thick line of their moving mean."""
    updates = np.arange(len(values))
    window = smoothing_window(len(values))
    marker = "." if len(values) < 3 else ""  # one step alone is no line
    axes.plot(
        updates, values, color=COLOURS[name], label=f"{name}, each batch", linewidth=0.7, alpha=0.5, marker=marker
    )
    label = f"{name}, mean of {window} steps"
    axes.plot(updates, moving_mean(values, window), color=COLOURS[name], linewidth=2.2, label=label)


def smoothing_window(steps: int) -> int:
    """Choose how many steps one mean covers: about a twentieth of them, odd, so that it has a middle."""
    return min(max(3, steps // 20 | 1), WIDEST_WINDOW)


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Take the mean over a window centred on each value; at both ends, over the part of the window that there is.

    >>> moving_mean([0.0, 3.0, 6.0, 0.0], window=3)
    [1.5, 3.0, 3.0, 3.0]
    """
    half = window // 2
    return [float(np.mean(values[max(0, middle - half) : middle + half + 1])) for middle in range(len(values))]
