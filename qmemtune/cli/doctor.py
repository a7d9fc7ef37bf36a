"""``qmemtune doctor``: what of this machine and installation stands in the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmemtune.cli.options import Debug, Json, Quiet
from qmemtune.cli.output import output

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


def doctor(as_json: Json = False, debug: Debug = False, quiet: Quiet = False) -> int:
    """Check Python, libraries, device, disk and hub; each finding comes with its remedy.

    Exit code 1 when training is impossible.
    """
    with output(as_json, debug, quiet) as out:
        from pathlib import Path

        from qmemtune.engine.doctor import examine

        found = examine(Path("runs"))
        out.result(found, lambda console: _show(console, found, quiet=quiet))
        return 0 if found["can_train"] else 1


def _show(console: Console, found: dict[str, Any], *, quiet: bool) -> None:
    from rich.text import Text

    for check in found["checks"]:
        if quiet and check["level"] == "ok":
            continue
        line = Text(f"{check['level']:<8}", style=STYLES[check["level"]])
        line.append(f"{check['name']}: ", style="bold")
        line.append(check["found"], style="default")
        if check["remedy"]:
            line.append(f" -> {check['remedy']}", style="cyan")
        console.print(line, soft_wrap=True)
    console.print("training is possible" if found["can_train"] else "training is not possible", style="bold")
