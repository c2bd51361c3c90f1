"""Parts of a job are done once, and taken up by the same job alone."""

from fastforget.jobs.stages import STAGES, Stages, stamp


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


def test_a_stamp_tells_contents_apart(tmp_path):
    file, folder = tmp_path / "rows.jsonl", tmp_path / "model"
    folder.mkdir()
    file.write_text("one")
    (folder / "weights").write_text("one")
    before = [stamp(file), stamp(folder), stamp(["one", {"text": "two"}])]
    assert before == [stamp(str(file)), stamp(folder), stamp(["one", {"text": "two"}])] and None not in before
    file.write_text("two")
    (folder / "weights").write_text("longer")
    after = [stamp(file), stamp(folder), stamp(["one", {"text": "three"}])]
    assert all(first != last for first, last in zip(before, after, strict=True))
    assert stamp("owner/name") is stamp(None) is stamp(iter(["one"])) is None
