"""Which run is meant where none is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmemtune.rundir import RunDir, find_run


def finished(folder: Path, second: int) -> RunDir:
    """A finished run, with the time of its end."""
    run = RunDir(folder)
    run.path.mkdir(parents=True)
    run.config.touch()
    run.summary.write_text("{}", encoding="utf-8")
    os.utime(run.summary, (second, second))
    return run


@pytest.mark.parametrize("named", ["runs", "."])
def test_a_run_inside_another_one_is_not_the_newest(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    finished(Path("runs/codes/a"), 1)
    newest = finished(Path("runs/codes/b"), 2)
    inner = finished(newest.distilled / "r16-0123456789ab", 3)
    for root in (Path(named), tmp_path / named):
        assert find_run(None, root).path.resolve() == newest.path.resolve()
    assert find_run(inner.path).path == inner.path


def test_the_folder_of_all_runs_may_hold_a_config(tmp_path):
    run = finished(tmp_path / "runs" / "codes" / "a", 1)
    (tmp_path / "runs" / "config.yaml").touch()
    assert find_run(None, tmp_path / "runs").path == run.path
