"""From settings to a validated config: every unknown key, wrong type, bad choice and missing value at once."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qmemtune.config import interpolate
from qmemtune.config.adapters import ADAPTERS
from qmemtune.config.fields import ADAPTER_KEY, KIND_KEY, Field, elsewhere, field_for, fields_of, nearest, sections
from qmemtune.config.missing import MISSING
from qmemtune.config.overrides import unknown_key
from qmemtune.config.schema import Config
from qmemtune.config.settings import DEFAULT, Setting
from qmemtune.config.values import BadValue, from_text, from_yaml
from qmemtune.config.yaml_file import CODE_KEY
from qmemtune.credentials import hide, holds_token
from qmemtune.errors import Finding


@dataclass
class Validated:
    """A config, who set its values, and what is wrong with it (then ``config`` holds defaults in those places)."""

    config: Config
    history: dict[str, list[Setting]]
    """Dotted key → what it was set to, first to last, as far as it still counts."""
    findings: list[Finding]
    missing: list[Finding]
    """Values that must be given and are not."""


def validate(settings: Iterable[Setting]) -> Validated:
    """Validate settings, later ones replacing earlier ones."""
    settings = list(settings)
    findings: list[Finding] = []
    kind = _adapter_kind(settings, findings)
    history: dict[str, list[Setting]] = {}
    for setting in settings:
        problem = _token_in(setting) or _problem_with_key(setting, kind)
        if problem is not None:
            findings.append(problem)
        elif not (setting.key in sections() and not setting.is_text):
            _record(setting, kind, history)
    values = _Values(kind, history, findings)
    config = _build(Config, "", kind, values)
    missing = [_missing(field) for field in fields_of(kind).values() if values.get(field.key) == MISSING]
    if config.data.sources:
        missing = [finding for finding in missing if not finding.problem.startswith("data.path ")]
    return Validated(config, history, findings, missing)


def _adapter_kind(settings: list[Setting], findings: list[Finding]) -> str:
    """The adapter's kind as the settings leave it, or the default after reporting a bad one."""
    default = Config().adapter.kind
    last = next((setting for setting in reversed(settings) if setting.key == KIND_KEY), None)
    if last is None or last.reset:
        return default
    kind = last.value
    if last.is_text and isinstance(kind, str):
        kind = from_text(kind, str).strip()
    if isinstance(kind, str) and kind in ADAPTERS:
        return kind
    close = nearest(str(kind), list(ADAPTERS))
    fix = f"did you mean {close[0]}?" if close else None
    findings.append(Finding(f"{KIND_KEY}: {kind!r} is not one of {', '.join(ADAPTERS)}", last.where, fix))
    return default


def _token_in(setting: Setting) -> Finding | None:
    """A config is written into run folders and cards, and a token must not be."""
    if not holds_token(f"{setting.value} {setting.raw}"):
        return None
    fix = "leave it out: tokens are taken from the environment (HF_TOKEN, WANDB_API_KEY)"
    return Finding(f"{setting.key} holds an access token, which a run would write down", hide(setting.where), fix)


def _problem_with_key(setting: Setting, kind: str) -> Finding | None:
    key = setting.key
    if any(CODE_KEY.match(part) for part in key.split(".")):
        return Finding(f"{key}: a config is data and cannot name code to run", setting.where, "remove it")
    if field_for(key, kind) is not None:
        return None
    if key in sections() and not setting.is_text and (setting.value in (None, {}) or setting.reset):
        return None
    other = elsewhere(key, kind)
    if other is not None:
        problem, override = other
        return Finding(problem, setting.where, f"add {override}, or leave it out")
    return unknown_key(setting, kind)


def _record(setting: Setting, kind: str, history: dict[str, list[Setting]]) -> None:
    field = field_for(setting.key, kind)
    assert field is not None
    if field.is_dict and setting.key == field.key and (setting.reset or setting.is_text):
        # A whole mapping on the command line replaces the entries that files gave.
        for key in [key for key in history if key.startswith(f"{field.key}.")]:
            history[key].append(dataclasses.replace(setting, key=key, value=None, is_text=False, reset=True))
    history.setdefault(setting.key, []).append(setting)


class _Values:
    """Final values by key: conversion to the field's type, and references between keys."""

    def __init__(self, kind: str, history: dict[str, list[Setting]], findings: list[Finding]) -> None:
        self.fields = fields_of(kind)
        self.history = history
        self.findings = findings
        self.known: dict[str, Any] = {}
        self.open: list[str] = []

    def get(self, key: str) -> Any:
        """The value of a field, or its default after reporting what is wrong with it."""
        if key not in self.known:
            field = self.fields[key]
            self.open.append(key)
            self.known[key] = self._dict(field) if field.is_dict else self._value(field, key, field.type, field.default)
            self.open.pop()
        return self.known[key]

    def _value(self, field: Field, key: str, kind: Any, default: Any) -> Any:
        last = self.history.get(key, [None])[-1]
        if last is None or last.reset:
            return copy.deepcopy(default)
        if not last.is_text and isinstance(last.value, str) and last.value == MISSING:
            return MISSING
        try:
            if last.is_text:
                return from_text(last.value, kind)
            value, raw = self._resolve(last.value, last.raw)
            if isinstance(last.value, str) and value is not last.value and isinstance(value, str):
                return from_text(value, kind) if not _is_text_field(kind) else value
            return from_yaml(value, raw, kind)
        except BadValue as bad:
            problem = bad.problem if last.is_text else f"{key}: {bad.problem}"
            self.findings.append(Finding(problem, last.where, bad.fix))
            return copy.deepcopy(default)

    def _dict(self, field: Field) -> dict[str, Any]:
        if field.item is not None:
            return self._sections(field, field.item)
        item = field.type.__args__[1]
        result: dict[str, Any] = dict(self._value(field, field.key, field.type, field.default))
        for key in self.history:
            if key.startswith(f"{field.key}."):
                value = self._value(field, key, item, MISSING)
                if not self.history[key][-1].reset:
                    result[key.removeprefix(f"{field.key}.")] = value
        return result

    def _sections(self, field: Field, item: type) -> dict[str, Any]:
        """Entries that are dataclasses, in the order in which they were first named."""
        self._value(field, field.key, field.type, field.default)
        names: dict[str, None] = {}
        for key, settings in self.history.items():
            if key.startswith(f"{field.key}."):
                name = key.removeprefix(f"{field.key}.").split(".")[0]
                whole = self.history.get(f"{field.key}.{name}", [None])[-1]
                if whole is not None and not whole.reset:
                    self.findings.append(
                        Finding(f"{whole.key} is a section", whole.where, f"set its keys, such as {whole.key}.path")
                    )
                elif whole is None and not settings[-1].reset:
                    names[name] = None
        result = {}
        for name in names:
            own = field.item_fields(name)
            values = {
                key: self._dict(f) if f.is_dict else self._value(f, key, f.type, f.default) for key, f in own.items()
            }
            for key, value in values.items():
                if value == MISSING:
                    self.findings.append(Finding(f"{key} must be given", None, f"give {key}=..."))
            result[name] = item(**{key.rsplit(".", 1)[-1]: value for key, value in values.items()})
        return result

    def _resolve(self, value: Any, raw: Any) -> tuple[Any, Any]:
        """A YAML value with its references replaced, and how it was written where that still holds."""
        if isinstance(value, list):
            return [self._resolve(part, None)[0] for part in value], raw
        if not isinstance(value, str) or "${" not in value:
            return value, raw
        problem = interpolate.problem_with(value)
        if problem:
            raise BadValue(problem, interpolate.FIX)
        for key in interpolate.references(value):
            if key not in self.fields:
                close = nearest(key, list(self.fields))
                raise BadValue(f"${{{key}}} names no key", f"did you mean ${{{close[0]}}}?" if close else None)
            if key in self.open:
                raise BadValue(f"${{{key}}} leads back to itself", "write the value in one place")
        if interpolate.is_plain_reference(value):
            return copy.deepcopy(self.get(interpolate.references(value)[0])), None
        known = {key: str(self.get(key)) for key in interpolate.references(value)}
        return interpolate.substitute(value, known), None


def _is_text_field(kind: Any) -> bool:
    return kind is str or str in getattr(kind, "__args__", ())


def _build(cls: type, prefix: str, kind: str, values: _Values) -> Any:
    arguments = {}
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if key in values.fields:
            value, default = values.get(key), values.fields[key].default
            # Left open, it is reported; what checks and conversions see is of the field's type, as for a wrong value.
            open_value = isinstance(value, str) and value == MISSING and default != MISSING
            arguments[field.name] = copy.deepcopy(default) if open_value else value
        else:
            inner = ADAPTERS[kind] if key == ADAPTER_KEY else field.default_factory
            arguments[field.name] = _build(inner, f"{key}.", kind, values)  # type: ignore[arg-type]
    return cls(**arguments)


def _missing(field: Field) -> Finding:
    group = field.key.split(".")[0]
    return Finding(f"{field.key} must be given", None, f"give {field.key}=..., an option {group}=..., or recipe=NAME")


def source_of(history: dict[str, list[Setting]], key: str) -> str:
    """Who set the value that counts."""
    last = history.get(key, [None])[-1]
    return DEFAULT if last is None or last.reset else last.source
