"""Compose a config: Hydra orders the files, this package reads, merges and validates them.

Hydra resolves the defaults list of a recipe (the groups, their order, packages and search path). Values never pass
through it: ``key=value`` is read against the type of its field, so a path, a regular expression or a revision may hold
any character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from qmemtune.config.checks import cross_field_problems
from qmemtune.config.defaults import Reachable
from qmemtune.config.dump import to_dict, to_yaml
from qmemtune.config.fields import fields_of, nearest
from qmemtune.config.overrides import Overrides, read_overrides
from qmemtune.config.paths import DATA_PATHS
from qmemtune.config.places import SUFFIX, find_config, is_own, list_recipes, search_path, shown
from qmemtune.config.replaced import resets
from qmemtune.config.schema import Config
from qmemtune.config.settings import Setting, flatten
from qmemtune.config.unused import unused_options
from qmemtune.config.validate import Validated, source_of, validate
from qmemtune.config.yaml_file import read_yaml
from qmemtune.errors import Finding, UserError

__all__ = ["Composed", "compose", "compose_on", "to_dict", "to_yaml"]

NO_RECIPE = "custom"
Excused = Callable[[str, Config], bool]
"""Takes the key of a problem and the config; whether the problem is none here."""


@dataclass(frozen=True)
class Composed:
    """A validated config and where its values come from."""

    config: Config
    provenance: dict[str, str]
    """Dotted key → the file or override that set it, or "default"."""
    recipe: str
    history: dict[str, list[Setting]] = field(default_factory=dict)
    """Dotted key → all it was set to, first to last; keys at their default are left out."""
    warnings: list[str] = field(default_factory=list)
    """Options that were given and have no effect."""
    missing: list[str] = field(default_factory=list)
    """Keys that must still be given (only with ``allow_missing``)."""


def compose(
    overrides: Sequence[str],
    *,
    base: Mapping[str, Any] | None = None,
    base_name: str = "base",
    allow_missing: bool = False,
    needs_data: bool = True,
) -> Composed:
    """Compose a recipe (or ``base``, or only the schema's defaults) and the overrides.

    Args:
        overrides: ``recipe=NAME_OR_FILE``, ``group=option``, ``key=value``, ``+key=value``, ``~key``.
        base: nested plain values to start from instead of a recipe.
        base_name: where messages say that those values stand.
        allow_missing: leave values that must be given at ``???`` instead of reporting them.
        needs_data: whether the files of rows must be there.

    Raises:
        UserError: with every mistake in files and overrides.
    """
    given = read_overrides(overrides)
    excused = None if needs_data else _data_may_be_gone
    if base is not None:
        if given.recipe not in (None, NO_RECIPE):
            found = Finding(f"{base_name} brings its own settings", f"recipe={given.recipe}", "leave it out")
            given.findings.append(found)
        return compose_on(list(flatten(base, base_name)), given, allow_missing, quiet=base_name, excused=excused)
    recipe = _find_recipe(given)
    given.incomplete = given.incomplete or (recipe is None and given.recipe not in (None, NO_RECIPE))
    layers = _compose_files(recipe, given)
    name = NO_RECIPE if recipe is None else recipe.stem
    first = [Setting("recipe", name, f"recipe={given.recipe}", is_text=True)] if recipe else []
    return _finish([*first, *layers], given, allow_missing, excused=excused)


def compose_on(
    start: list[Setting], given: Overrides, allow_missing: bool, *, quiet: str, excused: Excused | None = None
) -> Composed:
    """Settings, then the groups of the command line in place of their sections, then the rest."""
    layers = _compose_files(None, given)
    replaced = tuple(f"{group}." for group in (*given.groups, *given.removed_groups))
    kept = [setting for setting in start if not (replaced and setting.key.startswith(replaced))]
    return _finish([*kept, *layers], given, allow_missing, quiet=quiet, excused=excused)


def _finish(
    layers: list[Setting],
    given: Overrides,
    allow_missing: bool,
    *,
    quiet: str | None = None,
    excused: Excused | None = None,
) -> Composed:
    result = validate([*layers, *resets(layers, given.settings), *given.settings])
    findings = [*given.findings, *result.findings]
    if not allow_missing and not given.incomplete:
        findings += result.missing
    # Checks across fields only make sense of values that are themselves in order.
    if not result.findings:
        problems = cross_field_problems(result.config)
        findings += [
            _finding(*problem, result)
            for problem in problems
            if excused is None or not excused(problem[0], result.config)
        ]
    if findings:
        raise UserError.many(list(dict.fromkeys(findings)))
    provenance = {key: source_of(result.history, key) for key in _all_keys(result)}
    return Composed(
        result.config,
        provenance,
        result.config.recipe,
        result.history,
        [*unused_options(result.config, _given(result, quiet)), *_overruled(layers, given, result)],
        [finding.problem.split()[0] for finding in result.missing],
    )


def _data_may_be_gone(key: str, config: Config) -> bool:
    return is_data_path(key)


def is_data_path(key: str) -> bool:
    """Whether a key says where rows are."""
    return key in DATA_PATHS or (key.startswith("data.sources.") and key.endswith(".path"))


def _given(result: Validated, quiet: str | None) -> dict[str, str]:
    """Keys that a person set, in an override or a file of theirs, and where."""
    last = {key: settings[-1] for key, settings in result.history.items()}
    return {
        key: setting.where
        for key, setting in last.items()
        if setting.is_text or not (setting.reset or setting.source == quiet or is_own(Path(setting.source)))
    }


def _all_keys(result: Validated) -> list[str]:
    keys = dict.fromkeys(fields_of(result.config.adapter.kind))
    keys.update(dict.fromkeys(result.history))
    return list(keys)


def _finding(key: str, problem: str, fix: str | None, result: Validated) -> Finding:
    """A check's finding at the place that set the key."""
    last = result.history.get(key, [None])[-1]
    if last is None or last.reset:
        return Finding(problem, f"{key} (default)", fix)
    return Finding(problem if last.is_text else f"{key}: {problem}", last.where, fix)


def _overruled(layers: list[Setting], given: Overrides, result: Validated) -> list[str]:
    """Values of an option chosen on the command line that the recipe's own text replaces."""
    chosen = {
        shown(path): f"{group}={option}" for group, option in given.groups.items() if (path := _option(group, option))
    }
    found = []
    for key, settings in result.history.items():
        last = settings[-1]
        for setting in settings[:-1]:
            override = chosen.get(setting.source)
            if override and not (last.is_text or last.reset) and last.value != setting.value:
                found.append(
                    f"{override} sets {key} to {setting.value}, but {last.where} comes later and sets {last.value}"
                    f" -> give {key}={setting.value} if you want that"
                )
    return found


def _option(group: str, option: str) -> Path | None:
    return find_config(f"{group}/{option}", search_path(None))


def _find_recipe(given: Overrides) -> Path | None:
    """The recipe's file; a name that stands for none becomes a finding."""
    name = given.recipe
    if name is None or name == NO_RECIPE:
        return None
    where = f"recipe={name}"
    if "/" in name or name.endswith((SUFFIX, ".yml")):
        path = Path(name).expanduser()
        if path.suffix != SUFFIX:
            path = path.with_name(path.name + SUFFIX) if path.suffix != ".yml" else path
        if path.is_file() and path.suffix == SUFFIX:
            return path.resolve()
        fix = f"name it {path.stem}{SUFFIX}" if path.is_file() else "`qmemtune recipes` lists the recipes"
        given.findings.append(Finding("there is no such recipe file", where, fix))
        return None
    recipes = list_recipes()
    if name in recipes:
        return recipes[name]
    close = nearest(name, list(recipes))
    fix = f"did you mean {close[0]}? " if close else ""
    given.findings.append(Finding(f"there is no recipe {name!r}", where, f"{fix}recipes: {', '.join(recipes)}"))
    return None


def _compose_files(recipe: Path | None, given: Overrides) -> list[Setting]:
    """Settings of the recipe and of all that its defaults list and the given groups name, in order of merging."""
    if recipe is None and not given.groups:
        return []
    folders = search_path(recipe)
    reachable = Reachable(folders, given.groups)
    if recipe is not None:
        reachable.follow(recipe)
    for group, option in given.groups.items():
        reachable.choose(group, option, f"{group}={option}")
    given.findings.extend(reachable.findings)
    if reachable.findings:
        given.incomplete = True
        # Hydra would stop at the first of them; the readable files' settings are still checked.
        return [setting for path, file in reachable.files.items() for setting in _packed(file.settings, path, folders)]
    try:
        order = _hydra_order(recipe, given, folders, reachable.listed)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, AssertionError) as error:
        where = shown(recipe) if recipe is not None else None
        given.findings.append(Finding(" ".join(str(error).split()), where, "mend the defaults list"))
        return []
    settings = []
    for name, package in order:
        path = recipe if recipe is not None and name == recipe.stem else find_config(name, folders)
        if path is not None:
            file = reachable.files.get(path) or read_yaml(path)
            prefix = f"{package}." if package else ""
            settings += [replace(setting, key=prefix + setting.key) for setting in file.settings]
    return settings


def _packed(settings: list[Setting], path: Path, folders: list[Path]) -> list[Setting]:
    """Settings of a group's option under the group's name (used only to look for more mistakes)."""
    for folder in folders:
        if path.is_relative_to(folder) and path.parent != folder:
            group = path.relative_to(folder).parts[0]
            return [replace(setting, key=f"{group}.{setting.key}") for setting in settings]
    return settings


def _hydra_order(recipe: Path | None, given: Overrides, folders: list[Path], listed: set[str]) -> list[tuple[str, str]]:
    """(config name, package) in order of merging, as Hydra resolves the defaults list."""
    searched = ",".join(json.dumps(f"file://{folder}", ensure_ascii=False) for folder in folders[1:])
    name = recipe.stem if recipe is not None else None
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        removed = [f"~{group}" for group in given.removed_groups if group in listed]
        chosen = [f"{'' if group in listed else '+'}{group}={option}" for group, option in given.groups.items()]
        arguments = [f"hydra.searchpath=[{searched}]", *removed, *chosen]
        result = loader.compute_defaults_list(name, arguments, RunMode.RUN)
    return [
        (entry.config_path, "" if entry.package in (None, "_global_") else entry.package)
        for entry in result.defaults
        # Hydra's own files are listed among ours; a recipe may be called like one.
        if entry.config_path and (entry.config_path == name or not re.match(r"hydra(/|$)|_dummy", entry.config_path))
    ]
