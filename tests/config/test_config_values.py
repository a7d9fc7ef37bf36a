"""A text or YAML value means what its field's type says, or is refused with a reason."""

from __future__ import annotations

from typing import Literal

import pytest

from qmemtune.config.values import BadValue, from_text, from_yaml

Colour = Literal["red", "none"]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("6e12345", str, "6e12345"),
        ("a=b, #c ~(d) 'e' é 你", str, "a=b, #c ~(d) 'e' é 你"),
        ("'quoted, text'", str, "'quoted, text'"),
        ('"(.+)"', str | None, '"(.+)"'),
        ('"{answer}"', str | None, '"{answer}"'),
        ('"null"', str | None, "null"),
        ("'None'", str | None, "None"),
        ('""', str | None, ""),
        ("'a' and 'b'", str, "'a' and 'b'"),
        ("", str, ""),
        ("null", str | None, None),
        ("None", int | None, None),
        ("none", Colour, "none"),
        ("1e-4", float, 1e-4),
        ("3", float, 3.0),
        ("-7", int, -7),
        ("1e3", int, 1000),
        ("1_000", int, 1000),
        ("TRUE", bool, True),
        ("off", bool, False),
        ("[a, 'b,c']", list[str], ["a", "b,c"]),
        ("['a', null, \"null\"]", list[str | None], ["a", None, "null"]),
        ("'none'", Colour, "none"),
        ('"3"', int, 3),
        ("q_proj,v_proj", list[str], ["q_proj", "v_proj"]),
        ("all-linear", list[str], ["all-linear"]),
        ("[]", list[int], []),
        ("[0.9, 0.95]", list[float], [0.9, 0.95]),
        ("[1]", list[int] | None, [1]),
        ("{a: b, c: 'd: e'}", dict[str, str], {"a": "b", "c": "d: e"}),
        ("{}", dict[str, str], {}),
    ],
)
def test_text_is_read_by_the_fields_type(text, kind, value):
    read = from_text(text, kind)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1.5", int),
        ("1e99999", int),
        ("99999999999999999999", int),
        ("inf", float),
        ("nan", float),
        ("1e999", float),
        ("", int),
        ("null", int),
        ("maybe", bool),
        ("blue", Colour),
        ("[1, x]", list[int]),
        ("[a", list[str]),
        ("a: b", dict[str, str]),
        ("{a}", dict[str, str]),
    ],
)
def test_text_that_does_not_fit_is_refused(text, kind):
    with pytest.raises(BadValue):
        from_text(text, kind)


def test_bad_choice_names_the_nearest():
    with pytest.raises(BadValue, match="not one of red, none") as caught:
        from_text("rde", Colour)
    assert caught.value.fix == "did you mean red?"


@pytest.mark.parametrize(
    ("value", "raw", "kind", "expected"),
    [
        (float("inf"), "6e12345", str, "6e12345"),
        (2024, "2024", str, "2024"),
        (1000.0, "1e3", int, 1000),
        (3, "3", float, 3.0),
        (False, "no", Literal["yes", "no"], "no"),
        ("q_proj", "q_proj", list[str], ["q_proj"]),
        ([0.5, 1], ["0.5", "1"], list[float], [0.5, 1.0]),
        ([float("inf")], ["1e999"], list[str], ["1e999"]),
        (None, "", int | None, None),
    ],
)
def test_yaml_value_is_read_by_the_fields_type(value, raw, kind, expected):
    assert from_yaml(value, raw, kind) == expected


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, int), ("3", int), (1.5, int), (None, str), (True, str), ({"a": 1}, list[str]), (1, bool), (True, float)],
)
def test_yaml_value_of_another_type_is_refused(value, kind):
    with pytest.raises(BadValue):
        from_yaml(value, str(value), kind)
