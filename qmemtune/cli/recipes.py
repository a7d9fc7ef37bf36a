"""``qmemtune recipes``: what there is to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmemtune.cli.options import Debug, Json, Quiet
from qmemtune.cli.output import output

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console


def recipes(as_json: Json = False, debug: Debug = False, quiet: Quiet = False) -> None:
    """List the recipes, yours in ./recipes and the tool's."""
    with output(as_json, debug, quiet) as out:
        from qmemtune.config.places import list_recipes

        rows = [_describe(name, path) for name, path in sorted(list_recipes().items())]
        out.result({"recipes": rows}, lambda console: _show(console, rows))


def _describe(name: str, path: Path) -> dict[str, Any]:
    """One recipe; ``error`` stands in place of its contents where it does not compose."""
    from qmemtune.config.compose import compose
    from qmemtune.config.places import is_own, shown
    from qmemtune.errors import UserError

    row: dict[str, Any] = {"name": name, "file": shown(path), "own": is_own(path)}
    try:
        config = compose([f"recipe={path}"], allow_missing=True).config
    except UserError as error:
        return row | {"error": str(error.findings[0])}
    return row | {
        "model": config.model.path,
        "data": ", ".join(source.path for source in config.data.sources.values()) or config.data.path,
        "adapter": config.adapter.kind,
        "quantization": config.quantization.kind,
        "needs": config.needs,
        "description": config.description,
    }


NARROW = 120
"""Below so many characters a table would break names and paths, which are to be copied."""


def _show(console: Console, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    if console.width < NARROW:
        _list(console, rows)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("recipe", "model", "data", "adapter", "needs", "what it is for"):
        table.add_column(title, overflow="fold")
    for row in rows:
        name = row["name"] if row["own"] else f"{row['name']} (yours)"
        if "error" in row:
            table.add_row(Text(name), "", "", "", "", Text(f"does not compose: {row['error']}", style="red"))
            continue
        adapter = row["adapter"] if row["quantization"] == "none" else f"{row['adapter']} on {row['quantization']}"
        cells = [name, row["model"], row["data"], adapter, row["needs"] or "", row["description"] or ""]
        table.add_row(*(Text(str(cell)) for cell in cells))
    console.print(table)
    console.print("\nqmemtune train recipe=NAME", style="dim")


def _list(console: Console, rows: list[dict[str, Any]]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    for row in rows:
        console.print(Text(row["name"] if row["own"] else f"{row['name']} (yours)", style="bold"))
        facts = ("description", "model", "data", "adapter", "quantization", "needs")
        lines = [f"does not compose: {row['error']}"] if "error" in row else []
        lines += [f"{fact}: {row[fact]}" if fact != "description" else row[fact] for fact in facts if row.get(fact)]
        for line in lines:
            console.print(Padding(Text(str(line), overflow="fold"), (0, 0, 0, 2), expand=False))
    console.print("\nqmemtune train recipe=NAME", style="dim")
