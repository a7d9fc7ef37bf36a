"""Read a YAML file as data only: its settings with their lines, its defaults list, and everything wrong with it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qmemtune.config import interpolate
from qmemtune.config.places import shown
from qmemtune.config.settings import Setting
from qmemtune.errors import Finding

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
"""Nodes of a file with every alias written out; a few lines of aliases can stand for billions."""

_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
     |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
     |\.[0-9_]+(?:[eE][-+][0-9]+)?
     |[-+]?\.(?:inf|Inf|INF)
     |\.(?:nan|NaN|NAN))$""",
    re.X,
)
_DATA_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
_MAP_TAG = "tag:yaml.org,2002:map"
CODE_KEY = re.compile(r"^_[a-z]+_$")


class DataLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 does, and no dates."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] not in ("timestamp", "float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


DataLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass
class YamlFile:
    """What a file says. Settings have no package prefix yet."""

    path: Path
    settings: list[Setting] = field(default_factory=list)
    defaults: list[tuple[Any, int]] = field(default_factory=list)
    """Entries of the defaults list with their lines."""
    findings: list[Finding] = field(default_factory=list)


def read_yaml(path: Path) -> YamlFile:
    """Read a config file; what is wrong with it stands in ``findings``."""
    result = YamlFile(path)
    root, loader = _parse(path, result)
    if root is not None and loader is not None:
        _walk_root(root, loader, result)
    return result


def _parse(path: Path, result: YamlFile) -> tuple[yaml.Node | None, DataLoader | None]:
    where = shown(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            result.findings.append(Finding(f"too large for a config (over {MAX_BYTES >> 20} MiB)", where))
            return None, None
        loader = DataLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is not None and _expanded_size(root, {}, set()) > MAX_NODES:
            result.findings.append(Finding("its aliases stand for too many values", where, "write them out"))
            return None, None
    except UnicodeDecodeError as error:
        result.findings.append(Finding(f"not UTF-8 text (byte {error.start})", where, "save it as UTF-8"))
    except OSError as error:
        result.findings.append(Finding(f"cannot be read: {error.strerror or error}", where))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        result.findings.append(Finding(f"not valid YAML: {error.problem or error.context}", where + line))
    except yaml.YAMLError as error:
        result.findings.append(Finding(f"not valid YAML: {' '.join(str(error).split())}", where))
    except RecursionError:
        result.findings.append(Finding("nested too deeply, or an alias that holds itself", where))
    else:
        return root, loader
    return None, None


def _expanded_size(node: yaml.Node, known: dict[int, int], open_nodes: set[int]) -> int:
    """Nodes under ``node`` with aliases written out; a node that holds itself raises RecursionError."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in open_nodes:
        raise RecursionError
    open_nodes.add(id(node))
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_expanded_size(child, known, open_nodes) for child in children)
    open_nodes.discard(id(node))
    known[id(node)] = size
    return size


def _walk_root(root: yaml.Node, loader: DataLoader, result: YamlFile) -> None:
    if isinstance(root, yaml.ScalarNode) and root.tag.endswith(":null"):
        return
    if not isinstance(root, yaml.MappingNode):
        result.findings.append(
            Finding("a config must be a mapping of keys to values", _at(result, root), "write `key: value` lines")
        )
        return
    _walk(root, "", loader, result)


def _walk(node: yaml.MappingNode, prefix: str, loader: DataLoader, result: YamlFile) -> None:
    if node.tag != _MAP_TAG:
        what = f"{prefix[:-1]}: the tag" if prefix else "the tag"
        result.findings.append(Finding(f"{what} {node.tag} is not allowed: a config is data", _at(result, node)))
        return
    names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        line = [key for key, _ in node.value if key.value == name][1]
        result.findings.append(Finding(f"key {prefix}{name} stands here twice", _at(result, line), "keep one of them"))
    try:
        loader.flatten_mapping(node)
    except yaml.MarkedYAMLError as error:
        result.findings.append(Finding(f"not valid YAML: {error.problem}", _at(result, node)))
        return
    # After flattening, what came in through `<<` stands first and what the mapping itself says last.
    pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key_node, value_node in node.value:
        if isinstance(key_node, yaml.ScalarNode):
            pairs[str(key_node.value)] = (key_node, value_node)
        else:
            result.findings.append(Finding("a key must be plain text", _at(result, key_node)))
    for name, (key_node, value_node) in pairs.items():
        key, where = prefix + name, _at(result, key_node)
        if CODE_KEY.match(name):
            result.findings.append(Finding(f"{key}: a config is data and cannot name code to run", where, "remove it"))
        elif key == "hydra" or key.startswith("hydra."):
            result.findings.append(Finding("a config cannot configure Hydra itself", where, "remove the hydra section"))
        elif key == "defaults":
            _read_defaults(value_node, loader, result)
        elif isinstance(value_node, yaml.MappingNode) and value_node.value:
            _walk(value_node, f"{key}.", loader, result)
        else:
            _leaf(key, value_node, loader, result)


def _leaf(key: str, node: yaml.Node, loader: DataLoader, result: YamlFile) -> None:
    bad = _foreign_tag(node)
    if bad is not None:
        result.findings.append(Finding(f"{key}: the tag {bad.tag} is not allowed: a config is data", _at(result, bad)))
        return
    try:
        value = loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        result.findings.append(Finding(f"{key}: not a value: {' '.join(str(error).split())}", _at(result, node)))
        return
    problems = [problem for text in _texts(value) if (problem := interpolate.problem_with(text))]
    if problems:
        result.findings.append(Finding(f"{key}: {problems[0]}", _at(result, node), interpolate.FIX))
        return
    result.settings.append(Setting(key, value, shown(result.path), node.start_mark.line + 1, _raw(node)))


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else []


def _raw(node: yaml.Node) -> Any:
    """Text of a scalar as written, or a list of such texts; None for mappings."""
    if isinstance(node, yaml.ScalarNode):
        return node.value
    return [_raw(child) for child in node.value] if isinstance(node, yaml.SequenceNode) else None


def _foreign_tag(node: yaml.Node) -> yaml.Node | None:
    if node.tag not in _DATA_TAGS:
        return node
    if isinstance(node, yaml.SequenceNode):
        return next((bad for child in node.value if (bad := _foreign_tag(child))), None)
    if isinstance(node, yaml.MappingNode):
        return next((bad for pair in node.value for child in pair if (bad := _foreign_tag(child))), None)
    return None


def _read_defaults(node: yaml.Node, loader: DataLoader, result: YamlFile) -> None:
    bad = _foreign_tag(node)
    if bad is not None or not isinstance(node, yaml.SequenceNode):
        result.findings.append(
            Finding("defaults must be a list", _at(result, node), "write `defaults:` and entries `- /group: option`")
        )
        return
    for entry in node.value:
        result.defaults.append((loader.construct_object(entry, deep=True), entry.start_mark.line + 1))


def _at(result: YamlFile, node: yaml.Node) -> str:
    return f"{shown(result.path)}:{node.start_mark.line + 1}"
