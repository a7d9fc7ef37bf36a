"""The studies' section of README.md, made from the JSON files in benchmarks/studies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmemtune.errors import UserError
from qmemtune.rundir import read_json
from qmemtune.study.tables import STATISTICS, compared_by, entries, interval, number, spans, spread, table, whole, words

BEGIN = "<!-- studies: written by `qmemtune study NAME --readme` from benchmarks/studies -->"
END = "<!-- end of studies -->"
STORED = Path("benchmarks/studies")


def section(folder: Path) -> str:
    """The section's text: one table a study, by name of its file."""
    studies = [read_json(file) for file in sorted(folder.glob("*.json"))]
    titles = Counter(study["title"] for study in studies)
    parts = [study_section(study, among_others=titles[study["title"]] > 1) for study in studies]
    if parts:
        parts.append(STATISTICS)
    return "\n\n".join([BEGIN, *parts, END])


def study_section(study: Mapping[str, Any], *, among_others: bool) -> str:
    """One study in short.

    Args:
        among_others: whether another of the same title is shown too, with other variants or settings.
    """
    metrics = study["metrics"]
    head = ["setting", "variant", "parameters"]
    for metric in metrics:
        head += [words(metric["name"]), f"{compared_by(metric)} {study['baseline']}"]
    confirmed_apart = bool(study["tuning_seeds"]) and not set(study["seeds"]) <= set(study["tuning_seeds"])
    if confirmed_apart:
        head.append(f"{words(metrics[0]['name'])}, other seeds only")
    rows = []
    for setting in study["settings"]:
        for entry in entries(study, setting["name"]):
            row = [setting["name"], entry["variant"], whole(entry["parameters"])]
            for metric in metrics:
                found = entry["metrics"][metric["name"]]
                own = entry["variant"] == study["baseline"]
                row += [spread(found), "" if own else interval(found["all"], metric)]
            if confirmed_apart:
                own = entry["variant"] == study["baseline"]
                confirmed = entry["metrics"][metrics[0]["name"]]["confirmation"]
                row.append("" if own else interval(confirmed, metrics[0]))
            rows.append(row)
    tuned = f" Settings were chosen on seeds {spans(study['tuning_seeds'])}." if study["tuning_seeds"] else ""
    command = f"`{study['command']}`, seeds {spans(study['seeds'])}"
    lines = [f"{command}. {study['about']}{tuned}", table(head, rows)]
    if study["stability"]:
        lines.append(stability_line(study))
    # Folded where the page is rendered, so that what was found is not lost among the tables.
    title = study["title"]
    if among_others:
        variants, settings = (", ".join(part["name"] for part in study[what]) for what in ("variants", "settings"))
        title += f": {variants} ({settings})"
    return "\n\n".join([f"<details><summary><b>{title}</b></summary>", *lines, "</details>"])


def stability_line(study: Mapping[str, Any]) -> str:
    """How much each variant depends on the learning rate."""
    rates = study["learning_rates"]
    said = [
        f"{entry['setting']}, {entry['variant']}: {number(entry['iqr'])} ({entry['diverged']:.0%} diverged)"
        for entry in study["stability"]
    ]
    return (
        f"Interquartile range of the held-out loss over learning rates {number(min(rates))} to {number(max(rates))} "
        f"(seeds {spans(study['grid_seeds'])}): {'; '.join(said)}."
    )


def update(readme: Path, folder: Path) -> bool:
    """Write the section between its markers; whether it changed.

    Raises:
        UserError: the markers are not there.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError("the markers of the studies' section are missing", where=str(readme), fix=f"add {BEGIN} {END}")
    changed = before + section(folder) + after
    readme.write_text(changed, encoding="utf-8")
    return changed != text


if __name__ == "__main__":
    update(Path("README.md"), STORED)
