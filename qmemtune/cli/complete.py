"""Shell completion of overrides: recipe names, groups and their options, keys and their choices."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import typer


def complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """What the word under the cursor can become.

    Bash breaks words at ``=``: there the key and the sign are earlier words (Typer drops the sign where the cursor
    stands right behind it), and only the value is completed.
    """
    before = [str(word) for word in ctx.params.get("overrides") or ()]
    if not incomplete and before and "=" not in before[-1] and _values(before[-1]):
        return _values(before[-1])
    if len(before) >= 2 and before[-1] == "=":
        return [value for value in _values(before[-2]) if value.startswith(incomplete)]
    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={option}" for option in _values(key) if option.startswith(value)]
    return [word for word in _words(incomplete) if word.startswith(incomplete)]


def _words(incomplete: str) -> list[str]:
    from qmemtune.config.adapters import ADAPTERS
    from qmemtune.config.fields import fields_of
    from qmemtune.config.places import list_groups

    keys = list(dict.fromkeys(key for kind in ADAPTERS for key in fields_of(kind)))
    if incomplete.startswith("~"):
        return [f"~{key}" for key in keys]
    sign = "+" if incomplete.startswith("+") else ""
    first = [] if sign else ["recipe=", *(f"{group}=" for group in list_groups())]
    return list(dict.fromkeys([*first, *(f"{sign}{key}=" for key in keys)]))


def _values(key: str) -> list[str]:
    from qmemtune.config.adapters import ADAPTERS
    from qmemtune.config.fields import fields_of
    from qmemtune.config.places import list_groups, list_options, list_recipes

    key = key.lstrip("+")
    if key == "recipe":
        return list(list_recipes())
    if key in list_groups():
        return list_options(key)
    if key == "adapter.kind":
        return list(ADAPTERS)
    for kind in ADAPTERS:
        if key in fields_of(kind):
            return _choices(fields_of(kind)[key].type)
    return []


def _choices(kind: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return [choice for part in get_args(kind) for choice in _choices(part)]
