"""Options that have another name, or a shorter one: the configs of earlier runs still load."""

from __future__ import annotations

from dataclasses import replace

from qmemtune.config.settings import Setting

KEYS = {"export.overwrite": "export.force", "resume": "resume.path"}
SHORT = {"resume": "resume.path"}
"""Sections that an override may give a value, and the key that is meant."""


def renamed(settings: list[Setting]) -> list[Setting]:
    """The settings of a resolved config under the names of today."""
    return [replace(setting, key=KEYS.get(setting.key, setting.key)) for setting in settings]
