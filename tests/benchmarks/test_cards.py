"""The table of what fits on a card: plans of a shape, written between a page's markers."""

import json

import pytest

from benchmarks import cards


def test_page_and_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cards, "CARDS", ("100MB", "1GB"))
    monkeypatch.setattr(cards, "SHAPES", {"tiny": (64, 128, 2, 8, True)})
    monkeypatch.setitem(cards.SETTINGS, "seq_len", 32)
    page = tmp_path / "page.md"
    arguments = ["--page", str(page), "--out", str(tmp_path), "--date", "2026-01-02"]
    page.write_text("no markers\n")
    assert cards.main(arguments) == 2 and "needs these two lines" in capsys.readouterr().err
    page.write_text(f"before\n{cards.BEGIN}\nold\n{cards.END}\nafter\n")
    assert cards.main(arguments) == 0
    rows = json.loads((tmp_path / "2026-01-02-cards.json").read_text())["rows"]
    assert [(row["card"], row["model"]) for row in rows] == [("100MB", "tiny"), ("1GB", "tiny")]
    small, large = rows
    assert small["best"] is None or small["best"]["peak"] <= 90e6
    assert large["best"]["peak"] == pytest.approx(large["asked"]["peak"]), "all that was asked fits"
    text = page.read_text()
    assert "old" not in text and "2026-01-02-cards.json" in text and text.endswith("after\n")
    assert (
        f"| 1GB | tiny | 16 bit, no checkpointing, the whole batch at once | {large['best']['peak'] / 1e9:.1f} |"
        in text
    )
