"""``qmemtune train``: train an adapter into a run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmemtune.cli.options import Debug, Json, Overrides, Quiet
from qmemtune.cli.output import output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from qmemtune.config.schema import Config


def train(
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compose, check and say what would happen; train nothing.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter: train recipe=quickstart."""
    with output(as_json, debug, quiet) as out:
        from qmemtune.config.of_run import compose_run

        composed = compose_run(overrides or [])
        out.warn(composed.warnings)
        out.working("checking the run: rows, model, memory")
        if dry_run:
            from qmemtune.engine.plan import plan

            out.libraries_are_loaded()
            planned = plan(composed)
            out.result(planned, lambda console: show_facts(console, planned))
            return
        from qmemtune.cli.display import make_progress
        from qmemtune.engine.run import train as run_training

        out.libraries_are_loaded()
        summary = run_training(composed, progress=make_progress(quiet=quiet))
        out.result(summary, lambda console: _show(console, summary, _next(composed.config, summary)))


def _next(config: Config, summary: dict[str, Any]) -> list[str]:
    """Verbs that this run is ready for."""
    from qmemtune.config.checks import has_heldout
    from qmemtune.config.regression import is_regression

    if is_regression(config):
        return []
    unmeasured = not config.evaluation.at_end and has_heldout(config)
    measured = ["eval"] if summary.get("eval") or unmeasured else []
    return measured + (["generate"] if config.adapter.kind == "peft" else ["merge-export", "generate"])


def _show(console: Console, summary: dict[str, Any], verbs: Sequence[str]) -> None:
    from qmemtune.cli.numbers import metrics_line, short

    loss = f", train loss {short(summary['train_loss'])}" if summary.get("train_loss") is not None else ""
    console.print(f"trained {summary['steps']} steps{loss}", style="bold")
    if summary.get("eval"):
        console.print(f"held-out: {metrics_line(summary['eval'])}", markup=False)
    speed = [
        f"{summary[key]:,.{digits}f} {unit}"
        for key, digits, unit in (("tokens_per_s", 0, "tokens/s"), ("step_s_median", 2, "s a step"))
        if summary.get(key) is not None
    ]
    if speed:
        console.print(f"speed: {', '.join(speed)}; {summary['trainable_parameters']:,} trainable parameters")
    console.print(f"run folder: {summary['run_dir']}", markup=False)
    if verbs:
        console.print(f"next: {', '.join(f'qmemtune {verb}' for verb in verbs)}", style="dim")


def show_facts(console: Console, facts: dict[str, Any], indent: str = "") -> None:
    """Nested facts, one a line."""
    from qmemtune.cli.numbers import short

    for name, value in facts.items():
        label = name.replace("_", " ")
        if isinstance(value, dict):
            console.print(f"{indent}{label}:", markup=False)
            show_facts(console, value, indent + "  ")
        elif isinstance(value, list):
            console.print(f"{indent}{label}:" if value else f"{indent}{label}: none", markup=False)
            for item in value:
                console.print(f"{indent}  {_inline(item)}", markup=False)
        elif value is not None:
            console.print(f"{indent}{label}: {short(value)}", markup=False)


def _inline(value: Any) -> str:
    """An entry of a list on one line."""
    if not isinstance(value, dict):
        return str(value)
    parts = [f"{name} {_inline(part)}" for name, part in value.items() if part not in (None, {}, [])]
    return ", ".join(parts)
