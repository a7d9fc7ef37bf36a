"""Random command lines and mutated recipes: each is honoured in full, or refused with readable findings.

Nothing here asks the tool's own readers what a value means: texts are compared with what the resolved config holds.
"""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qmemtune.cli.app import main
from qmemtune.config.dump import to_dict
from qmemtune.config.fields import fields_of, sections
from qmemtune.config.places import list_groups, list_options, own_folder

FIELDS = {**fields_of("lora"), **fields_of("queryable")}
NOT_SET_HERE = {"adapter.kind", "recipe", "resume", "run_dir"}
KEYS = sorted(set(FIELDS) - NOT_SET_HERE)
RECIPES = {path.stem: path.read_text(encoding="utf-8") for path in own_folder("recipes").glob("*.yaml")}
UNKNOWN = [f"{section}.zq{number}" for number, section in enumerate(sorted(sections()))] + ["zqtop", "Seed", "seed.zq"]

# What a shell can hand over: no NUL, no lone surrogates.
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
word = st.text("abcXYZ019-/.", min_size=1, max_size=8)
JUNK = [
    *(
        "null",
        "~",
        "",
        "true",
        "no",
        "[]",
        "[a,b",
        "{a: b}",
        "{",
        "1e3",
        "1e999",
        "nan",
        "-1",
        "0",
        "1.5",
        "0x1F",
        "1_0",
    ),
    *("${seed}", "${oc.env:HOME}", "???", "!!python/object:os.system", "&a [*a]", "'", '"x', "a=b", "é", "\\${x}"),
    *("../../etc/passwd", "nf4", "queryable", "9" * 40, "on", "1:30", "2020-01-01"),
]
junk = st.one_of(text, st.sampled_from(JUNK))


def typed(key: str) -> st.SearchStrategy[str]:
    """Texts that fit the key's type, though perhaps not its range."""
    kind = FIELDS[key].type
    plain = next((part for part in get_args(kind) if part is not type(None)), kind)
    plain = kind if get_origin(kind) in (list, dict, Literal) else plain
    if get_origin(plain) is Literal:
        return st.sampled_from([str(choice) for choice in get_args(plain)])
    if get_origin(plain) is list:
        return st.lists(word.filter(str.isalpha), min_size=1, max_size=3).map(lambda words: f"[{','.join(words)}]")
    if get_origin(plain) is dict:
        return st.just("{}")
    if plain is bool:
        return st.sampled_from(["true", "false", "yes", "off"])
    if plain is int:
        return st.integers(1, 10**6).map(str)
    return st.floats(0.001, 0.9).map(repr) if plain is float else word


fitting = st.sampled_from(KEYS).flatmap(lambda key: st.tuples(st.just(key), typed(key)))
loose = st.tuples(st.one_of(st.sampled_from(KEYS), st.sampled_from(UNKNOWN)), junk)
pairs = st.one_of(fitting, fitting, loose)
options = st.sampled_from([f"{group}={option}" for group in list_groups() for option in list_options(group)])
arguments = st.lists(
    st.one_of(
        pairs.map(lambda pair: "=".join(pair)),
        pairs.map(lambda pair: "+" + "=".join(pair)),
        st.sampled_from(KEYS).map(lambda key: f"~{key}"),
        options,
        text,
    ),
    max_size=5,
)


@st.composite
def recipe_files(draw) -> str:
    """A recipe with some keys set, removed or added, and perhaps some characters changed."""
    body = yaml.safe_load(RECIPES[draw(st.sampled_from(sorted(RECIPES)))])
    for key, value in draw(st.lists(pairs, max_size=4)):
        place, *names = body, *key.split(".")
        for name in names[:-1]:
            place = place.setdefault(name, {}) if isinstance(place.get(name, {}), dict) else {}
        # Half of the values as YAML means them, half as texts.
        place[names[-1]] = draw(st.sampled_from([value, _as_yaml(value)]))
    if draw(st.integers(0, 9)) == 0:
        body.pop(draw(st.sampled_from(sorted(body))))
    written = yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(written)))
        new = draw(
            st.sampled_from(["", "", ":", "  ", "\n", "- ", "{", "'", "#", "&x ", "*x", "\t", "!!set ", "x", "0"])
        )
        written = written[:at] + new + written[at + draw(st.integers(0, 2)) :]
    return written


def _as_yaml(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        return value


def run(verb: str, *given_arguments: str) -> SimpleNamespace:
    """A command line in this process, up to where training starts; ``started`` are the configs it would train."""
    started: list[Any] = []

    def train(composed: Any, *, progress: Any) -> dict[str, Any]:
        started.append(composed)
        return {"run_dir": "x", "steps": 0, "trainable_parameters": 0}

    out, err = io.StringIO(), io.StringIO()
    known = sys.modules.get("qmemtune.engine.run")
    sys.modules["qmemtune.engine.run"] = SimpleNamespace(train=train)  # type: ignore[assignment]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            # After "--" nothing is an option.
            code = main([verb, "--", *given_arguments])
    finally:
        sys.modules.pop("qmemtune.engine.run")
        if known is not None:
            sys.modules["qmemtune.engine.run"] = known
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), started=started)


def check(result: SimpleNamespace, given_arguments: list[str], file: str | None = None) -> None:
    """The promise: exit 2, nothing started and readable findings, or a config that shows everything."""
    assert result.code in (0, 2), result.err
    assert "Traceback" not in result.err
    assert "internal error" not in result.err
    lines = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    if result.code == 2:
        assert not result.started
        assert lines
        assert lines[0].startswith("error: ")
        assert all(name in result.err for name in unknown_keys(given_arguments)), "a mistake was not told"
        return
    (composed,) = result.started
    config = to_dict(composed.config)
    overrides: dict[str, str | None] = {}
    for argument in given_arguments:
        key, equals, value = argument.lstrip("+").partition("=")
        if argument.startswith("~"):
            overrides[key[1:].partition("=")[0].strip()] = None
        elif equals:
            overrides[key.strip()] = value
    for key, value in overrides.items():
        if value is not None and key not in list_groups() and key != "recipe":
            assert shown(value, looked_up(config, key)), f"{key}={value} became {looked_up(config, key)!r}"
    if file is not None:
        replaced = {"model.revision", "data.name", "data.split", "data.eval_split", *overrides}
        for key, leaf in leaves(yaml.load(file, Loader=yaml.BaseLoader)):
            if key != "recipe" and not any(key == other or key.startswith(f"{other}.") for other in replaced):
                assert shown(leaf, looked_up(config, key)), f"{key}: {leaf} became {looked_up(config, key)!r}"


def unknown_keys(given_arguments: list[str]) -> list[str]:
    names = (argument.lstrip("+").partition("=") for argument in given_arguments)
    return [key for key, equals, _ in names if equals and key in UNKNOWN]


def looked_up(config: Any, key: str) -> Any:
    """The resolved value; a key that is not there is an ignored one."""
    names = key.split(".")
    for number, name in enumerate(names):
        if isinstance(config, dict) and name not in config:
            # An entry of a mapping may have dots in its name.
            return config[".".join(names[number:])]
        config = config[name]
    return config


def leaves(node: Any, prefix: str = ""):
    if isinstance(node, dict) and node:
        for name, part in node.items():
            if f"{prefix}{name}" != "defaults":
                yield from leaves(part, f"{prefix}{name}.")
    elif prefix:
        yield prefix[:-1], node


def shown(given_value: Any, value: Any) -> bool:
    """Whether a resolved value is what a text (or a list of texts) says, by a second reading of it."""
    if isinstance(given_value, list):
        return isinstance(value, list) and len(value) == len(given_value) and all(map(shown, given_value, value))
    if isinstance(given_value, dict):
        # Mappings of files are merged: an empty one adds nothing.
        return value is None or isinstance(value, dict)
    bare = given_value.strip()
    bare = bare[1:-1].strip() if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\"" else bare
    if "${" in given_value:
        return True
    if value is None:
        return bare.lower() in ("", "~", "null", "none")
    if isinstance(value, bool):
        return bare.lower() in (("true", "yes", "on") if value else ("false", "no", "off"))
    if isinstance(value, int | float):
        found = number(bare)
        # A whole number may be too long for a float to hold all its digits.
        return found is not None and type(value)(found) == value and (isinstance(value, float) or found == value)
    if isinstance(value, str):
        return value in (given_value, bare) or value == given_value.strip()[1:-1] or str(_as_yaml(bare)) == value
    if isinstance(value, list):
        return all(str(part) in given_value or number(given_value.strip("[] ")) == part for part in value)
    return isinstance(value, dict) and all(str(name) in given_value for name in value)


def number(bare: str) -> float | int | None:
    try:
        return int(bare.replace("_", ""))
    except ValueError:
        pass
    try:
        found = float(bare.replace("_", ""))
        return found if math.isfinite(found) else None
    except ValueError:
        found = _as_yaml(bare)
        return found if isinstance(found, int | float) else None


RUNS = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    # A failing example is small as it is; explaining it takes minutes.
    "phases": (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
}
QUICK, MANY = settings(max_examples=60, **RUNS), settings(max_examples=1100, **RUNS)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command_line(given_arguments: list[str], base: str) -> None:
    full = [f"recipe={base}", *given_arguments]
    check(run("train", *full), full)


def mutated_file(file: str, given_arguments: list[str]) -> None:
    Path("mutated.yaml").write_text(file, encoding="utf-8")
    full = ["recipe=./mutated.yaml", *given_arguments]
    check(run("train", *full), full, file)


few = st.lists(pairs.map("=".join), max_size=2)
test_command_lines = QUICK(given(arguments, st.sampled_from(sorted(RECIPES)))(command_line))
test_recipe_files = QUICK(given(recipe_files(), few)(mutated_file))
# Thousands of configs take minutes.
test_many_command_lines = pytest.mark.slow(MANY(given(arguments, st.sampled_from(sorted(RECIPES)))(command_line)))
test_many_recipe_files = pytest.mark.slow(MANY(given(recipe_files(), few)(mutated_file)))


@pytest.mark.slow  # starts the real command over and over
def test_the_real_command_says_the_same(tmp_path):
    seen: list[tuple[str, list[str]]] = []

    @settings(max_examples=34, database=None, **RUNS)
    @given(recipe_files(), few)
    def collect(file: str, given_arguments: list[str]) -> None:
        seen.append((file, given_arguments))

    collect()
    refused = 0
    for file, given_arguments in seen:
        Path("mutated.yaml").write_text(file, encoding="utf-8")
        full = ["recipe=./mutated.yaml", *given_arguments]
        inside = run("train", *full)
        # `config` composes as `train` does, and starts nothing where all is in order.
        verb = ["train"] if inside.code else ["config", "--json"]
        told = inside.err if inside.code else run(verb[0], *full).err
        command = [sys.executable, "-m", "qmemtune", *verb, "--", *full]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"})
        assert done.returncode == inside.code
        assert done.stderr == told
        refused += done.returncode == 2
        if not inside.code:
            assert json.loads(done.stdout) == json.loads(json.dumps(to_dict(inside.started[0].config)))
    assert len(seen) >= 30
    assert 0 < refused < len(seen)
    assert not (tmp_path / "runs").exists()
