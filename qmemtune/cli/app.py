"""The table of verbs, and what happens when one of them fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import qmemtune
from qmemtune.cli.config import config
from qmemtune.cli.data import data
from qmemtune.cli.doctor import doctor
from qmemtune.cli.estimate import estimate
from qmemtune.cli.evaluate import evaluate
from qmemtune.cli.generate import generate
from qmemtune.cli.inspect import inspect
from qmemtune.cli.merge_export import merge_export
from qmemtune.cli.recipes import recipes
from qmemtune.cli.resume_check import resume_check
from qmemtune.cli.study import study
from qmemtune.cli.train import train
from qmemtune.errors import UserError
from qmemtune.models.kernel_caches import keep_fewer_kernels

INTERRUPTED = 130

app = typer.Typer(
    name="qmemtune",
    help="Fine-tune language models with LoRA or a queryable memory of shared low-rank update atoms.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train")(train)
app.command("data", short_help="Show what will be trained on, and a few rows.")(data)
app.command("eval", short_help="Measure a run, an export or a bare model.")(evaluate)
app.command("merge-export")(merge_export)
app.command("generate")(generate)
app.command("inspect", short_help="Show how a run's memory uses its atoms.")(inspect)
app.command("study", short_help="Compare adapters over seeds and settings.")(study)
app.command("resume-check", short_help="Prove on a run that resuming is exact.")(resume_check)
app.command("doctor", short_help="Check Python, libraries, device, disk and hub.")(doctor)
app.command("estimate", short_help="Estimate the memory of a run by part.")(estimate)
app.command("recipes")(recipes)
app.command("config")(config)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qmemtune {qmemtune.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Start here: qmemtune recipes, then qmemtune train recipe=quickstart."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0: done. 2: a mistake the user can mend. 1: anything else that failed. 130: interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json, debug = "--json" in arguments, "--debug" in arguments
    keep_fewer_kernels()
    try:
        code = app(arguments, standalone_mode=False, prog_name="qmemtune")
        sys.stdout.flush()
        if code == INTERRUPTED:
            # Typer makes this exit code of Ctrl-C, without a word.
            print("interrupted", file=sys.stderr)
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return _reader_is_gone()
    except SystemExit as leaving:
        # Typer leaves this way after completing a word, and when whoever read the output has stopped.
        return leaving.code if isinstance(leaving.code, int) else 1
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last stop: any failure becomes one line and an exit code
        return _fail(error, as_json=as_json, debug=debug)


def _fail(error: Exception, *, as_json: bool, debug: bool) -> int:
    from qmemtune.cli.output import print_error

    mistake = _usage_mistake(error)
    if mistake is not None:
        error, debug = mistake, False
    try:
        print_error(error, as_json=as_json, debug=debug)
    except BrokenPipeError:
        return _reader_is_gone()
    return error.exit_code if isinstance(error, UserError) else 1


def _usage_mistake(error: Exception) -> UserError | None:
    """Typer's own complaint about the command line as an error of ours."""
    # BadParameter is exported; what it derives from has moved between versions of Typer.
    usage_error = typer.BadParameter.__mro__[1]
    if not isinstance(error, usage_error):
        return None
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", "qmemtune")
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    return UserError(message, fix=_meant_key(error) or f"`{command} --help` shows what it takes")


def _meant_key(error: Exception) -> str | None:
    """``--max_steps`` is no option, but the key trainer.max_steps is close."""
    from qmemtune.config.familiar import familiar
    from qmemtune.config.fields import fields_of, nearest

    name = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
    if name in ("c", "config", "config_file", "recipe"):
        return "a config file is written recipe=FILE"
    meant = familiar(name) if name else None
    close = [meant] if meant else nearest(name, list(fields_of("queryable"))) if name else []
    return f"options of the config are written {close[0]}{'' if '=' in close[0] else '=...'}" if close else None


def _reader_is_gone() -> int:
    """Whoever read our output has stopped (``| head``): end without a word, also from the interpreter's exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        return 1
    return 1
