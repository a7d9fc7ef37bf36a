"""Versions of libraries: which should work, and which the tests ran with.

Ranges are the installed package's own requirements. The tested versions are those of constraints.txt, which lies at the
top of a source checkout and travels in the metadata of the installed package.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import qmemtune
from qmemtune.errors import UserError

FILE = "constraints.txt"


@cache
def tested() -> dict[str, str]:
    """Package -> the version that the tests ran with.

    Raises:
        UserError: the installation is broken.
    """
    pins = (line.split("#")[0].strip().partition("==") for line in constraints().splitlines())
    return {canonical(name): version for name, _, version in pins if version}


def constraints() -> str:
    """The text of constraints.txt: of the checkout that runs, else of the installed package's metadata."""
    root = Path(qmemtune.__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file() and (root / FILE).is_file():
        return (root / FILE).read_text(encoding="utf-8")
    text = metadata.distribution("qmemtune").read_text(f"extra_metadata/{FILE}")
    if text is None:
        raise UserError(f"the installation has no {FILE}", where=str(root), fix="install qmemtune again")
    return text


@cache
def required() -> dict[str, SpecifierSet]:
    """Package -> the versions that should work, of all that is needed without extras."""
    found = {}
    for line in metadata.requires("qmemtune") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found[canonical(requirement.name)] = requirement.specifier
    return found


def python_range() -> SpecifierSet | None:
    """The Python versions that should work; None where the installation does not say."""
    facts = metadata.metadata("qmemtune")
    return SpecifierSet(facts["Requires-Python"]) if "Requires-Python" in facts else None


def canonical(name: str) -> str:
    """A package's name as all its spellings share it."""
    return re.sub(r"[-_.]+", "-", name).lower()
