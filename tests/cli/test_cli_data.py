"""``qmemtune data``: counts, coloured rows, JSON and a picture."""

from __future__ import annotations

import builtins
import json

import pytest

from qmemtune.cli.app import main


@pytest.fixture
def arguments(tmp_path, tiny_llama_dir) -> list[str]:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"ask {i}:", "completion": "word " * (i + 1)} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n")
    return [
        "data",
        f"model.path={tiny_llama_dir}",
        f"data.path={path}",
        "data.max_rejected=1",
        "data.eval_fraction=0.1",
    ]


def test_the_report_for_people(arguments, capsys):
    assert main([*arguments, "--rows", "2"]) == 0
    text = capsys.readouterr().out
    assert "31 rows read (prompt_completion)" in text
    assert "1 rejected: malformed JSON (line 31)" in text
    assert "train: 27 rows" in text
    assert "quantiles" in text
    assert text.count("⟦") == 2
    assert "ask 0:⟦word <|im_end|>⟧" in text


def test_the_report_for_scripts_and_the_picture(arguments, capsys, tmp_path):
    picture = tmp_path / "out" / "lengths.png"
    assert main([*arguments, "--json", "--png", str(picture)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["train"]["rows"], report["heldout"]["rows"], report["rejected"]) == (27, 3, 1)
    assert report["sources"][0]["rejected_at"] == {"malformed JSON": "line 31"}
    assert report["png"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_line_says_so(arguments, capsys, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main([*arguments, "--png", str(tmp_path / "x.png")]) == 0
    assert "install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_too_many_bad_rows_are_an_error_with_their_reasons(arguments, capsys):
    assert main([*arguments, "data.max_rejected=0"]) == 2
    assert "malformed JSON" in capsys.readouterr().err
