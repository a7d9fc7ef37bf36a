"""What a run shows: a live bar on a terminal, plain lines without one, nothing when quiet."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from qmemtune.cli.display import LiveProgress, PlainProgress, RowCounter, make_progress
from qmemtune.cli.numbers import duration, short
from qmemtune.engine.progress import SilentProgress

FACTS = {
    "run_dir": "runs/x",
    "first_step": 2,
    "device": "cpu",
    "dtype": "float32",
    "trainable_parameters": 1234,
    "rows": 8,
}
LOGGED = {"step": 3, "epoch": 0.5, "loss": 1.25, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_s": 512.3}


def train_on(progress):
    progress.message("rows read: 8 [cyan]")
    progress.start(4, FACTS)
    progress.step(3, {"epoch": 0.5, "step_s": 0.1})
    progress.log(LOGGED)
    progress.evaluation({"step": 3, "loss": 1.5, "perplexity": 4.48, "exact_match": 0.25})
    progress.step(4, {"epoch": 1.0, "step_s": 0.1})
    progress.finish()


def test_plain_lines(capsys):
    train_on(PlainProgress())
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 4
    assert (
        lines[1]
        == "training: 4 steps (going on after step 2), 8 rows, 1,234 trainable parameters, cpu, float32, runs/x"
    )
    assert lines[2].startswith("step 3/4: loss 1.2500, lr 1.00e-03, 512 tokens/s, 0:00 left")
    assert lines[3] == "step 3/4: held-out loss 1.5000, perplexity 4.48, exact match 25.0%"


def test_live_display_shows_step_loss_rate_speed_and_last_evaluation():
    stream = io.StringIO()
    train_on(LiveProgress(Console(file=stream, force_terminal=True, width=120, highlight=False)))
    shown = stream.getvalue()
    for part in ("rows read: 8 [cyan]", "4/4", "loss 1.2500", "lr 1.00e-03", "512 tokens/s", "held-out loss 1.5000"):
        assert part in shown


def test_live_display_survives_a_run_that_never_starts():
    progress = LiveProgress(Console(file=io.StringIO(), force_terminal=True))
    progress.step(1, {})
    progress.log({})
    progress.finish()


def test_the_display_fits_where_it_stands(monkeypatch):
    assert isinstance(make_progress(quiet=True), SilentProgress)
    assert isinstance(make_progress(quiet=False), PlainProgress)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(make_progress(quiet=False), LiveProgress)


@pytest.mark.parametrize("quiet", [False, True])
def test_rows_of_an_evaluation_are_counted_once_without_a_terminal(capsys, quiet):
    with RowCounter(quiet=quiet) as counter:
        for done in range(1, 5):
            counter("base: loss", done, 4)
    assert capsys.readouterr().err.count("base: loss: 4 rows") == (0 if quiet else 1)


def test_numbers_as_people_read_them():
    assert [short(value) for value in (3, 12345, 0.123456, 1234.5, True, "x")] == [
        "3",
        "12,345",
        "0.1235",
        "1,234",
        "True",
        "x",
    ]
    assert [duration(seconds) for seconds in (0.4, 65, 3723)] == ["0:00", "1:05", "1:02:03"]


def test_short_work_shows_nothing_and_long_work_is_counted(capsys, monkeypatch):
    from qmemtune.cli.display import PatientCounter

    counter = PatientCounter()
    for done in (1000, 2000):
        counter("tokenise training rows", done, 2000)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(PatientCounter, "patience_s", 0.0)
    for done in (1000, 2000):
        counter("tokenise held-out rows", done, 2000)
    assert capsys.readouterr().err.startswith("tokenise held-out rows: 2000 rows in")
    assert counter.counter is None
