"""The command line that README names for a study is the one that makes its table."""

from __future__ import annotations

import pytest

from qmemtune.config.study import StudyConfig
from qmemtune.study.readme import command_of
from qmemtune.study.studies import find_study, names


@pytest.mark.parametrize("name", names())
def test_a_study_as_it_is_needs_no_options(name):
    study = find_study(name, StudyConfig())
    variants = study.default_variants or [v.name for v in study.variants]
    settings = study.default_settings or [s.name for s in study.settings]
    done = {
        "study": name,
        "variants": [{"name": one} for one in variants],
        "settings": [{"name": one} for one in settings],
    }
    assert command_of(done) == f"qmemtune study {name}"


def test_what_was_chosen_is_named():
    done = {
        "study": "codes",
        "variants": [{"name": "lora"}, {"name": "dora"}],
        "settings": [{"name": "r2"}],
    }
    assert command_of(done) == "qmemtune study codes study.variants=[lora,dora] study.settings=[r2]"
