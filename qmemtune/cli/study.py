"""``qmemtune study``: compare adapters over seeds and settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmemtune.cli.options import Debug, Json, Quiet
from qmemtune.cli.output import output

if TYPE_CHECKING:
    from rich.console import Console


def study(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="regression, quickstart, instructions, codes, instruction_prior, gsm8k or ablations.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="OVERRIDES",
            help="study.seeds=0-9, study.variants=[..], study.settings=[..], study.jobs=N, study.learning_rates=[..] "
            "and study.grid_seeds=[..] (of the grid for stability), study.tuning_seeds=[..] (on which settings were "
            "chosen), study.on=NAME (ablations), study_dir=FOLDER; key=value for all runs, VARIANT:key=value for one "
            "variant's.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells with their parameter counts; run nothing.")
    ] = False,
    readme: Annotated[
        bool,
        typer.Option(
            "--readme", help="Copy the results to benchmarks/studies and renew README.md's section; run nothing."
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Compare adapters over seeds and settings: study regression study.jobs=2."""
    with output(as_json, debug, quiet) as out:
        from qmemtune.study.options import read_request
        from qmemtune.study.studies import find_study

        request = read_request(overrides or [])
        known = find_study(name, request.options)
        if readme:
            result = renew_readme(known.stem, request.folder)
            out.result(result, lambda console: console.print(f"wrote {result['readme']} and {result['stored']}"))
            return
        from qmemtune.study.cells import described
        from qmemtune.study.run import plan_study, run_study

        out.libraries_are_loaded()
        plan, folder = plan_study(name, request)
        out.warn(plan.warnings)
        if dry_run:
            cells = described(plan.cells)
            todo = {cell.name for cell in folder.unfinished(plan.cells)}
            listed = {
                "study": name,
                "study_dir": str(folder.path),
                "cells": [line | {"done": line["cell"] not in todo} for line in cells],
            }
            out.result(listed, lambda console: show_cells(console, listed))
            return
        found = run_study(
            plan, folder, jobs=request.options.jobs, tuning_seeds=request.options.tuning_seeds, say=out.note
        )
        report = write_report(found, folder.path)
        for line in report.pop("notes"):
            out.note(line)
        out.result(found | report, lambda console: show(console, found, report))


def write_report(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """study.json, study.md and plots; where they are, and notes."""
    from qmemtune.rundir import write_json
    from qmemtune.study.folder import StudyDir
    from qmemtune.study.plots import MISSING, can_plot, draw
    from qmemtune.study.tables import markdown

    folder = StudyDir(path)
    write_json(folder.summary, found)
    folder.tables.write_text(markdown(found), encoding="utf-8")
    plots = [str(file) for file in draw(found, folder.plots)] if can_plot() else []
    notes = [] if can_plot() else [MISSING]
    return {"json": str(folder.summary), "markdown": str(folder.tables), "plots": plots, "notes": notes}


def renew_readme(stem: str, path: Path | None) -> dict[str, Any]:
    """Copy a study's results into the repository and renew README.md, both in the working folder.

    Args:
        stem: what the study is called.
        path: its folder, after whose name its results are kept, beside those of the same study with other variants;
            the study's own if not given.

    Raises:
        UserError: the study has no results, or README.md has no place for them.
    """
    from qmemtune.rundir import read_json, write_json
    from qmemtune.study.folder import StudyDir
    from qmemtune.study.options import FOLDERS
    from qmemtune.study.readme import STORED, update

    folder, readme = path or FOLDERS / stem, Path("README.md")
    stored = STORED / f"{folder.absolute().name}.json"
    write_json(stored, read_json(StudyDir(folder).summary))
    return {"stored": str(stored), "readme": str(readme), "changed": update(readme, STORED)}


def show_cells(console: Console, listed: dict[str, Any]) -> None:
    """The cells, one a line."""
    for cell in listed["cells"]:
        done = "  done" if cell["done"] else ""
        console.print(f"{cell['cell']}: {cell['parameters']:,} trainable parameters{done}", markup=False)
    console.print(f"{len(listed['cells'])} cells in {listed['study_dir']}", markup=False)


def show(console: Console, found: dict[str, Any], report: dict[str, Any]) -> None:
    """The main numbers, and where the rest is."""
    from rich.table import Table

    from qmemtune.study.tables import compared_by, entries, interval, spread, whole, words

    for setting in found["settings"]:
        table = Table(title=f"{found['study']}, {setting['name']}", title_justify="left")
        for head in ("variant", "parameters"):
            table.add_column(head)
        for metric in found["metrics"]:
            table.add_column(words(metric["name"]))
            table.add_column(f"{compared_by(metric)} {found['baseline']}")
        for entry in entries(found, setting["name"]):
            row = [entry["variant"], whole(entry["parameters"])]
            for metric in found["metrics"]:
                values = entry["metrics"][metric["name"]]
                row += [spread(values), interval(values["all"], metric)]
            table.add_row(*row)
        console.print(table)
    for line in (report["json"], report["markdown"], *report["plots"]):
        console.print(line, markup=False)
