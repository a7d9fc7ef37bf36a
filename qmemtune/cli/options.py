"""The arguments and options that every verb has."""

from __future__ import annotations

from typing import Annotated

import typer

from qmemtune.cli.complete import complete_override

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="OVERRIDES",
        help="recipe=NAME or FILE, group=option, key=value, +key=value, ~key; `qmemtune config` prints all keys.",
        autocompletion=complete_override,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and what libraries say.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print results and errors only.")]
