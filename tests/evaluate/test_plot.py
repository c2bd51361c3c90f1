"""The picture of a job's curves: what is drawn, whole or not at all, without pyplot, and without matplotlib at all."""

import math
import subprocess
import sys

import pytest

import fastforget as ff
from fastforget.evaluate import plot

pytest.importorskip("matplotlib")
FORGET = [0.1 + 0.02 * step for step in range(60)]
RETAIN = [0.08 + 0.01 * math.sin(step) for step in range(60)]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the last figure drawn."""
    from matplotlib.figure import Figure

    seen = []
    add_subplot = Figure.add_subplot
    monkeypatch.setattr(Figure, "add_subplot", lambda self: seen.append(add_subplot(self)) or seen[-1])
    return seen


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_both_curves_with_units_legend_and_title(tmp_path, drawn):
    path = tmp_path / "new" / "curves.png"
    measured = {"forget": (0.1, 1.4), "retain": (0.08, 0.09), "unseen": (7.0, 7.0)}
    assert plot.plot_curves(path, FORGET, RETAIN, title="npo_mean, seed 3 ($2)", measured=measured) == path
    assert path.read_bytes().startswith(PNG) and [each.name for each in path.parent.iterdir()] == ["curves.png"]
    axes = drawn[-1]
    curves = lines(axes)
    assert list(curves["forget, each batch"].get_ydata()) == FORGET
    assert list(curves["retain, each batch"].get_ydata()) == RETAIN
    assert list(curves["forget, mean of 3 steps"].get_xdata()) == list(range(60))
    assert list(curves["forget, whole set, before and after"].get_xdata()) == [0, 60]
    assert list(curves["retain, whole set, before and after"].get_ydata()) == [0.08, 0.09]
    assert len(curves) == 6, "an unseen set has no curve"
    assert axes.get_ylabel() == "NLL (nats per label token)" and "steps" in axes.get_xlabel()
    assert axes.get_title() == "npo_mean, seed 3 ($2)"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(curves)


def test_without_retain_terms_only_the_forget_curve(tmp_path, drawn):
    measured = {"forget": (0.1, 1.4), "retain": (0.08, 0.09)}
    assert plot.plot_curves(tmp_path / "curves.png", FORGET, measured=measured, steps=59)
    assert all(label.startswith("forget") for label in lines(drawn[-1]))
    assert list(lines(drawn[-1])["forget, whole set, before and after"].get_xdata()) == [0, 59]


def test_a_single_step_is_seen(tmp_path, drawn):
    assert plot.plot_curves(tmp_path / "curves.png", [1.0])
    assert lines(drawn[-1])["forget, each batch"].get_marker() == "."


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.plot_curves(tmp_path / "curves.png", FORGET) is None
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def disk_full(self, file):
        file.write(PNG)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", disk_full)
    with pytest.raises(ff.FastforgetError, match=r"curves\.png cannot be written: No space left"):
        plot.plot_curves(path, FORGET)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_no_step_is_an_error(tmp_path):
    with pytest.raises(ff.FastforgetError, match="no curve to draw"):
        plot.plot_curves(tmp_path / "curves.png", [], [])


def test_moving_mean_against_sums_by_hand():
    assert plot.moving_mean([0.0, 3.0, 6.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0]
    assert plot.moving_mean([2.0], 3) == [2.0]
    spoilt = plot.moving_mean([1.0, math.nan, 1.0, 1.0, 1.0], 3)
    assert [math.isnan(value) for value in spoilt] == [True, True, True, False, False], "one NaN spoils its own window"
    for steps in (1, 10, 162, 2000, 100_000):
        window = plot.smoothing_window(steps)
        assert window % 2 == 1 and 3 <= window <= plot.WIDEST_WINDOW
    assert plot.smoothing_window(162) == 9


def test_imports_stay_light_and_no_library_warns(tmp_path):
    """In one process: pyplot is not touched, and bitsandbytes, which warns when it is imported, is not there yet."""
    code = (
        "import sys, pathlib, fastforget\n"
        "assert {'demo', 'unlearn'} <= set(dir(fastforget))\n"
        "assert not {'transformers', 'datasets', 'peft', 'rich', 'fastforget.jobs'} & set(sys.modules)\n"
        "import fastforget.evaluate.plot as plot\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plot.plot_curves(pathlib.Path({str(tmp_path / 'curves.png')!r}), [1.0, 2.0])\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
        "import fastforget.cli, fastforget.jobs.memorise\n"
        "assert 'bitsandbytes' not in sys.modules, 'before quiet.quiet_bitsandbytes'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("", "")
    assert (tmp_path / "curves.png").is_file()
