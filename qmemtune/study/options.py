"""A study's command line: options of the study, overrides of all its runs, overrides of one variant's runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from qmemtune.config.fields import nearest
from qmemtune.config.study import StudyConfig
from qmemtune.config.values import BadValue, from_text
from qmemtune.errors import Finding, UserError

PREFIX = "study."
FOLDER_KEY = "study_dir"
FOLDERS = Path("studies")
_FOR_VARIANT = re.compile(r"^([A-Za-z_][\w-]*):(.+)$", re.DOTALL)
_RANGE = re.compile(r"^\[?\s*(\d+)\s*-\s*(\d+)\s*\]?$")
THE_STUDYS_OWN = {
    "seed": "give study.seeds=[0, 1, 2]",
    "recipe": "a study has its recipe: give single groups and keys",
    "run_dir": "give study_dir=FOLDER",
    "resume": "a study always goes on where it stopped",
}


@dataclass
class Request:
    """What a command line asks for."""

    options: StudyConfig = field(default_factory=StudyConfig)
    folder: Path | None = None
    """Where the study is; studies/<name> if not given."""
    overrides: list[str] = field(default_factory=list)
    """For all runs."""
    for_variants: dict[str, list[str]] = field(default_factory=dict)
    """For one variant's runs: written ``VARIANT:key=value``; ``NEW:VARIANT`` makes a variant like a known one."""


def read_request(arguments: Sequence[str]) -> Request:
    """Sort the arguments; overrides of runs are checked when the runs are composed.

    Raises:
        UserError: with every mistake.
    """
    request, findings = Request(), []
    hints = get_type_hints(StudyConfig)
    known = [PREFIX + option.name for option in dataclasses.fields(StudyConfig)]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        variant = _FOR_VARIANT.match(argument)
        if equals and key == FOLDER_KEY:
            request.folder = Path(from_text(value, str)).expanduser()
        elif equals and key.startswith(PREFIX):
            if key not in known:
                close = nearest(key, [*known, FOLDER_KEY])
                fix = f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"
                findings.append(Finding(f"unknown key {key}", argument, fix))
                continue
            try:
                setattr(request.options, key.removeprefix(PREFIX), _value(value, hints[key.removeprefix(PREFIX)]))
            except BadValue as bad:
                findings.append(Finding(bad.problem, argument, bad.fix))
        elif (own := re.split("[.=]", variant[2] if variant else argument)[0]) in THE_STUDYS_OWN:
            findings.append(Finding("a study sets this itself", argument, THE_STUDYS_OWN[own]))
        elif variant is not None:
            request.for_variants.setdefault(variant[1], []).append(variant[2])
        else:
            request.overrides.append(argument)
    if request.options.jobs < 1:
        findings.append(Finding(f"must be at least 1, not {request.options.jobs}", "study.jobs"))
    if findings:
        raise UserError.many(findings)
    return request


def _value(text: str, kind: Any) -> Any:
    """An option's value; a list of whole numbers may be a range, 0-9."""
    span = _RANGE.match(text)
    if span and int in _parts(kind):
        return list(range(int(span[1]), int(span[2]) + 1))
    return from_text(text, kind)


def _parts(kind: Any) -> set[Any]:
    """All plain types in a type."""
    arguments = getattr(kind, "__args__", ())
    return {kind} if not arguments else set().union(*(_parts(part) for part in arguments))
