"""``qmemtune config``: the composed config, and who set a value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmemtune.cli.options import Debug, Json, Overrides, Quiet
from qmemtune.cli.output import output

if TYPE_CHECKING:
    from rich.console import Console

    from qmemtune.config.compose import Composed


def config(
    overrides: Overrides = None,
    why: Annotated[
        str | None, typer.Option("--why", metavar="KEY", help="Say what set this key, and what it replaced.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Print the config that a recipe and overrides make.

    run_dir=RUN without a recipe prints that run's own.
    """
    with output(as_json, debug, quiet) as out:
        from qmemtune.config.compose import to_dict, to_yaml
        from qmemtune.config.of_run import compose_run

        composed = compose_run(overrides or [], allow_missing=True, needs_data=False)
        out.warn(composed.warnings)
        out.warn([f"{key} must still be given" for key in composed.missing])
        if why is not None:
            from qmemtune.config.fields import sections

            if why in sections():
                section = _explain_section(composed, why)
                out.result(section, lambda console: _show_section(console, section))
                return
            explained = _explain(composed, why)
            out.result(explained, lambda console: _show_why(console, explained))
        else:
            text = to_yaml(composed.config)
            out.result(to_dict(composed.config), lambda console: _show_yaml(console, text))


def _explain(composed: Composed, key: str) -> dict[str, Any]:
    """``key``, ``value``, ``source``, ``help`` and ``history``: what it was set to, first to last."""
    from qmemtune.config.adapters import ADAPTERS
    from qmemtune.config.compose import to_dict
    from qmemtune.config.familiar import familiar
    from qmemtune.config.fields import elsewhere, field_for, fields_of, nearest
    from qmemtune.errors import UserError

    kind = composed.config.adapter.kind
    field = field_for(key, kind)
    if field is None or key not in composed.provenance:
        other = elsewhere(key, kind) if field is None else None
        if other is not None:
            problem, override = other
            raise UserError(problem, where="--why", fix=f"add {override}")
        known = list(dict.fromkeys([*composed.provenance, *(k for other in ADAPTERS for k in fields_of(other))]))
        meant = familiar(key)
        close = [meant.partition("=")[0]] if meant else nearest(key, known)
        raise UserError(f"unknown key {key}", where="--why", fix=f"did you mean {close[0]}?" if close else None)
    value: Any = to_dict(composed.config)
    for name in field.key.split("."):
        value = value[name]
    if field.key != key:
        for name in key.removeprefix(f"{field.key}.").split("."):
            value = value.get(name) if isinstance(value, dict) else None
    default = field.default if field.key == key else None
    history = [{"value": default, "source": "default (schema)"}] if field.key == key else []
    for setting in composed.history.get(key, []):
        history.append({"value": default if setting.reset else setting.value, "source": setting.where})
    return {"key": key, "value": value, "source": history[-1]["source"], "help": field.help, "history": history}


def _explain_section(composed: Composed, section: str) -> dict[str, Any]:
    """The same of every key of a section, those at their default last."""
    keys = [_explain(composed, key) for key in composed.provenance if key.startswith(f"{section}.")]
    return {"section": section, "keys": sorted(keys, key=lambda key: len(key["history"]) < 2)}


def _show_section(console: Console, explained: dict[str, Any]) -> None:
    for key in explained["keys"]:
        console.print(f"{key['key']} = {key['value']}  ({key['source']})", markup=False)


def _show_why(console: Console, explained: dict[str, Any]) -> None:
    console.print(f"{explained['key']} = {explained['value']}", markup=False)
    console.print(f"set by {explained['source']}", markup=False)
    for entry in reversed(explained["history"][:-1]):
        console.print(f"  replaces {entry['value']} from {entry['source']}", markup=False)
    if explained["help"]:
        console.print(explained["help"], style="dim", markup=False)


def _show_yaml(console: Console, text: str) -> None:
    if not console.is_terminal:
        console.file.write(text)
        return
    from rich.syntax import Syntax

    console.print(Syntax(text, "yaml", background_color="default", word_wrap=True))
