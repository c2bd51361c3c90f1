"""Parts of a job are done once, and taken up by the same job alone."""

from fastforget.jobs.stages import STAGES, Stages


def test_a_part_is_done_once_until_the_job_is_complete(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"value": [1.5, None], "calls": len(calls)}

    first = Stages(tmp_path, {"a": 1, "path": tmp_path})
    assert not (tmp_path / STAGES).exists(), "nothing is written before there is a result"
    assert first.once("part", compute) == first.once("part", compute) == {"value": [1.5, None], "calls": 1}
    again = Stages(tmp_path, {"a": 1, "path": tmp_path})
    assert again.once("part", compute)["calls"] == 1 and again.once("other", compute)["calls"] == 2
    assert Stages(tmp_path, {"a": 2, "path": tmp_path}).once("part", compute)["calls"] == 3, "other settings"
    Stages(tmp_path, {"a": 2, "path": tmp_path}).done()
    assert not (tmp_path / STAGES).exists()


def test_a_broken_file_is_done_again(tmp_path):
    stages = Stages(tmp_path, {})
    stages.once("part", lambda: 1)
    (tmp_path / STAGES / "part.json").write_text("{")
    assert stages.once("part", lambda: 2) == 2
