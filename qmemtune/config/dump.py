"""A config as plain values and as YAML that reads back as the same config."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import yaml

from qmemtune.config.interpolate import escape
from qmemtune.config.schema import Config

# YAML 1.2 and other readers take these for numbers, PyYAML's own dumper does not: quote them.
_LIKE_A_NUMBER = re.compile(r"^[-+.]?\d[\d_.:]*(?:[eE][-+]?\d+)?$")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    text = escape(text)
    if "\n" in text and not re.search(r"[ \t]\n|^\s|[^\x20-\uffff\n]", text):
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
    style = '"' if "\n" in text or _LIKE_A_NUMBER.match(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested values: strings, numbers, lists, dicts and None."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The whole config as YAML, in the schema's order."""
    dumped: str = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return dumped
