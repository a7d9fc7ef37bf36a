"""From a study and a command line to cells: one run each, with a whole config."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qmemtune.config.compose import Composed, compose, to_dict
from qmemtune.config.fields import nearest
from qmemtune.config.schema import Config
from qmemtune.errors import Finding, UserError
from qmemtune.study.design import Match, Setting, Study, Variant
from qmemtune.study.options import Request

Named = TypeVar("Named", Variant, Setting)
Count = Callable[[Config], int]
"""Trainable parameters of a config."""

PATH = re.compile(r"^([^=]*path=)(.+)$", re.DOTALL)
"""An override that names a file."""
UNHASHED = ("run_dir", "resume", "recipe", "description", "needs", "export", "tracking")
"""Parts of a config that change nothing about a run's numbers."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    setting: str
    variant: str
    seed: int
    learning_rate: float
    config: Config
    parameters: int
    """Trainable."""

    @property
    def name(self) -> str:
        """Its folder within the study, one for each run."""
        return f"{self.setting}/{self.variant}/lr{self.learning_rate:g}/seed{self.seed}"

    @property
    def digest(self) -> str:
        """Of all that its numbers depend on, as far as the config says."""
        whole = json.dumps(decisive(self.config), sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


def decisive(config: Config) -> dict[str, Any]:
    """The parts of a config that matter to a run's numbers, as JSON has them."""
    kept = {name: value for name, value in to_dict(config).items() if name not in UNHASHED}
    whole: dict[str, Any] = json.loads(json.dumps(kept, sort_keys=True))
    return whole


def is_run_of(stored: Any, config: Config) -> bool:
    """Whether a run with the decisive parts ``stored`` has the numbers of ``config``.

    An option that did not exist then counts with its default, which is what the run did.
    """
    defaults = decisive(Config(adapter=type(config.adapter)()))
    return isinstance(stored, dict) and _filled(stored, defaults) == decisive(config)


def _filled(stored: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = {name: stored.get(name, value) for name, value in defaults.items()} | stored
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(filled[name], dict):
            filled[name] = _filled(filled[name], value)
    return filled


@dataclass(frozen=True)
class Plan:
    """All cells of a study, in the order in which they run."""

    study: Study
    settings: list[Setting]
    variants: list[Variant]
    cells: list[Cell]
    seeds: list[int]
    learning_rates: list[float]
    """Of the stability grid."""
    grid_seeds: list[int]
    warnings: list[str]
    command: str
    """What was asked for, as a command line; seeds, learning rates and folders left out."""


def make_plan(study: Study, request: Request, count: Count) -> Plan:
    """Compose every cell.

    Seeds come outermost, so that whatever differs between seeds only is loaded once for all variants and a study that
    is stopped early has whole seeds.

    Raises:
        UserError: a name that the study does not know, or a mistake in a config.
    """
    options = request.options
    variants = chosen(all_variants(study, request), options.variants or study.default_variants, "study.variants")
    settings = chosen(list(study.settings), options.settings or study.default_settings, "study.settings")
    seeds = list(study.seeds if options.seeds is None else options.seeds)
    rates = list(study.learning_rates if options.learning_rates is None else options.learning_rates)
    grid_seeds = list(study.grid_seeds if options.grid_seeds is None else options.grid_seeds)
    if not rates:
        grid_seeds = []
    counted = Counted(study, request, count)
    warnings: list[str] = []
    cells: dict[str, Cell] = {}

    def add(setting: Setting, variant: Variant, seed: int, rate: float | None) -> None:
        composed, parameters = counted.composed(setting, variant, rate)
        warnings.extend(line for line in composed.warnings if line not in warnings)
        config = dataclasses.replace(composed.config, seed=seed)
        used = config.optimizer.learning_rate
        cell = Cell(setting.name, variant.name, seed, used, config, parameters)
        cells.setdefault(cell.name, cell)

    for seed in sorted({*seeds, *grid_seeds}):
        for setting in settings:
            for variant in variants:
                if seed in seeds:
                    add(setting, variant, seed, None)
                if seed in grid_seeds and in_grid(study, setting, variant, options.variants is not None):
                    for rate in rates:
                        add(setting, variant, seed, rate)
    return Plan(
        study, settings, variants, list(cells.values()), seeds, rates, grid_seeds, warnings, command(study, request)
    )


def command(study: Study, request: Request) -> str:
    """The command line of a study, without what its results tell in other ways: seeds and learning rates.

    Paths are cut to their last part: they are elsewhere on every machine.
    """
    options = request.options
    parts = ["qmemtune study", study.name]
    if study.on is not None:
        parts.append(f"study.on={study.on}")
    for key, wanted, known, usual in (
        ("variants", options.variants, [one.name for one in study.variants], study.default_variants),
        ("settings", options.settings, [one.name for one in study.settings], study.default_settings),
    ):
        if wanted and list(wanted) != list(usual or known):
            parts.append(f"study.{key}=[{','.join(wanted)}]")
    given = [*request.overrides, *(f"{name}:{text}" for name, texts in request.for_variants.items() for text in texts)]
    return " ".join([*parts, *(PATH.sub(lambda found: found[1] + Path(found[2]).name, text) for text in given)])


def in_grid(study: Study, setting: Setting, variant: Variant, named: bool) -> bool:
    """Whether a variant is run over the stability grid in a setting; variants named by the user are."""
    return setting.name in (study.grid_settings or (setting.name,)) and (
        named or variant.name in (study.grid_variants or (variant.name,))
    )


def all_variants(study: Study, request: Request) -> list[Variant]:
    """The study's variants and those that the command line makes: ``NEW:VARIANT`` or ``NEW:key=value``."""
    found = {variant.name: variant for variant in study.variants}
    for name, given in request.for_variants.items():
        like = [text for text in given if "=" not in text and not text.startswith("~")]
        for other in like:
            if other not in found:
                raise UserError(
                    f"the study has no variant {other!r}", where=f"{name}:{other}", fix=suggestion(other, list(found))
                )
            about = f"{other}, with {', '.join(text for text in given if text != other)}"
            found[name] = dataclasses.replace(found[other], name=name, about=about, like=found[other].like or other)
        if name not in found:
            if name not in (request.options.variants or ()):
                raise UserError(
                    f"the study has no variant {name!r}",
                    where=f"{name}:{given[0]}",
                    fix=f"{suggestion(name, list(found))}; a new one must be named in study.variants",
                )
            found[name] = Variant(name, ())
    return list(found.values())


def chosen(known: list[Named], wanted: Sequence[str], where: str) -> list[Named]:
    """The known ones that are wanted, in that order; all if none are named.

    Raises:
        UserError: some are not known.
    """
    if not wanted:
        return known
    by_name = {one.name: one for one in known}
    findings = [
        Finding(f"the study has no {name!r}", where, suggestion(name, list(by_name)))
        for name in wanted
        if name not in by_name
    ]
    if findings:
        raise UserError.many(findings)
    return [by_name[name] for name in dict.fromkeys(wanted)]


def suggestion(name: str, valid: list[str]) -> str:
    """What may have been meant."""
    close = nearest(name, valid)
    return (f"did you mean {close[0]}? " if close else "") + f"it has {', '.join(valid)}"


class Counted:
    """Composes the cells' configs, with the numbers that are matched by counting parameters."""

    def __init__(self, study: Study, request: Request, count: Count) -> None:
        self.study, self.request, self.count = study, request, count
        self.variants = {variant.name: variant for variant in all_variants(study, request)}
        self._known: dict[tuple[str, str], tuple[list[str], int]] = {}
        self._counts: dict[str, int] = {}
        self._composed: dict[tuple[str, ...], Composed] = {}

    def composed(self, setting: Setting, variant: Variant, rate: float | None) -> tuple[Composed, int]:
        """The config of a variant in a setting, seed left out, and its trainable parameters."""
        overrides, parameters = self.matched(setting, variant)
        if rate is not None:
            overrides = [*overrides, f"optimizer.learning_rate={rate!r}"]
        return self.compose(setting, variant, overrides), parameters

    def matched(self, setting: Setting, variant: Variant) -> tuple[list[str], int]:
        """The overrides that matching adds, and the trainable parameters."""
        key = (setting.name, variant.name)
        if key not in self._known:
            match = variant.match
            found = [] if match is None else [self.search(setting, variant, match)]
            self._known[key] = (found, self.parameters(setting, variant, found))
        return self._known[key]

    def search(self, setting: Setting, variant: Variant, match: Match) -> str:
        """The override with the number that matches; parameters grow with it."""
        _, wanted = self.matched(setting, self.variants[match.against])

        def reaches(number: int) -> bool:
            found = self.parameters(setting, variant, [f"{match.key}={number}"])
            return found >= wanted if match.bound == "at_least" else found > wanted

        low, high = 1, match.largest
        if not reaches(high):
            raise UserError(
                f"no value of {match.key} up to {match.largest} gives {variant.name} the {wanted:,} parameters "
                f"of {match.against}",
                where=f"{setting.name}/{variant.name}",
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(middle) else (middle + 1, high)
        number = low if match.bound == "at_least" else low - 1
        if number < 1:
            raise UserError(
                f"{variant.name} has more parameters than {match.against} at {match.key}=1 already",
                where=f"{setting.name}/{variant.name}",
            )
        return f"{match.key}={number}"

    def parameters(self, setting: Setting, variant: Variant, overrides: list[str]) -> int:
        config = self.compose(setting, variant, overrides).config
        key = repr((config.model, config.data.regression, config.adapter))
        if key not in self._counts:
            self._counts[key] = self.count(config)
        return self._counts[key]

    def compose(self, setting: Setting, variant: Variant, overrides: list[str]) -> Composed:
        own = [text for text in self.request.for_variants.get(variant.name, []) if "=" in text or text.startswith("~")]
        arguments = [
            f"recipe={self.study.recipe}",
            *self.study.overrides,
            *setting.overrides,
            *variant.overrides,
            *setting.for_variants.get(variant.like or variant.name, ()),
            *self.request.overrides,
            *own,
            *overrides,
        ]
        key = tuple(arguments)
        try:
            if key not in self._composed:
                self._composed[key] = compose(arguments)
            return self._composed[key]
        except UserError as error:
            raise UserError.many(
                [
                    dataclasses.replace(found, where=f"{setting.name}/{variant.name}: {found.where}")
                    for found in error.findings
                ]
            ) from error


def described(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The cells for a list: ``cell``, ``parameters``, ``digest``."""
    return [{"cell": cell.name, "parameters": cell.parameters, "digest": cell.digest} for cell in cells]
