"""Read the overrides of a command line: ``recipe=``, ``group=option``, ``key=value``, ``+key=value`` and ``~key``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from qmemtune.config.adapters import ADAPTERS
from qmemtune.config.familiar import familiar
from qmemtune.config.fields import fields_of, nearest, sections
from qmemtune.config.places import list_groups, list_options, list_recipes
from qmemtune.config.renamed import SHORT
from qmemtune.config.settings import Setting
from qmemtune.errors import Finding

_KEY = re.compile(r"^[A-Za-z_][\w-]*(\.[^.=\s]+)*$")


@dataclass
class Overrides:
    """What a command line asks for, and what is wrong with it."""

    recipe: str | None = None
    groups: dict[str, str] = field(default_factory=dict)
    """Group → option."""
    removed_groups: list[str] = field(default_factory=list)
    """Groups given as ``~group``: back to the schema's defaults."""
    settings: list[Setting] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    incomplete: bool = False
    """A recipe or an option was not found, so that missing values say nothing."""


def read_overrides(arguments: Sequence[str]) -> Overrides:
    """Sort the arguments; a key is only checked against the schema later, together with the files."""
    result, groups = Overrides(), set(list_groups())
    for argument in arguments:
        _read_one(argument, groups, result)
    return result


def _read_one(argument: str, groups: set[str], result: Overrides) -> None:
    shown = argument if len(argument) <= 100 else argument[:97] + "..."
    if argument.startswith("~"):
        _read_removal(argument, shown, groups, result)
        return
    key, equals, value = argument.partition("=")
    key = key.strip().lstrip("+")
    key = SHORT.get(key, key)
    if not equals or not _KEY.match(key.replace("/", ".")):
        result.findings.append(Finding("not an override", shown, _override_fix(argument)))
        # What the recipe gives would be reported as missing beside the one thing to mend.
        result.incomplete = result.incomplete or _is_recipe(argument)
    elif key == "recipe":
        result.recipe = _strip_quotes(value)
    elif key in groups or ("/" in key and key.split("/")[0] in groups):
        _read_group(key, _strip_quotes(value), shown, result)
    elif "/" in key:
        result.findings.append(Finding(f"{key} is no config group", shown, _near(key, sorted(groups))))
    else:
        result.settings.append(Setting(key, value, shown, is_text=True))


def _read_removal(argument: str, shown: str, groups: set[str], result: Overrides) -> None:
    # Hydra writes ~key=value too; the value adds nothing.
    key = argument[1:].partition("=")[0].strip()
    key = SHORT.get(key, key)
    if key in groups:
        result.removed_groups.append(key)
        result.groups.pop(key, None)
    elif key == "recipe" or not _KEY.match(key):
        result.findings.append(Finding("not an override", shown, "write ~key to return a key to its default"))
    else:
        result.settings.append(Setting(key, None, shown, reset=True))


def _read_group(group: str, option: str, shown: str, result: Overrides) -> None:
    if re.match(r"^[\w.-]+(/[\w.-]+)*$", option) and ".." not in option:
        result.groups[group] = option
        if group in result.removed_groups:
            result.removed_groups.remove(group)
    else:
        result.findings.append(unknown_option(group, option, shown))


def unknown_option(group: str, option: str, where: str, options: list[str] | None = None) -> Finding:
    """The finding for an option that no file stands for."""
    options = list_options(group) if options is None else options
    has_path = f"{group}.path" in fields_of("lora")
    if has_path and re.search(r"[/\\:]|^\.|\.\w+$", option):
        return Finding(f"{option!r} is no option of the group {group}", where, f"did you mean {group}.path={option}?")
    close = nearest(option, options)
    fix = f"did you mean {close[0]}? " if close else ""
    return Finding(f"{option!r} is no option of the group {group}", where, f"{fix}options: {', '.join(options)}")


def _is_recipe(argument: str) -> bool:
    return argument in list_recipes() or argument.endswith((".yaml", ".yml"))


def _override_fix(argument: str) -> str:
    if _is_recipe(argument):
        return f"did you mean recipe={argument}?"
    return "write key=value, group=option, +key=value, ~key or recipe=NAME"


def _near(name: str, valid: list[str]) -> str:
    close = nearest(name, valid)
    return f"did you mean {close[0]}?" if close else f"one of {', '.join(valid)}"


def _strip_quotes(value: str) -> str:
    value = value.strip()
    return value[1:-1] if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"" else value


def unknown_key(setting: Setting, kind: str) -> Finding:
    """The finding for a key that the schema does not have."""
    key = setting.key
    if key in sections():
        return Finding(
            f"{key} is a section and holds no value of its own",
            setting.where,
            f"set its keys one by one, such as {next(k for k in fields_of(kind) if k.startswith(key + '.'))}",
        )
    for length in range(key.count("."), 0, -1):
        parent = ".".join(key.split(".")[:length])
        if parent in fields_of(kind) and fields_of(kind)[parent].item is not None:
            known = list(fields_of(kind)[parent].item_fields(key.removeprefix(f"{parent}.").split(".")[0]))
            close = nearest(key, known)
            fix = f"did you mean {close[0]}?" if close else f"its keys are {', '.join(known)}"
            return Finding(f"unknown key {key}", setting.where, fix)
        if parent in fields_of(kind):
            return Finding(f"unknown key {key}: {parent} holds one value", setting.where, f"set {parent} itself")
    own = list(fields_of(kind))
    known = own + [other for name in ADAPTERS for other in fields_of(name) if other not in own]
    meant = familiar(key)
    # `group=option` with a slip in the group's name.
    groups = nearest(key, ["recipe", *list_groups()]) if "." not in key else []
    close = [meant] if meant else groups or nearest(key, known)
    fix = f"did you mean {close[0]}?" if close else "`qmemtune config` prints every key"
    return Finding(f"unknown key {key}", setting.where, fix)
