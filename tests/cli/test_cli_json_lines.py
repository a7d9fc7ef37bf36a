"""A JSON object is on one line for every reader, and holds the same text."""

from __future__ import annotations

import io
import json

import pytest

from qmemtune.cli.output import write_json_line
from qmemtune.engine.metrics_log import JsonLines

TEXT = "one\x85two\u2028three\u2029four\nfive\x0b\x0c\x1c\x1d\x1esix é"


def test_on_standard_output():
    stream = io.StringIO()
    write_json_line(stream, {"answer": TEXT})
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line) == {"answer": TEXT}
    assert "é" in line


@pytest.mark.parametrize("lines", [1, 3])
def test_in_a_log(tmp_path, lines):
    log = JsonLines(tmp_path / "log.jsonl")
    for _ in range(lines):
        log.write({"text": TEXT})
    found = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in found] == [TEXT] * lines
