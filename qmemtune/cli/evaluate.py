"""``qmemtune eval``: a run or an exported folder beside its base, or a model by itself, on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qmemtune.cli.options import Debug, Json, Overrides, Quiet
from qmemtune.cli.output import Output, output, plain, print_error
from qmemtune.errors import RunFailed, UserError

if TYPE_CHECKING:
    from rich.console import Console


TOLERATED = 0.05
"""Share of the answers that may be cut off, or hold no answer, without a word."""


def evaluate(overrides: Overrides = None, as_json: Json = False, debug: Debug = False, quiet: Quiet = False) -> None:
    """Measure a run or an exported folder beside its base, or a bare model.

    eval RUN or run_dir=RUN, else the newest run. eval FOLDER or model.path=FOLDER takes a folder that merge-export
    wrote, with the base, rows and evaluation of its run; where the base was a local model: eval FOLDER model.path=BASE,
    and data.path= where the rows are not at hand. recipe= or any other model.path= measures a model by itself.
    instruction=TEXT gives the instruction prior one text for all rows in place of their own.
    """
    with output(as_json, debug, quiet) as out:
        from qmemtune.cli.target import names_bare_model, split_export, take, with_folder

        instruction, given = take("instruction", overrides or [])
        given = with_folder(given)
        folder, rest = split_export(given)
        if folder is not None:
            report = _evaluate_export(folder, rest, out, instruction)
        elif names_bare_model(given):
            if instruction is not None:
                raise UserError(
                    "an instruction has no effect on a bare model",
                    where=f"instruction={instruction}",
                    fix="leave it out",
                )
            report = _evaluate_model(given, out)
        else:
            report = _evaluate_run(given, out, instruction)
        out.result(report, lambda console: _show(console, report))
        out.warn(doubts(report["tuned"]))
        failed = _failed_tasks(report)
        if failed:
            # After the result, and beside it: with --json, stdout holds that one object.
            error = RunFailed(failed[0], where="evaluation.tasks", fix="the other numbers are measured and kept")
            print_error(error, as_json=False, debug=False)
            raise typer.Exit(1)


def doubts(metrics: dict[str, Any]) -> list[str]:
    """What makes a share of exact matches smaller than the model is good."""
    rows = metrics.get("exact_match_rows") or 0
    cut, without = metrics.get("exact_match_cut") or 0, metrics.get("exact_match_without_answer") or 0
    found = []
    if cut > TOLERATED * rows:
        found.append(
            f"{cut} of {rows} answers are wrong and were cut off -> raise evaluation.exact_match.max_new_tokens"
        )
    elif without > TOLERATED * rows:
        found.append(f"evaluation.exact_match.answer_pattern finds nothing in {without} of {rows} answers")
    return found


def _failed_tasks(report: dict[str, Any]) -> list[str]:
    """Tasks that the harness could not run, with the reason."""
    found = [(report[name] or {}).get("tasks") or {} for name in ("base", "tuned")]
    return [f"{task}: {values['error']}" for tasks in found for task, values in tasks.items() if "error" in values]


def _evaluate_run(overrides: Sequence[str], out: Output, instruction: str | None) -> dict[str, Any]:
    from qmemtune.cli.display import RowCounter
    from qmemtune.cli.target import load_target

    run, composed = load_target(overrides, out)
    config = composed.config
    out.working("loading the run's model")
    from functools import partial

    from qmemtune.adapters.files import WEIGHTS
    from qmemtune.data.prepare import prepare_heldout
    from qmemtune.engine.made_with import another_base
    from qmemtune.engine.manifest import sha256
    from qmemtune.engine.restore import load_run
    from qmemtune.evaluation.forward import one_for_all
    from qmemtune.evaluation.harness import check_tasks
    from qmemtune.evaluation.verb import evaluate_pair
    from qmemtune.models.loading import load_base
    from qmemtune.rundir import write_json

    out.libraries_are_loaded()
    check_tasks(config.evaluation.tasks)
    loaded = load_run(run, config)
    out.warn(another_base(run, config))
    source = loaded.source if instruction is None else one_for_all(loaded.source, instruction)
    rows = prepare_heldout(config.data, loaded.tokenizer).heldout
    with RowCounter(quiet=out.quiet) as counter:
        report = evaluate_pair(
            loaded.model,
            loaded.tokenizer,
            rows,
            config.evaluation,
            source=source,
            device=loaded.device,
            dtype=loaded.dtype,
            fresh_base=partial(load_base, config.model, config.quantization, device=loaded.device),
            progress=counter,
        )
    given = [*overrides, *([] if instruction is None else [f"instruction={instruction}"])]
    asked = [override for override in given if not override.startswith("run_dir=")]
    report = {"run_dir": str(run.path), "overrides": asked, "adapter_sha256": sha256(run.adapter / WEIGHTS), **report}
    write_json(run.evaluation, plain(report))
    return report


def _evaluate_export(folder: Path, overrides: Sequence[str], out: Output, instruction: str | None) -> dict[str, Any]:
    out.working("loading the exported model")
    from qmemtune.cli.display import RowCounter
    from qmemtune.export.evaluation import evaluate_exported
    from qmemtune.export.opening import open_exported

    out.libraries_are_loaded()
    exported = open_exported(folder, overrides)
    out.warn(exported.composed.warnings)
    with RowCounter(quiet=out.quiet) as counter:
        return evaluate_exported(exported, say=out.note, progress=counter, instruction=instruction)


def _evaluate_model(overrides: Sequence[str], out: Output) -> dict[str, Any]:
    """A model without an adapter: its metrics stand under ``tuned``, and ``base`` is null."""
    from qmemtune.cli.display import RowCounter
    from qmemtune.cli.target import refuse_adapter
    from qmemtune.config.compose import compose

    composed = compose(overrides)
    out.warn(composed.warnings)
    config = composed.config
    refuse_adapter(config.model.path)
    out.working("loading the model")
    from qmemtune.data.prepare import prepare_heldout
    from qmemtune.engine.restore import load_whole
    from qmemtune.evaluation.harness import check_tasks
    from qmemtune.evaluation.verb import by_itself, measure

    out.libraries_are_loaded()
    check_tasks(config.evaluation.tasks)
    loaded = load_whole(config)
    rows = prepare_heldout(config.data, loaded.tokenizer).heldout
    with RowCounter(quiet=out.quiet) as counter:
        measured = measure(
            loaded.model,
            loaded.tokenizer,
            rows,
            config.evaluation,
            device=loaded.device,
            dtype=loaded.dtype,
            progress=counter,
        )
    return {"model": config.model.path, **by_itself(measured, rows, config.evaluation, loaded.tokenizer)}


def _show(console: Console, report: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    base, tuned, difference = report["base"], report["tuned"], report.get("difference") or {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    titles = ["base", "tuned", "difference (95 % interval)"] if base else ["model"]
    for title in (*titles, "rows"):
        table.add_column(title, justify="right")
    for label, path in _lines(tuned):
        values = [_at(part, path) for part in ((base, tuned) if base else (tuned,))]
        cells = [_metric(path[-1], value) for value in values]
        if base:
            cells.append(_interval(path[-1], _at(difference, path)))
        table.add_row(Text(label), *cells, str(_rows(tuned, path)))
    console.print(f"{report.get('run_dir') or report.get('model')}", style="bold", markup=False)
    console.print(table)
    for name, results in ("base", base or {}), ("tuned", tuned):
        for task, values in (results.get("tasks") or {}).items():
            console.print(f"{name} {task}: {values}", markup=False)
    for example in report.get("examples") or []:
        console.print("")
        for name, text in example.items():
            console.print(f"{name:>9}: {_one_line(str(text))}", markup=False)


def _lines(metrics: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """(label, where the number stands) of every line of the table."""
    names = [name for name in ("loss", "perplexity", "exact_match") if metrics.get(name) is not None]
    lines: list[tuple[str, tuple[str, ...]]] = [(name.replace("_", " "), (name,)) for name in names]
    groups = metrics.get("groups") or {}
    for name in ("exact_match", "loss"):
        if any(group.get(name) is not None for group in groups.values()):
            lines += [(f"{name.replace('_', ' ')}, {group}", ("groups", group, name)) for group in groups]
            break
    return lines


def _at(results: Any, path: Sequence[str]) -> Any:
    for name in path:
        results = (results or {}).get(name)
    return results


def _rows(metrics: dict[str, Any], path: tuple[str, ...]) -> int:
    """Rows behind a number: exact match may have been measured on fewer than the loss."""
    section = _at(metrics, path[:-1])
    fewer = section.get("exact_match_rows") if path[-1] == "exact_match" else None
    return int(fewer if fewer is not None else section.get("rows", 0))


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return {"exact_match": f"{value:.1%}", "perplexity": f"{value:.2f}"}.get(name, f"{value:.4f}")


def _interval(name: str, found: dict[str, Any] | None) -> str:
    if not found or found.get("difference") is None:
        return ""
    scale, form = (100, "+.1f") if name == "exact_match" else (1, "+.4f")
    values = [found["difference"], found.get("low"), found.get("high")]
    texts = [format(value * scale, form) if value is not None else "?" for value in values]
    unit = " points" if name == "exact_match" else ""
    return f"{texts[0]}{unit} ({texts[1]} to {texts[2]})"


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."
