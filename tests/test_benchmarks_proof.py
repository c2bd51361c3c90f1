"""The long runs' bookkeeping, with a stand-in for the demo: what is kept, what counts as a failure, what is refused."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import demo_runs
from benchmarks.demo_runs import RunFailed, run_command
from benchmarks.proof import DEFAULT_RUNS, SUITES, main, with_overrides
from fastforget.objectives.presets import DEFAULT_PRESET, PRESETS

DATE = "2026-12-01"
GOOD = {
    "forget_leak_before": 1.0,
    "forget_leak_after": 0.0,
    "forget_rouge_after": 0.18,
    "unseen_rouge": 0.11,
    "retain_leak_before": 1.0,
    "retain_leak_after": 1.0,
    "retain_nll_before": 0.073,
    "retain_nll_after": 0.082,
    "degenerate_share": 0.0,
    "peak_rss_mb": 931,
    "seconds": 100.0,
    "base_trained_seconds": 20.0,
}


class Demo:
    """A runner that answers at once: GOOD, changed by what `answers` holds for the preset, or that raised."""

    def __init__(self, **answers):
        self.answers = answers
        self.asked = []

    def __call__(self, preset, seed):
        self.asked.append((preset, seed))
        answer = self.answers.get(preset.partition(" ")[0], {})
        if isinstance(answer, BaseException):
            raise answer
        return GOOD | answer


@pytest.fixture
def proof(tmp_path, monkeypatch):
    """Runs main() with results in `tmp_path`, and no objectives; returns its exit code."""
    monkeypatch.setitem(SUITES, "objectives", lambda proof: [])

    def run(demo, *arguments):
        return main([*arguments, "--out", str(tmp_path), "--date", DATE], runner=demo)

    return run


@pytest.fixture
def results(tmp_path):
    """Reads {(preset, seed): record} off the date's file."""

    def read():
        runs = json.loads((tmp_path / f"{DATE}-demo.json").read_text())["runs"]
        return {(run["preset"], run["seed"]): run for run in runs}

    return read


@pytest.fixture
def row(tmp_path):
    """{heading: cell} of the row of the Markdown file that begins with a name."""

    def read(name):
        for block in (tmp_path / f"{DATE}-demo.md").read_text().split("\n\n"):
            headings, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
            for cells in rows:
                if cells[0] == name:
                    return dict(zip(headings, cells, strict=True))
        raise AssertionError(f"no row {name}")

    return read


def test_every_run_is_measured_once_and_all_is_well(proof, results, capsys):
    demo = Demo()
    assert proof(demo) == 0
    assert demo.asked == [(DEFAULT_PRESET, seed) for seed in (0, 1, 2)] + [
        (preset, 0) for preset in with_overrides(DEFAULT_RUNS) if preset != DEFAULT_PRESET
    ]
    assert set(PRESETS) | {"simnpo forget_weight=1"} == set(DEFAULT_RUNS)
    assert set(results()) == set(demo.asked) and results()[DEFAULT_PRESET, 1]["report"] == GOOD
    assert "no acceptance figure was missed" in capsys.readouterr().out


def test_both_files_are_written_after_each_run(proof, results, row, capsys):
    def demo(preset, seed):
        if seed == 1:
            assert set(results()) == {(DEFAULT_PRESET, 0)}
            raise KeyboardInterrupt
        return GOOD

    assert proof(demo) == 130
    assert set(results()) == {(DEFAULT_PRESET, 0)}
    seeds = row("forget leak after")
    assert seeds["seed 0"] == "0.0 %, met" and seeds["seed 1"] == seeds["seed 2"] == "not measured"
    assert row("`npo`")["forget leak"] == "not measured"
    assert "--resume" in capsys.readouterr().err


def test_a_failed_run_is_recorded_and_the_others_go_on(proof, results, row, capsys):
    assert proof(Demo(npo=RunFailed("bad | luck (exit code 2)")), "--presets", "npo,simnpo") == 1
    failed = results()["npo", 0]
    assert failed["report"] is None and failed["error"] == "bad | luck (exit code 2)"
    assert results()["simnpo", 0]["report"] == GOOD
    assert row("`npo`")["forget leak"] == "failed: bad / luck (exit code 2)"
    assert capsys.readouterr().out.endswith("\nnpo, seed 0: failed: bad | luck (exit code 2)\n")


def test_missed_figures_of_the_default_preset_are_listed(proof, row, capsys):
    without_seconds = {"forget_leak_after": 0.25, "seconds": None}
    assert proof(Demo(**{DEFAULT_PRESET: without_seconds}), "--seeds", "0") == 1
    assert capsys.readouterr().out.endswith(
        f"\n\n{DEFAULT_PRESET}, seed 0: missed forget leak after: 25.0 %, must be ≤ 5.0 %"
        f"\n{DEFAULT_PRESET}, seed 0: missed seconds: not measured, must be ≤ 360\n"
    ), "once, though both suites measure it"
    assert row("forget leak after")["seed 0"] == "**25.0 %, missed**"


def test_other_presets_need_not_meet_them(proof):
    assert proof(Demo(npo={"forget_leak_after": 1.0, "retain_leak_after": 0.0}), "--presets", "npo") == 0
    assert proof(Demo(**{DEFAULT_PRESET: {"seconds": 999}}), "--presets", "npo_mean beta=4", "--only", "presets") == 0


def test_presets_are_compared_with_the_default(proof, row):
    column = "forgotten, of the default's"
    demo = Demo(**{DEFAULT_PRESET: {"forget_leak_after": 0.05}, "simnpo": {"forget_leak_after": 0.24}})
    assert proof(demo, "--only", "presets", "--presets", "simnpo  forget_weight=1 ,npo") == 0
    assert row("`simnpo forget_weight=1`")[column] == "not measured", "nor was the default"
    assert row("`simnpo forget_weight=1`")["forget leak"] == "24.0 %"
    assert proof(demo, "--only", "seeds", "--seeds", "0") == 0
    assert row("`simnpo forget_weight=1`")[column] == "80.0 %"
    assert row("`npo`")[column] == "105.3 %"
    assert proof(Demo(**{DEFAULT_PRESET: {"forget_leak_after": 1.0}}), "--only", "seeds", "--seeds", "0") == 1
    assert row("`npo`")[column] == "the default forgot nothing"


def test_resume_keeps_what_was_measured_and_tries_failures_again(proof, results):
    assert proof(Demo(npo=RunFailed("no luck")), "--presets", "npo,simnpo", "--only", "presets") == 1
    kept = results()["simnpo", 0]
    again = Demo(simnpo={"seconds": 1.0})
    assert proof(again, "--presets", "npo,simnpo,grad_diff", "--only", "presets", "--resume") == 0
    assert again.asked == [("npo", 0), ("grad_diff", 0)]
    assert results()["simnpo", 0] == kept and results()["npo", 0]["report"] == GOOD


def test_without_resume_only_other_runs_are_kept(proof, results):
    assert proof(Demo(), "--presets", "npo,simnpo", "--only", "presets") == 0
    assert proof(Demo(simnpo={"seconds": 1.0}), "--presets", "simnpo", "--only", "presets") == 0
    assert results()["simnpo", 0]["report"]["seconds"] == 1.0 and ("npo", 0) in results()


@pytest.mark.parametrize("what", ["machine", "versions"])
def test_results_of_other_surroundings_are_not_mixed(proof, tmp_path, monkeypatch, capsys, what):
    arguments = ["--presets", "npo", "--only", "presets"]
    assert proof(Demo(), *arguments) == 0
    before = (tmp_path / f"{DATE}-demo.json").read_bytes()
    here = getattr(demo_runs, what)()
    monkeypatch.setattr(demo_runs, what, lambda: here | {next(iter(here)): "another"})
    demo = Demo()
    assert proof(demo, *arguments, "--resume") == 2 and not demo.asked
    assert f"measured with another {what}" in capsys.readouterr().err
    assert (tmp_path / f"{DATE}-demo.json").read_bytes() == before


def test_a_file_that_holds_no_results_is_not_overwritten(proof, tmp_path, capsys):
    path = tmp_path / f"{DATE}-demo.json"
    for text in ("{", "[]", '{"machine": 1, "versions": 1, "runs": [{}]}'):
        path.write_text(text)
        demo = Demo()
        assert proof(demo) == 2 and not demo.asked and path.read_text() == text
        assert "is not a results file" in capsys.readouterr().err


def test_no_folder_of_the_machine_is_in_the_results(proof, tmp_path, results, monkeypatch):
    home = "/home/some one"
    monkeypatch.setenv("HOME", home)
    report = {"base": f"{tmp_path}/cache/demo-base-1", "adapter": "/data", "notes": [home, f"in '{home}/a b/c'"]}
    failure = RunFailed(f"{tmp_path}/x.json: see https://pytorch.org/docs/stable and {Path(__file__)}:3")
    assert proof(Demo(npo=report, simnpo=failure), "--presets", "npo,simnpo", "--only", "presets") == 1
    measured = results()["npo", 0]["report"]
    assert measured["base"] == "demo-base-1" and measured["adapter"] == "data"
    assert measured["notes"] == ["_", "in 'a b/c'"]
    error = results()["simnpo", 0]["error"]
    assert error == "x.json: see https://pytorch.org/docs/stable and test_benchmarks_proof.py:3"
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert str(tmp_path) not in text and home not in text and "/data" not in text


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--only", "everything"], "unknown suite 'everything'"),
        (["--only", ","], "no suite is named"),
        (["--presets", "simpno"], "did you mean 'simnpo'"),
        (["--presets", " "], "no preset is named"),
        (["--presets", "npo,simnpo weight=1"], "has no parameter 'weight'"),
        (["--presets", "simnpo forget_weight"], "needs NAME=VALUE, not 'forget_weight'"),
        (["--presets", "simnpo beta=much"], "wrong type"),
        (["--seeds", "0,-1"], "seeds are whole numbers"),
        (["--date", "yesterday"], "YYYY-MM-DD"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, complaint):
    demo = Demo()
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path / "new"), *arguments], runner=demo)
    assert ended.value.code == 2 and not demo.asked and not (tmp_path / "new").exists()
    assert complaint in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def fastforget(tmp_path, monkeypatch):
    """Makes a shell script the installed command `fastforget`; `$out` is its output folder. Returns where it runs."""

    def install(script):
        path = tmp_path / "bin" / "fastforget"
        path.parent.mkdir()
        find_out = 'while [ "$1" != --out ]; do shift; done\nout="$2"\nmkdir -p "$out"\n'
        path.write_text('#!/bin/sh\narguments="$*"\n' + find_out + script)
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path.with_name("python")))
        return tmp_path / "runs"

    return install


def test_the_command_gets_preset_options_and_a_folder_and_cache_of_its_own(fastforget):
    runs = fastforget(
        'echo "{\\"called\\": \\"$arguments\\", \\"cache\\": \\"$XDG_CACHE_HOME\\"}" > "$out/report.json"'
    )
    report = run_command(runs, "npo_mean retain=../ce+kl beta=4", 3)
    (out,) = (path for path in runs.iterdir())
    assert out.name == "npo_mean_retain=.._ce+kl_beta=4-seed3"
    options = "--preset-option retain=../ce+kl --preset-option beta=4"
    assert report == {
        "called": f"demo --preset npo_mean --seed 3 --out {out} --overwrite {options}",
        "cache": str(runs / "cache"),
    }
    assert len(run_command(runs, f"npo beta={'1' * 999}", 3)["called"]) > 999, "no name is too long for a file"


@pytest.mark.parametrize(
    "script, why",
    [
        ("echo Loading >&2; echo 'fastforget: seed is bad' >&2; exit 2", r"^fastforget: seed is bad \(exit code 2\)$"),
        ("printf '│ No such option │\\n╰────╯\\n' >&2; exit 2", r"^No such option \(exit code 2\)$"),
        ("exit 1", "^exit code 1$"),
        ("kill -9 $$", "^killed by signal 9$"),
        ("exit 0", "ended well, but its report.json cannot be read: .*No such file"),
        (
            'echo \'{"seconds": \' > "$out/report.json"',
            "ended well, but its report.json cannot be read: Expecting value",
        ),
        ("echo '[]' > \"$out/report.json\"", "ended well, but its report.json holds a list"),
    ],
)
def test_a_run_without_a_report_says_why(fastforget, script, why):
    with pytest.raises(RunFailed, match=why):
        run_command(fastforget(script), "npo", 0)


def test_a_run_that_hangs_is_ended(fastforget, monkeypatch):
    monkeypatch.setattr(demo_runs, "LONGEST_RUN", 0.7)
    with pytest.raises(RunFailed, match="had not ended after 1 s"):
        run_command(fastforget("exec sleep 60"), "npo", 0)


def test_a_command_that_cannot_be_started_says_why(fastforget, tmp_path):
    runs = fastforget("exit 0")
    (tmp_path / "bin" / "fastforget").chmod(0o644)
    with pytest.raises(RunFailed, match="could not be started: Permission denied"):
        run_command(runs, "npo", 0)
