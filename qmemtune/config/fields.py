"""The schema's fields by dotted key: type, default and help text, for each kind of adapter."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from qmemtune.config.adapters import ADAPTERS, AdapterConfig
from qmemtune.config.schema import Config

ADAPTER_KEY = "adapter"
KIND_KEY = "adapter.kind"


@dataclass(frozen=True)
class Field:
    """One key of the config."""

    key: str
    type: Any
    default: Any
    help: str

    @property
    def is_dict(self) -> bool:
        """Whether its entries are keys of their own (``key.entry``)."""
        return get_origin(self.type) is dict

    @property
    def item(self) -> type | None:
        """The dataclass of a dict's entries, if they are sections of their own (``key.entry.option``)."""
        item = get_args(self.type)[1] if self.is_dict else None
        return item if dataclasses.is_dataclass(item) else None

    def item_fields(self, entry: str) -> dict[str, Field]:
        """Fields of one entry by their whole keys; empty unless entries are sections."""
        prefix = f"{self.key}.{entry}."
        return {} if self.item is None else {field.key: field for field in plain_fields(self.item, prefix)}


@cache
def fields_of(kind: str) -> dict[str, Field]:
    """Every key of a config whose adapter is of that kind, in the schema's order."""
    return {field.key: field for field in _fields(Config, "", ADAPTERS[kind])}


@cache
def sections() -> frozenset[str]:
    """Dotted names of the sections: keys that hold keys."""
    names: set[str] = set()
    for kind in ADAPTERS:
        for key in fields_of(kind):
            parts = key.split(".")
            names.update(".".join(parts[:n]) for n in range(1, len(parts)))
    return frozenset(names)


def plain_fields(cls: type, prefix: str) -> Iterator[Field]:
    """The fields of a dataclass that holds no other."""
    return _fields(cls, prefix, AdapterConfig)


def _fields(cls: type, prefix: str, adapter: type[AdapterConfig]) -> Iterator[Field]:
    hints = get_type_hints(cls)
    docs = _attribute_docs(cls)
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        kind = adapter if key == ADAPTER_KEY else hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _fields(kind, f"{key}.", adapter)
        else:
            factory = field.default_factory
            default = field.default if isinstance(factory, dataclasses._MISSING_TYPE) else factory()
            yield Field(key, kind, default, docs.get(field.name, ""))


def _attribute_docs(cls: type) -> dict[str, str]:
    """The string under each attribute, of the class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for before, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    docs[before.target.id] = " ".join(str(after.value.value).split())
                elif before.target.id not in docs:
                    docs[before.target.id] = ""
    return docs


def field_for(key: str, kind: str) -> Field | None:
    """The field that ``key`` sets: itself, or the dict that ``key`` is an entry of."""
    fields = fields_of(kind)
    if key in fields:
        return fields[key]
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        parent = fields.get(".".join(parts[:length]))
        if parent is not None:
            return _inside(parent, parts[length:]) if parent.is_dict else None
    return None


def _inside(parent: Field, rest: list[str]) -> Field | None:
    """The dict itself for a key inside it; None for a key that its entries do not have."""
    if parent.item is None or len(rest) == 1:
        return parent
    known = parent.item_fields(rest[0])
    keys = [".".join([parent.key, *rest[:length]]) for length in (2, 3)]
    return parent if keys[0] in known and (len(rest) == 2 or (len(rest) == 3 and known[keys[0]].is_dict)) else None


def elsewhere(key: str, kind: str) -> tuple[str, str] | None:
    """What to say of a key that another kind of adapter has, and the override that chooses it; None if none has it."""
    others = [other for other in ADAPTERS if other != kind and key in fields_of(other)]
    return (f"{key} belongs to adapter={others[0]}, this is {kind}", f"adapter={others[0]}") if others else None


def nearest(name: str, valid: list[str], count: int = 1) -> list[str]:
    """The valid names most like ``name``; a key whose last part is the same comes first."""
    last = name.rsplit(".", 1)[-1]
    same = [other for other in valid if other.rsplit(".", 1)[-1] == last] if last else []
    close = difflib.get_close_matches(name, valid, n=count, cutoff=0.6)
    ends: dict[str, str] = {}
    for other in valid:
        ends.setdefault(other.rsplit(".", 1)[-1], other)
    by_end = [ends[end] for end in difflib.get_close_matches(last, list(ends), n=count, cutoff=0.75)]
    ranked = same + close + by_end if "." not in name else close + same + by_end
    return list(dict.fromkeys(ranked))[:count]
