"""Options that have another name now: the configs of earlier runs still load."""

from __future__ import annotations

from dataclasses import replace

from qmemtune.config.settings import Setting

KEYS = {"export.overwrite": "export.force"}
VALUES = {("export.format", "adapter"): "live"}


def renamed(settings: list[Setting]) -> list[Setting]:
    """The settings of a resolved config under the names of today."""
    return [renamed_value(replace(setting, key=KEYS.get(setting.key, setting.key))) for setting in settings]


def renamed_value(setting: Setting) -> Setting:
    """The setting with an option's value of today."""
    value = VALUES.get((setting.key, str(setting.value)))
    return setting if value is None else replace(setting, value=value, raw=value)
