"""README's section of studies is what the stored results give."""

from __future__ import annotations

from pathlib import Path

from qmemtune.study.readme import BEGIN, END, STORED, section

REPOSITORY = Path(__file__).parents[2]


def test_readme_shows_the_stored_results():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = BEGIN + text.partition(BEGIN)[2].partition(END)[0] + END
    assert shown == section(REPOSITORY / STORED), "run: make studies-readme"
