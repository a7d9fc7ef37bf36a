"""Follow defaults lists before Hydra does, so that every wrong entry is reported, with its file and line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmemtune.config.fields import nearest
from qmemtune.config.overrides import unknown_option
from qmemtune.config.places import find_config, list_groups, list_options, shown
from qmemtune.config.yaml_file import YamlFile, read_yaml
from qmemtune.errors import Finding


@dataclass
class Reachable:
    """Every file that a composition may read, and what is wrong with them."""

    folders: list[Path]
    chosen: dict[str, str]
    """Options given on the command line: entries of the same group are not followed."""
    files: dict[Path, YamlFile] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    listed: set[str] = field(default_factory=set)
    """Groups that the defaults lists name."""

    def follow(self, path: Path, group: str = "", above: tuple[Path, ...] = ()) -> None:
        """Read a file and all that its defaults list names."""
        if path in above:
            chain = " -> ".join(shown(part) for part in (*above[above.index(path) :], path))
            self.findings.append(Finding(f"its defaults list leads back to itself: {chain}", shown(path)))
            return
        if path in self.files:
            return
        file = read_yaml(path)
        self.files[path] = file
        self.findings.extend(file.findings)
        if file.defaults and file.settings and "_self_" not in [entry for entry, _ in file.defaults]:
            self.findings.append(
                Finding(
                    "the defaults list lacks _self_, so its options would replace the file's own values",
                    f"{shown(path)}:{file.defaults[0][1]}",
                    "add `- _self_` as its last entry",
                )
            )
        for entry, line in file.defaults:
            self._entry(entry, f"{shown(path)}:{line}", path, group, above)

    def _entry(self, entry: Any, where: str, path: Path, group: str, above: tuple[Path, ...]) -> None:
        if isinstance(entry, str) and "$" not in entry:
            if entry != "_self_":
                self._config(_absolute(entry, group), where, path, above)
        elif isinstance(entry, dict) and len(entry) == 1:
            key, option = next(iter(entry.items()))
            words = str(key).split()
            name = _absolute(words[-1] if words else "", group)
            if "override" not in words[:-1]:
                self.listed.add(name)
            for one in option if isinstance(option, list) else [option]:
                self._option(name, one, where, path, above, optional="optional" in words[:-1])
        else:
            self.findings.append(
                Finding(f"not an entry of a defaults list: {entry!r}", where, "write `/group: option`")
            )

    def _config(self, name: str, where: str, path: Path, above: tuple[Path, ...]) -> None:
        found = find_config(name, self.folders)
        if found is None:
            self.findings.append(Finding(f"the defaults list names {name}, which does not exist", where))
        else:
            self.follow(found, name.rpartition("/")[0], (*above, path))

    def _option(
        self, group: str, option: Any, where: str, path: Path, above: tuple[Path, ...], *, optional: bool
    ) -> None:
        if group in self.chosen or option is None:
            return
        if not isinstance(option, str) or "$" in option or option == "???":
            self.findings.append(
                Finding(f"{group} has no option in the defaults list", where, f"name one, or give {group}=...")
            )
            return
        options = list_options(group, self.folders)
        found = find_config(f"{group}/{option}", self.folders)
        if found is not None:
            self.follow(found, group, (*above, path))
        elif not options:
            close = nearest(group, list_groups())
            fix = f"did you mean {close[0]}?" if close else f"groups: {', '.join(list_groups())}"
            self.findings.append(Finding(f"{group} is no config group", where, fix))
        elif not optional:
            self.findings.append(unknown_option(group, option, where, options))

    def choose(self, group: str, option: str, where: str) -> None:
        """Follow an option given on the command line."""
        found = find_config(f"{group}/{option}", self.folders)
        if found is None:
            self.findings.append(unknown_option(group, option, where, list_options(group, self.folders)))
        else:
            self.follow(found, group)


def _absolute(name: str, group: str) -> str:
    """A config's or group's name from the top, without ``@package``."""
    name = name.split("@")[0]
    if name.startswith("/"):
        return name[1:]
    return f"{group}/{name}" if group else name
