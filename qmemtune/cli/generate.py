"""``qmemtune generate``: the live model of a run answers, or an exported folder, or a model by itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmemtune.cli.options import Debug, Json, Overrides, Quiet
from qmemtune.cli.output import Output, output, print_error
from qmemtune.cli.prompts import Asked, prompts
from qmemtune.errors import Finding, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from qmemtune.engine.restore import LoadedModel

OWN_ARGUMENTS = ("prompt", "instruction")
"""Plain arguments of this verb that are no keys of the config."""
ROWS_SHOWN = 8
"""Rows that cannot be asked, named one by one."""


def generate(
    overrides: Overrides = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="The prompt; prompt=TEXT too.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="Prompts: one a line, or jsonl rows with prompt, messages or a training row's columns.",
        ),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            "--instruction",
            metavar="TEXT",
            help="Text for the instruction prior, if not the prompt's own; instruction=TEXT too.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    as_json: Json = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Answer prompts or chat: a run, an export or a model.

    A prompt, a file of prompts, or lines of stdin; with none of them on a terminal, a chat. generate RUN or
    run_dir=RUN, else the newest run. generate FOLDER takes a folder that merge-export wrote; an adapter whose base was
    a local model needs model.path=BASE too. recipe= or any other model.path= asks a model by itself.
    """
    with output(as_json, debug, quiet) as out:
        from qmemtune.cli.target import with_folder

        given, rest = _own_arguments(overrides or [])
        rest = with_folder(rest)
        prompt = prompt if prompt is not None else given.get("prompt")
        instruction = instruction if instruction is not None else given.get("instruction")
        chat = prompt is None and file is None and sys.stdin.isatty()
        if chat and as_json:
            raise UserError("a chat gives no JSON", where="--json", fix="give --prompt or --file, or leave --json out")
        rows = [] if chat else prompts(prompt, file)
        asked, loaded = _load(rest, out)
        if instruction and not loaded.source.active:
            out.warn([f"instruction={instruction} has no effect: there is no adapter with an instruction prior"])
        speaker = Speaker(loaded, instruction, max_new_tokens, temperature)
        if chat:
            _chat(speaker, out)
            return
        speaker.check(rows)
        answers = [_answer(speaker, row, out, alone=len(rows) == 1) for row in rows]
        if out.as_json:
            out.result({**asked, "answers": answers}, _nothing)


def _load(overrides: Sequence[str], out: Output) -> tuple[dict[str, str], LoadedModel]:
    """What is asked, as ``run_dir`` or ``model``, and its model."""
    from qmemtune.cli.target import load_target, names_bare_model, split_export

    folder, rest = split_export(overrides)
    if folder is not None:
        out.working("loading the exported model")
        from qmemtune.export.opening import load_exported, open_exported

        out.libraries_are_loaded()
        exported = open_exported(folder, rest, needs_data=False)
        out.warn(exported.composed.warnings)
        if exported.format == "merged" and exported.overridden("model.path"):
            out.warn([f"model.path={exported.config.model.path} has no effect: a merged model needs no base"])
        return {"model": str(folder)}, load_exported(exported)
    if names_bare_model(overrides):
        return _load_bare_model(overrides, out)
    run, composed = load_target(overrides, out, needs_data=False)
    out.working("loading the run's model")
    from qmemtune.engine.made_with import another_base
    from qmemtune.engine.restore import load_run

    out.libraries_are_loaded()
    loaded = load_run(run, composed.config)
    out.warn(another_base(run, composed.config))
    return {"run_dir": str(run.path)}, loaded


def _load_bare_model(overrides: Sequence[str], out: Output) -> tuple[dict[str, str], LoadedModel]:
    from qmemtune.cli.target import refuse_adapter
    from qmemtune.config.compose import compose
    from qmemtune.config.missing import MISSING

    composed = compose(overrides, allow_missing=True, needs_data=False)
    out.warn(composed.warnings)
    config = composed.config
    if config.model.path == MISSING:
        raise UserError("no model is named", where="model.path", fix="give model.path=FOLDER_OR_HUB_ID")
    refuse_adapter(config.model.path)
    out.working("loading the model")
    from qmemtune.engine.restore import load_whole

    out.libraries_are_loaded()
    loaded = load_whole(config)
    data = config.data
    unsaid = data.path == MISSING and not data.sources and data.format != "text" and data.chat == "auto"
    if unsaid and loaded.tokenizer.chat_template:
        # No rows say how a prompt is rendered, and a model that brings a template was made for it.
        out.note("prompts are put into the model's chat template; data.chat=never leaves them as they are")
        data.chat = "always"
    return {"model": config.model.path}, loaded


class Speaker:
    """A loaded model with the options of its answers."""

    def __init__(self, loaded: LoadedModel, instruction: str | None, max_new_tokens: int, temperature: float) -> None:
        self.loaded = loaded
        self.instruction = instruction
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    @cached_property
    def fields(self) -> list[str]:
        """Fields of the prompt template; none without one."""
        from qmemtune.data.examples import template
        from qmemtune.data.mixture import first_source

        text_template = template(first_source(self.loaded.config.data).prompt_template, "data.prompt_template")
        return [] if text_template is None else text_template.fields

    def check(self, rows: Sequence[Asked]) -> None:
        """See before the first answer that all can be asked.

        Raises:
            UserError: with the rows that cannot.
        """
        from qmemtune.evaluation.generate import prompt_ids

        findings: list[Finding] = []
        for asked in rows:
            try:
                prompt_ids(self.loaded, asked.parts(self.fields)[0])
            except UserError as error:
                findings += [replace(found, where=asked.where or found.where) for found in error.findings]
        if len(findings) > ROWS_SHOWN:
            more = f"and {len(findings) - ROWS_SHOWN:,} more"
            findings[ROWS_SHOWN:] = [Finding(more, f"{len(rows):,} rows")]
        if findings:
            raise UserError.many(findings)

    def stream(self, prompt: Any, instruction: str | None = None) -> Iterator[str]:
        """The answer in pieces."""
        from qmemtune.evaluation.generate import stream_answer

        return stream_answer(
            self.loaded,
            prompt,
            instruction=self.instruction if instruction is None else instruction,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
        )


def _own_arguments(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """``prompt=`` and ``instruction=``, and the overrides proper."""
    own: dict[str, str] = {}
    rest = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and key in OWN_ARGUMENTS:
            own[key] = value
        else:
            rest.append(override)
    return own, rest


def _answer(speaker: Speaker, asked: Asked, out: Output, *, alone: bool) -> dict[str, Any]:
    row = asked.row
    if not alone and not out.as_json and out.stdout.isatty():
        text = row.get("prompt")
        out.note(f"> {text if isinstance(text, str) else json.dumps(row, ensure_ascii=False)}")
    answer = _say(speaker.stream(*asked.parts(speaker.fields)), out)
    # A training row's own answer is what the new one is compared with.
    own = {"reference": row["answer"]} if "answer" in row and "reference" not in row else {}
    return {**row, **own, "answer": answer}


def _say(pieces: Iterator[str], out: Output) -> str:
    """Print an answer while it comes."""
    said = []
    for piece in pieces:
        said.append(piece)
        if not out.as_json:
            out.stdout.write(piece)
            out.stdout.flush()
    if not out.as_json:
        out.stdout.write("\n")
        out.stdout.flush()
    return "".join(said)


def _chat(speaker: Speaker, out: Output) -> None:
    """Ask and answer until the input ends.

    A run trained on conversations answers the whole conversation; any other takes each line by itself.
    """
    from qmemtune.config.data import is_chat
    from qmemtune.data.render import form_of

    data = speaker.loaded.config.data
    remembers = is_chat(data, form_of(data))
    out.note("an empty line or Ctrl-D ends it" + ("; /new starts a new conversation" if remembers else ""))
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        if line == "/new":
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = _say(speaker.stream(list(messages) if remembers else line), out)
        except KeyboardInterrupt:
            out.note("\n(stopped)")
            messages.pop()
            continue
        except UserError as error:
            print_error(error, as_json=False, debug=out.debug)
            messages.pop()
            continue
        if answer.strip():
            messages.append({"role": "assistant", "content": answer})
        else:
            out.note("(no answer)")
            messages.pop()


def _nothing(console: Console) -> None:
    """Answers were printed while they came."""
