"""Whatever is given as an override: it is honoured or refused as the user's mistake, nothing else."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmemtune.config.compose import compose, to_yaml
from qmemtune.config.fields import fields_of
from qmemtune.config.of_run import load_resolved
from qmemtune.config.overrides import read_overrides
from qmemtune.config.validate import validate
from qmemtune.errors import UserError

KEYS = sorted({*fields_of("lora"), *fields_of("queryable")})
BASE = {"model": {"path": "a/b"}, "data": {"path": "generated:word_lists"}}
plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
values = st.one_of(
    plain_text,
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["null", "true", "[]", "[a,b]", "{a: b}", "nf4", "queryable", "1e3", "0", "-1", "${seed}", "???"]),
)
overrides = st.one_of(
    st.builds("{}{}={}".format, st.sampled_from(["", "+"]), st.sampled_from(KEYS), values),
    st.builds("~{}".format, st.sampled_from(KEYS)),
    st.builds("{}={}".format, plain_text, values),
    plain_text,
)


def outcome(action):
    try:
        return action()
    except UserError as error:
        refused = error.findings
    assert refused
    assert all(finding.problem and "\n" not in finding.problem for finding in refused)
    return None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(overrides, max_size=4))
def test_settings_are_honoured_or_refused(given_overrides):
    read = read_overrides(given_overrides)
    result = validate(read.settings)
    named = {finding.where for finding in result.findings}
    for setting in read.settings:
        # A setting that was not refused counts, unless a later one took its place.
        if setting.where not in named:
            assert setting in result.history.get(setting.key, [])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(overrides, max_size=3))
def test_composing_never_fails_in_another_way_and_reads_back(tmp_path, given_overrides):
    composed = outcome(lambda: compose(given_overrides, base=BASE))
    if composed is not None:
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(composed.config), encoding="utf-8")
        assert load_resolved(path, []).config == composed.config


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plain_text)
def test_text_is_taken_as_it_stands(text):
    composed = outcome(lambda: compose([f"tracking.project=x{text}x"], base=BASE))
    assert composed is not None
    assert composed.config.tracking.project == f"x{text}x"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("abc:{}[]&*!|>-'\"#%@` \n\t$_0123.,?"), max_size=60))
def test_any_file_is_read_or_named(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError):
        compose(["recipe=./r.yaml"])
