"""``qmemtune estimate``: how much memory a run would take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmemtune.cli.options import Debug, Json, Overrides, Quiet
from qmemtune.cli.output import output

if TYPE_CHECKING:
    from rich.console import Console


def estimate(
    overrides: Overrides = None,
    device: Annotated[
        str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where the run would train; auto: this machine.")
    ] = "auto",
    as_json: Json = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Estimate the memory of a run by part: estimate recipe=quickstart.

    Of the model only its config is needed. The batch is the largest that the rows give; without rows at hand, rows of
    data.max_length tokens, all in the loss.
    """
    with output(as_json, debug, quiet) as out:
        from qmemtune.config.compose import compose
        from qmemtune.errors import UserError

        if device not in ("auto", "cpu", "cuda"):
            raise UserError(f"unknown device {device!r}", where="--device", fix="one of: auto, cpu, cuda")
        composed = compose(overrides or [], allow_missing=True)
        out.warn(composed.warnings)
        out.working("counting what a step keeps in memory")
        from qmemtune.engine.memory.report import report

        out.libraries_are_loaded()
        found = report(composed.config, device)
        out.warn(found["notes"])
        out.result(found, lambda console: _show(console, found))


def _show(console: Console, found: dict[str, Any]) -> None:
    from rich.table import Table

    work = found["workload"]
    console.print(
        f"{found['model']} ({found['quantization']}, {found['dtype']}) on {found['device']}: {work['rows']} rows of "
        f"up to {work['tokens']} tokens, "
        + ("" if work["together"] is None else f"{work['together']} together, ")
        + f"{work['labelled']} in the loss"
        + (", activations recomputed" if work["checkpointing"] else ""),
        markup=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part")
    table.add_column("MiB", justify="right")
    for part, size in found["parts_mib"].items():
        table.add_row(part.replace("_", " "), f"{size:,.1f}")
    table.add_row("total", f"{found['total_mib']:,.1f}", style="bold")
    console.print(table)
    console.print(f"the peak of a step is in its {found['peak_in']}", style="dim")
    if found["loading_mib"] > found["total_mib"]:
        console.print(f"while weights are read: {found['loading_mib']:,.0f} MiB, most of it pages of their files")
    if found["available_mib"] is not None:
        fits = "fits" if found["fits"] else "does not fit"
        console.print(f"{fits} into the {found['available_mib']:,.0f} MiB there are", style="bold")
    for way in found["would_fit"]:
        console.print(f"would fit: {way['overrides']} ({way['total_mib']:,.0f} MiB)", markup=False)
