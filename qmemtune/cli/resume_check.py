"""``qmemtune resume-check``: whether resuming is exact, proved on a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmemtune.cli.options import Debug, Json, Overrides, Quiet
from qmemtune.cli.output import output
from qmemtune.cli.target import load_target, with_run_dir

if TYPE_CHECKING:
    from rich.console import Console


def resume_check(
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Replay so many optimizer steps at most.")] = 50,
    as_json: Json = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> int:
    """Replay some steps of a run from a checkpoint, and compare them bit for bit with what the run recorded.

    resume-check RUN or run_dir=RUN, else the newest run. The run's folder is not changed. Exit code 1 when something
    differs.
    """
    with output(as_json, debug, quiet) as out:
        run, composed = load_target(with_run_dir(overrides or []), out)
        out.working("loading the run")
        from qmemtune.engine.resume_check import resume_check as check

        out.libraries_are_loaded()
        report = check(run, composed, steps=steps, say=out.note)
        out.result(report, lambda console: _show(console, report))
        return 0 if report["exact"] else 1


def _show(console: Console, report: dict[str, Any]) -> None:
    from qmemtune.engine.resume_check import SHOWN_DIFFERENCES

    start, end, compared = report["from_step"], report["to_step"], report["compared"]
    origin = report["checkpoint"] or "the beginning (the run has no checkpoint before a recorded step)"
    console.print(f"replayed steps {start + 1} to {end} from {origin}", markup=False)
    if report["own_checkpoint_step"]:
        console.print(f"resumed there from a checkpoint of this check's own, of step {report['own_checkpoint_step']}")
    for change in report["changes"]:
        console.print(change, markup=False)
    counts = [f"{compared[name]} {name.replace('_', ' ')}" for name in ("losses", "grad_norms", "evaluations")]
    console.print(f"compared bit for bit: {', '.join(counts)}", markup=False)
    if compared["files"]:
        console.print(f"and of the checkpoint of step {end}: {', '.join(compared['files'])}", markup=False)
    else:
        console.print(f"no weights: the run has no complete checkpoint of step {end}")
    differences = report["differences"]
    for line in differences[:SHOWN_DIFFERENCES]:
        console.print(line, style="red", markup=False)
    if len(differences) > SHOWN_DIFFERENCES:
        console.print(f"and {len(differences) - SHOWN_DIFFERENCES} more")
    verdict = "exact: nothing differs" if report["exact"] else f"not exact: {len(differences)} differences"
    console.print(verdict, style="bold")
