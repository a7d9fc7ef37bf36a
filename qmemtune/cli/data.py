"""``qmemtune data``: what a run would be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmemtune.cli.options import Debug, Json, Overrides, Quiet
from qmemtune.cli.output import NO_PICTURE, Output, output
from qmemtune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

BAR = 40
"""Characters of the longest bar."""
LONGEST_PART = 600
"""Characters shown of one stretch of a row."""


def data(
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Show so many training rows, evenly spread.")] = 3,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Draw the lengths and the share of the loss.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Show what will be trained on: counts, lengths, loss, duplicates, leaks, and a few rows.

    data recipe=quickstart, or data model.path=MODEL data.path=FILE. The model's weights are not loaded.
    """
    with output(as_json, debug, quiet) as out:
        from qmemtune.config.compose import compose
        from qmemtune.config.regression import is_regression

        composed = compose(overrides or [])
        out.warn(composed.warnings)
        if is_regression(composed.config):
            raise UserError(
                f"{composed.config.data.path} makes numbers, not text", where="data.path", fix="train on it directly"
            )
        out.working("reading rows")
        from qmemtune.cli.display import PatientCounter
        from qmemtune.data.survey import survey
        from qmemtune.models.loading import load_tokenizer

        out.libraries_are_loaded()
        tokenizer = load_tokenizer(composed.config.model)
        report = survey(composed.config.data, tokenizer, samples=rows, progress=PatientCounter(quiet=quiet))
        report["png"] = None if png is None else _draw(report, png, out)
        out.result(report, lambda console: _show(console, report))


def _draw(report: dict[str, Any], path: Path, out: Output) -> str | None:
    from qmemtune.report.lengths import draw_lengths

    try:
        draw_lengths(report, path)
    except ImportError:
        out.note(NO_PICTURE)
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"the picture cannot be written: {error}", where=f"--png {path}") from error
    return str(path)


def _show(console: Console, report: dict[str, Any]) -> None:
    for source in report["sources"]:
        name = f"{source['name']}: " if source.get("name") else ""
        weight = f", weight {source['weight']:g}: {source['rows']:,} rows a pass" if source.get("name") else ""
        console.print(
            f"{name}{source['path']}: {source['read']:,} rows read ({source['format']}){weight}", markup=False
        )
        for reason, count in source["rejected"].items():
            where = source["rejected_at"][reason]
            console.print(f"  {count:,} rejected: {reason} ({where})", style="red", markup=False)
    for name, title in (("train", "train"), ("heldout", "held out")):
        part = report[name]
        cut = f", {part['truncated']:,} cut at {report['max_length']:,} ({part['cut_tokens']:,} tokens lost)"
        console.print(
            f"{title}: {part['rows']:,} rows, {part['tokens']:,} tokens, "
            f"{part['loss_tokens'] / max(part['tokens'], 1):.0%} in the loss, longest {part['longest']:,}"
            + (cut if part["truncated"] else ""),
            style="bold",
        )
    _show_lengths(console, report)
    _show_repeats(console, report)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    for sample in report["samples"]:
        _show_row(console, sample)
    if report["png"]:
        console.print(f"picture: {report['png']}", markup=False)


def _show_lengths(console: Console, report: dict[str, Any]) -> None:
    lengths = report["lengths"]
    edges, counts = lengths["edges"], lengths["train"]
    most = max(counts, default=0)
    quantiles = ", ".join(f"{value:,} ({share})" for share, value in lengths["quantiles"].items())
    console.print(f"\ntokens a row; quantiles {quantiles}", markup=False)
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * round(BAR * count / most) if most else ""
        console.print(f"{low + 1:>7,} to {high:<7,} {count:>9,} {bar or ('▏' if count else '')}", markup=False)


def _show_repeats(console: Console, report: dict[str, Any]) -> None:
    repeats, leaks = report["duplicates"], report["leakage"]
    console.print(
        f"\nduplicates: {repeats['same_row']:,} rows say what an earlier one said; "
        f"{repeats['same_prompt_other_answer']:,} rows have a prompt with several answers"
    )
    console.print(
        f"leakage: {leaks['removed']:,} training rows left out for a held-out row's prompt; "
        f"{leaks['same_words']:,} held-out rows ask in a training row's words, {leaks['shared_passage']:,} share a "
        "long passage with one",
        style="red" if leaks["same_words"] or leaks["shared_passage"] else "",
    )
    for leak in leaks["examples"]:
        console.print(f"  {leak['kind']}: {leak['heldout']} and {leak['train']}: {leak['text']!r}", markup=False)


def _show_row(console: Console, sample: dict[str, Any]) -> None:
    """A row: what is in the loss in green (between ⟦ ⟧ where there is no colour), context dimmed."""
    from rich.text import Text

    console.print(f"\n{sample['origin']}: {sample['tokens']:,} tokens", style="bold", markup=False)
    line = Text()
    for part in sample["parts"]:
        text = part["text"]
        if len(text) > LONGEST_PART:
            half = LONGEST_PART // 2
            text = f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"
        if part["loss"] and not console.is_terminal:
            text = f"⟦{text}⟧"
        line.append(text, style="green" if part["loss"] else "dim")
    console.print(line)
