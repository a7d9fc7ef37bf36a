"""doctor: each finding with its remedy; only what makes training impossible is an error."""

from __future__ import annotations

import json

import pytest

from qmemtune.cli.app import main
from qmemtune.engine import doctor
from qmemtune.engine.versions import canonical, required, tested


@pytest.fixture
def checks(capsys):
    def run(*arguments):
        code = main(["doctor", "--json", *arguments])
        found = json.loads(capsys.readouterr().out)
        return code, {check["name"]: check for check in found["checks"]}

    return run


def test_this_installation_can_train(checks):
    code, found = checks()
    assert code == 0
    assert {"python", "packages", "device", "bfloat16", "disk for runs", "hub"} <= set(found)
    assert found["hub"]["level"] == "note"
    for check in found.values():
        assert (check["remedy"] is None) == (check["level"] == "ok"), check


def test_people_read_lines(capsys):
    assert main(["doctor"]) == 0
    assert "training is possible" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "level"), [(None, "error"), ("0.1", "warning"), ("5.99.0", "note"), (tested()["transformers"], None)]
)
def test_versions(monkeypatch, version, level):
    installed = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: version if name == "transformers" else installed(name))
    found = {result.name: result for result in doctor.packages()}
    if level is None:
        assert "transformers" not in found
        assert "transformers" in found["packages"].found
    else:
        assert found["transformers"].level == level
        assert tested()["transformers"] in found["transformers"].remedy


def test_a_missing_package_makes_training_impossible(monkeypatch, checks):
    installed = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "peft" else installed(name))
    code, found = checks()
    assert code == 1
    assert found["peft"]["remedy"].startswith("run `pip install")


def test_an_unreachable_hub_is_a_note_with_a_remedy(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (found,) = doctor.hub()
    assert found.level == "note"
    assert "cannot be reached" in found.found
    assert "model.path=" in found.remedy


def test_an_endpoint_that_is_no_address_is_not_opened(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc/hostname")
    (found,) = doctor.hub()
    assert (found.level, found.found) == ("note", "HF_ENDPOINT is no address of a hub")


def test_a_broken_bitsandbytes_is_a_warning(monkeypatch):
    import bitsandbytes

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(bitsandbytes.nn, "Linear4bit", broken)
    (found,) = doctor.bitsandbytes()
    assert found.level == "warning"
    assert "no kernel image" in found.found
    assert "quantization=none" in found.remedy


def test_slow_bfloat16_is_no_fault(monkeypatch):
    import torch

    monkeypatch.setattr(doctor, "bf16_is_fast", lambda device: False)
    assert doctor.bf16(torch.device("cpu")).level == "note"


def test_tested_versions_cover_what_is_required():
    assert set(required()) <= set(tested())
    assert canonical("Typing_Extensions") == "typing-extensions"
