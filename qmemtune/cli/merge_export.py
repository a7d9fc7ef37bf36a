"""``qmemtune merge-export``: a run's result as a folder that other tools load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmemtune.cli.options import Debug, Json, Overrides, Quiet
from qmemtune.cli.output import output

if TYPE_CHECKING:
    from rich.console import Console


def merge_export(
    overrides: Overrides = None, as_json: Json = False, debug: Debug = False, quiet: Quiet = False
) -> None:
    """Export a run as a folder that other tools load.

    The run is run_dir=, else the newest; export.format=merged, lora or adapter.
    """
    with output(as_json, debug, quiet) as out:
        from qmemtune.cli.display import make_progress
        from qmemtune.cli.target import load_target

        run, composed = load_target(overrides or [], out)
        from qmemtune.export import export_run

        out.libraries_are_loaded()
        result = export_run(run, composed.config, progress=make_progress(quiet=quiet))
        out.result(result, lambda console: _show(console, result))


def _show(console: Console, result: dict[str, Any]) -> None:
    console.print(f"exported ({result['format']}): {result['path']}", style="bold", markup=False)
    if result.get("exact"):
        console.print("exact: the exported model computes what the live one does, up to rounding")
    else:
        folded = "approximate: routes that differ from token to token were folded into one static update a layer"
        console.print(result.get("note") or folded, markup=False)
    fidelity = result.get("fidelity") or {}
    if fidelity.get("loss_live") is not None and fidelity.get("loss_exported") is not None:
        line = f"held-out loss: live {fidelity['loss_live']:.4f}, exported {fidelity['loss_exported']:.4f}"
        if fidelity.get("kl_mean") is not None:
            line += f"; mean KL {fidelity['kl_mean']:.2e} nats a token"
        console.print(f"{line} ({fidelity.get('rows', 0)} rows)")
    if fidelity.get("exact_match_rows"):
        live, exported = fidelity["exact_match_live"], fidelity["exact_match_exported"]
        console.print(f"exact match: live {live:.1%}, exported {exported:.1%} ({fidelity['exact_match_rows']} rows)")
