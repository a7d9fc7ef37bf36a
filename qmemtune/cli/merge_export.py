"""``qmemtune merge-export``: a run's result as a folder that other tools load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmemtune.cli.options import Debug, Json, Overrides, Quiet
from qmemtune.cli.output import output

if TYPE_CHECKING:
    from rich.console import Console


def merge_export(
    overrides: Overrides = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Say which formats are exact for this run, and what would be written where; write nothing."
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="export.force=true: replace an earlier export, keep one that is too far."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Export a run as a folder that other tools load.

    merge-export RUN or run_dir=RUN, else the newest run; export.format=merged, lora or live.
    """
    with output(as_json, debug, quiet) as out:
        from qmemtune.cli.display import make_progress
        from qmemtune.cli.target import load_target, with_run_dir

        given = [*with_run_dir(overrides or []), *(["export.force=true"] if force else [])]
        run, composed = load_target(given, out)
        if plan:
            from qmemtune.export.exactness import plan as plan_export

            out.libraries_are_loaded()
            planned = plan_export(run, composed.config)
            out.result(planned, lambda console: _show_plan(console, planned))
            return
        out.working("loading the run")
        from qmemtune.export import export_run

        out.libraries_are_loaded()
        result = export_run(run, composed.config, progress=make_progress(quiet=quiet))
        out.result(result, lambda console: _show(console, result))


def _show_plan(console: Console, planned: dict[str, Any]) -> None:
    for form, found in planned["formats"].items():
        console.print(f"{form:<8}{found['kind']:<13}{found['why']}", markup=False)
    export = planned["export"]
    words = [f"export.format={export['format']}"]
    if "fold" in export:
        words.append(f"made static by export.fold={export['fold']} at rank {export['rank']}")
    if "base" in export:
        auto = export["base"] == "auto"
        base = "dequantized or original base, whichever has the lower loss" if auto else f"{export['base']} base"
        words.append(f"merged into the {base}")
    there = ", where something is already: --force replaces an earlier export" if export["taken"] else ""
    console.print(f"would write {', '.join(words)}, to {export['path']}{there}", markup=False)


def _show(console: Console, result: dict[str, Any]) -> None:
    console.print(f"exported ({result['format']}): {result['path']}", style="bold", markup=False)
    if result.get("exact"):
        console.print("exact: the exported model computes what the live one does, up to rounding")
    else:
        console.print(f"approximate: {result.get('note')}", markup=False)
    if "dtype" in result:
        rounding = f"; rounding is {result['rounding']:.2%} of the update" if "rounding" in result else ""
        console.print(f"weights: {result['dtype']}{rounding}")
    if "rows" in result.get("base", {}):
        base = result["base"]
        losses = ", ".join(f"{name} {base[name]['loss_exported']:.4f}" for name in ("dequantized", "original"))
        console.print(f"merged into the {base['base']} base (loss on {base['rows']} training rows: {losses})")
    fidelity = result.get("fidelity")
    if not fidelity:
        console.print("fidelity: not measured")
        return
    console.print(
        f"held-out loss: live {fidelity['loss_live']:.4f}, exported {fidelity['loss_exported']:.4f};"
        f" mean KL {fidelity['kl_mean']:.2e}, largest {fidelity['kl_max']:.2e} nats a token;"
        f" same likeliest token at {fidelity['same_token']:.1%} ({fidelity['rows']} rows)"
    )
    if fidelity.get("exact_match_rows"):
        live, exported = fidelity["exact_match_live"], fidelity["exact_match_exported"]
        console.print(f"exact match: live {live:.1%}, exported {exported:.1%} ({fidelity['exact_match_rows']} rows)")
    if result.get("pushed_to"):
        console.print(f"uploaded: {result['pushed_to']}", markup=False)
    for reason in result.get("too_far", []):
        console.print(f"kept by force: {reason}", style="yellow", markup=False)
