"""Everything the verbs print: results to stdout, the rest to stderr."""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qmemtune.cli.collector import collector_paused
from qmemtune.cli.compile_later import compiler_left_out
from qmemtune.credentials import hide
from qmemtune.errors import Finding, UserError, write_failure
from qmemtune.nested import with_leaves
from qmemtune.quiet import hide_loading_bars, silence
from qmemtune.rundir import json_line

if TYPE_CHECKING:
    from rich.console import Console

NO_PICTURE = "no picture is drawn: install matplotlib with pip install 'qmemtune[report]'"


@dataclass(frozen=True)
class Output:
    """Where a verb prints."""

    stdout: TextIO
    as_json: bool
    quiet: bool
    debug: bool
    imported: Callable[[], None]
    """Sets the paused collector going again."""

    def libraries_are_loaded(self) -> None:
        """To be called after a verb's heavy imports and before its work."""
        self.imported()
        if not self.debug:
            hide_loading_bars()

    def result(self, value: Mapping[str, Any], show: Callable[[Console], None]) -> None:
        """Print a verb's result: as one JSON object, or by ``show``."""
        if self.as_json:
            write_json_line(self.stdout, value)
        else:
            show(console(self.stdout))

    def note(self, text: str) -> None:
        """One line for the reader that is no result."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def working(self, text: str) -> None:
        """What begins now and takes seconds or minutes: without a line, a verb that loads looks like one that hangs.

        To be called before a verb's heavy imports, which take seconds themselves.
        """
        self.note(f"{text} ...")

    def warn(self, lines: list[str]) -> None:
        """Warnings, one a line."""
        for line in lines:
            self.note(f"warning: {line}")


@contextmanager
def output(as_json: bool, debug: bool, quiet: bool) -> Iterator[Output]:
    """What a verb runs inside: libraries are silenced, and with ``as_json`` only the result reaches stdout.

    Of several processes (torchrun) the first one speaks; of the others libraries may still complain.
    """
    silence(debug=debug, quiet=quiet)
    stdout = sys.stdout
    with collector_paused() as imported, compiler_left_out():
        if process_number() > 0:
            with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(sys.stderr):
                yield Output(nowhere, as_json, True, debug, imported)
            return
        if not as_json:
            yield Output(stdout, as_json, quiet, debug, imported)
            return
        with redirect_stdout(sys.stderr):
            yield Output(stdout, as_json, quiet, debug, imported)


def process_number() -> int:
    """This process's number among those that a launcher started; 0 without one."""
    for name in ("RANK", "LOCAL_RANK"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


def console(stream: TextIO) -> Console:
    """A Rich console that wraps and colours on a terminal only."""
    from rich.console import Console

    wide = None if stream.isatty() else 200
    return Console(file=stream, highlight=False, soft_wrap=not stream.isatty(), width=wide)


def write_json_line(stream: TextIO, value: Mapping[str, Any]) -> None:
    """One JSON object on one line."""
    stream.write(json_line(plain(value), allow_nan=False))
    stream.flush()


def plain(value: Any) -> Any:
    """A value as JSON knows it: paths as text, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value) if isinstance(value, Path) else getattr(value, "item", lambda: str(value))()


def print_error(error: BaseException, *, as_json: bool, debug: bool) -> None:
    """One line for each finding on stderr; with ``as_json`` the JSON error on stdout.

    All processes of a run meet the same mistake of the user, and the first one reports it. What fails in another way
    may do so in one of them only: it is reported there, with the process's number.
    """
    number = process_number()
    if number > 0 and isinstance(error, UserError):
        return
    if debug:
        print(hide("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    if isinstance(error, UserError):
        findings, value = error.findings, error.as_dict()
    else:
        finding = _failure(error, number, debug)
        findings, value = [finding], asdict(finding)
    lines = console(sys.stderr)
    for finding in findings:
        # The terminal breaks the line, so that a command in it can be copied whole.
        lines.print(_line(finding), soft_wrap=True)
    if as_json and number == 0:
        write_json_line(sys.stdout, {"error": without_tokens(value)})


def _failure(error: BaseException, number: int, debug: bool) -> Finding:
    """What is no mistake of the user's."""
    process = f" (in process {number})" if number else ""
    reason = write_failure(error)
    if reason is not None:
        where = getattr(error, "filename", None)
        fix = "free some space, or choose another disk, and give the command again"
        return Finding(f"a file could not be written: {reason}{process}", str(where) if where else None, fix)
    text = " ".join(str(error).split())
    way = None if debug else "run again with --debug for the traceback"
    return Finding(f"internal error: {type(error).__name__}: {text}{process}", None, way)


def _line(finding: Finding) -> Any:
    from rich.text import Text

    line = Text("error: ", style="bold red")
    if finding.where:
        line.append(f"{_one_line(finding.where)}: ", style="bold")
    line.append(_one_line(finding.problem), style="default")
    if finding.fix:
        line.append(f" -> {_one_line(finding.fix)}", style="cyan")
    return line


def _one_line(text: str) -> str:
    return hide(" ".join(text.split("\n")))


def without_tokens(value: Any) -> Any:
    """Plain values without access tokens in their texts."""
    return with_leaves(value, lambda leaf: hide(leaf) if isinstance(leaf, str) else leaf)
