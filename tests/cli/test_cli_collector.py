"""The cycle collector is off while libraries are imported, and on again whatever happens."""

from __future__ import annotations

import gc

import pytest

from qmemtune.cli import collector
from qmemtune.cli.output import output


@pytest.fixture(autouse=True)
def collecting(monkeypatch):
    """On before and after, with nothing really frozen in the tests' own process."""
    frozen = []
    monkeypatch.setattr(collector, "_frozen", False)
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    gc.enable()
    yield frozen
    gc.enable()


def test_off_until_the_libraries_are_loaded(collecting):
    with output(False, False, True) as out:
        assert not gc.isenabled()
        out.libraries_are_loaded()
        assert gc.isenabled()
        assert collecting == [False]
    assert gc.isenabled()


def test_frozen_once_a_process(collecting):
    for _ in range(3):
        with output(False, False, True) as out:
            out.libraries_are_loaded()
            out.libraries_are_loaded()
    assert len(collecting) == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_on_again_after_a_failure(collecting, as_json):
    with pytest.raises(ImportError), output(as_json, False, True):
        raise ImportError("a library is broken")
    assert gc.isenabled()
    assert collecting == []


def test_one_that_is_off_stays_off(collecting):
    gc.disable()
    with output(False, False, True) as out:
        out.libraries_are_loaded()
        assert not gc.isenabled()
    assert not gc.isenabled()
    assert collecting == []
