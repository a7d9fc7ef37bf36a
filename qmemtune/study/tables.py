"""A study's numbers as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Sequence[str]
STATISTICS = (
    "Intervals are 95 % paired t intervals over seeds: of the mean log ratio for losses (shown as the geometric mean "
    "ratio), of the mean difference for shares. A run that ends above its unadapted base counts with the base's loss."
)


def markdown(study: Mapping[str, Any]) -> str:
    """All tables of a study."""
    parts = [f"# {study['title']}", study["about"], how(study), STATISTICS]
    for setting in study["settings"]:
        parts += [f"## {setting['name']}", setting["about"], main_table(study, setting["name"])]
        if study["tuning_seeds"]:
            parts += ["By seeds of tuning and of confirmation:", split_table(study, setting["name"])]
        for metric in study["metrics"]:
            parts += group_table(study, setting["name"], metric)
    if study["stability"]:
        parts += ["## Learning rates", stability_note(study), stability_table(study), grid_table(study)]
    return "\n\n".join(part for part in parts if part) + "\n"


def how(study: Mapping[str, Any]) -> str:
    """What was run, on what."""
    machine, versions = study["machine"], study["versions"]
    seeds = study["seeds"]
    tuned = f"; settings were chosen on seeds {spans(study['tuning_seeds'])}" if study["tuning_seeds"] else ""
    return (
        f"Command: `{study['command']}`. Seeds {spans(seeds)}{tuned}. "
        f"Machine: {machine['processor']}, {machine['cpu_count']} cores, {machine['jobs']} process"
        f"{'es' if machine['jobs'] > 1 else ''}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        + "."
    )


def main_table(study: Mapping[str, Any], setting: str) -> str:
    """Each variant beside the baseline, on all seeds."""
    metrics = study["metrics"]
    head = ["variant", "trainable parameters", "learning rate"]
    for metric in metrics:
        head += [words(metric["name"]), f"{compared_by(metric)} {study['baseline']}"]
    head += ["wins : losses", "seconds a run"]
    rows = []
    for entry in entries(study, setting):
        row = [entry["variant"], whole(entry["parameters"]), number(entry["learning_rate"])]
        for metric in metrics:
            found = entry["metrics"][metric["name"]]
            own = entry["variant"] == study["baseline"]
            row += [spread(found), "" if own else interval(found["all"], metric)]
        first = entry["metrics"][metrics[0]["name"]]["all"]
        own = entry["variant"] == study["baseline"] or first is None
        row += ["" if own else f"{first['wins']} : {first['losses']}", number(entry["seconds"])]
        rows.append(row)
    return table(head, rows)


def split_table(study: Mapping[str, Any], setting: str) -> str:
    """The comparisons on the seeds on which settings were chosen, and on the others."""
    head = ["variant"]
    for metric in study["metrics"]:
        head += [f"{words(metric['name'])}, tuning seeds", f"{words(metric['name'])}, other seeds"]
    rows = []
    for entry in entries(study, setting):
        if entry["variant"] != study["baseline"]:
            row = [entry["variant"]]
            for metric in study["metrics"]:
                found = entry["metrics"][metric["name"]]
                row += [interval(found["tuning"], metric), interval(found["confirmation"], metric)]
            rows.append(row)
    return table(head, rows) if rows else ""


def group_table(study: Mapping[str, Any], setting: str, metric: Mapping[str, Any]) -> list[str]:
    """One metric by group of rows, with a heading; empty without groups."""
    found = entries(study, setting)
    groups = sorted({name for entry in found for name in entry["groups"]})
    if not any(values.get(metric["name"], {}).get("n") for entry in found for values in entry["groups"].values()):
        return []
    head = ["family"]
    for entry in found:
        head.append(entry["variant"])
        if entry["variant"] != study["baseline"]:
            head.append(f"{compared_by(metric)} {study['baseline']}")
    rows = []
    for group in groups:
        row = [group]
        for entry in found:
            values = entry["groups"].get(group, {}).get(metric["name"])
            row.append(number(values["mean"]) if values else "")
            if entry["variant"] != study["baseline"]:
                row.append(interval(values["all"], metric) if values else "")
        rows.append(row)
    return [f"{words(metric['name']).capitalize()} by family:", table(head, rows)]


def stability_note(study: Mapping[str, Any]) -> str:
    """What the grid is."""
    rates = ", ".join(number(rate) for rate in study["learning_rates"])
    return (
        f"Final held-out loss at learning rates {rates}, seeds {spans(study['grid_seeds'])}. The interquartile range "
        "is taken over the rates for each seed, then averaged over seeds."
    )


def stability_table(study: Mapping[str, Any]) -> str:
    """How much depends on the learning rate."""
    head = ["setting", "variant", "interquartile range", f"less that of {study['baseline']}", "diverged"]
    head += ["best loss (learning rate)", "worst loss"]
    rows = [
        [
            entry["setting"],
            entry["variant"],
            number(entry["iqr"]),
            "" if entry["variant"] == study["baseline"] else plain_interval(entry["iqr_difference"]),
            f"{entry['diverged']:.0%}",
            f"{number(entry['best_loss'])} ({number(entry['best_learning_rate'])})",
            number(entry["worst_loss"]),
        ]
        for entry in study["stability"]
    ]
    return table(head, rows)


def grid_table(study: Mapping[str, Any]) -> str:
    """Mean loss at each learning rate."""
    head = ["setting", "variant", *(number(rate) for rate in study["learning_rates"])]
    rows = [
        [entry["setting"], entry["variant"], *(number(loss) for loss in entry["loss_by_learning_rate"])]
        for entry in study["stability"]
    ]
    return table(head, rows)


def entries(study: Mapping[str, Any], setting: str) -> list[Mapping[str, Any]]:
    """The comparisons of one setting that have results."""
    return [
        entry
        for entry in study["comparisons"]
        if entry["setting"] == setting and any(found["n"] for found in entry["metrics"].values())
    ]


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def compared_by(metric: Mapping[str, Any]) -> str:
    """Head of a column of comparisons."""
    return "ratio to" if metric["compare"] == "ratio" else "less"


def interval(found: Mapping[str, Any] | None, metric: Mapping[str, Any]) -> str:
    """``0.79 [0.75, 0.83]``; differences with their sign."""
    if found is None or found["value"] is None:
        return "–"
    return plain_interval(found, signed=metric["compare"] == "difference")


def plain_interval(found: Mapping[str, Any], *, signed: bool = True) -> str:
    """A value with its interval."""
    if found["value"] is None:
        return "–"
    form = "+z.3f" if signed else ".3f"  # z: nothing is not less than nothing
    if found["low"] is None:
        return f"{found['value']:{form}}"
    return f"{found['value']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def spread(found: Mapping[str, Any]) -> str:
    """``0.139 ± 0.004``: mean and standard deviation over seeds."""
    if found["mean"] is None:
        return "–"
    return number(found["mean"]) + ("" if found["sd"] is None else f" ± {number(found['sd'])}")


def number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def whole(value: int | None) -> str:
    """With thousands marked."""
    return "–" if value is None else f"{value:,}"


def words(name: str) -> str:
    """A key as words."""
    return name.replace("_", " ")


def spans(numbers: Sequence[int]) -> str:
    """``0–2, 5``."""
    found: list[list[int]] = []
    for value in sorted(numbers):
        if found and value == found[-1][-1] + 1:
            found[-1].append(value)
        else:
            found.append([value])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in found)
