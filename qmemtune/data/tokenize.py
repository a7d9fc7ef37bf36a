"""Examples to token ids and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qmemtune.config.data import DataConfig
from qmemtune.data.encode import Segment, decoded
from qmemtune.data.examples import Example
from qmemtune.data.records import Rejected, RowError
from qmemtune.data.render import Renderer
from qmemtune.data.report import DataReport, PartReport
from qmemtune.data.rows import RowBuilder, TokenRows

CHUNK = 1024
"""Rows handed to the tokenizer at once."""


class CutOff(RowError):
    """Nothing in the loss is left before data.max_length."""


def tokenize(
    examples: Sequence[Example],
    renderer: Renderer,
    config: DataConfig,
    part: PartReport,
    report: DataReport,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[TokenRows, list[Rejected]]:
    """Tokenise examples, cut them at ``config.max_length`` and count into ``part``.

    Args:
        progress: called with the number of examples done so far.

    Returns:
        the rows, and the examples that gave none, with the reason.
    """
    builder, rejected = RowBuilder(), []
    for start in range(0, len(examples), CHUNK):
        rendered: list[tuple[Example, list[list[Segment]]]] = []
        for example in examples[start : start + CHUNK]:
            try:
                parts = renderer.training_rows(example)
            except RowError as error:
                rejected.append(example.raw.rejected(error))
                continue
            report.split_conversations += len(parts) > 1
            rendered.append((example, parts))
        encoded = iter(renderer.encoder.encode([segments for _, parts in rendered for segments in parts]))
        for example, parts in rendered:
            errors: list[RowError] = []
            for segments in parts:
                ids = next(encoded)
                try:
                    if renderer.form == "text":
                        add_text(builder, example, ids[0], renderer, config, part)
                    else:
                        add_row(builder, example, segments, ids, renderer, config, part)
                except RowError as error:
                    errors.append(error)
            unusable = [error for error in errors if not isinstance(error, CutOff)]
            if unusable or len(errors) == len(parts):
                rejected.append(example.raw.rejected([*unusable, *errors][0]))
            else:
                # Of a conversation that became a row an answer, later answers are cut like the end of a whole one.
                part.truncated += len(errors)
        progress(min(start + CHUNK, len(examples)))
    return builder.rows(), rejected


def add_row(
    rows: RowBuilder,
    example: Example,
    segments: Sequence[Segment],
    ids: Sequence[Sequence[int]],
    renderer: Renderer,
    config: DataConfig,
    part: PartReport,
) -> None:
    """Join the segments' tokens, find what is in the loss, and add the row.

    Raises:
        RowError: no token of the loss is left, or there is no prompt to generate from.
    """
    tokens = [] if renderer.chat is not None else list(renderer.encoder.bos_ids)
    prompt_length = 0
    spans: list[tuple[int, int]] = []
    for segment, segment_ids in zip(segments, ids, strict=True):
        prompt_length = len(tokens)
        tokens.extend(segment_ids)
        if segment.loss or config.loss_on == "all":
            spans.append((prompt_length, len(tokens)))
    total, length = len(tokens), min(len(tokens), config.max_length)
    if prompt_length == 0:
        raise RowError("the prompt has no tokens, so nothing could be generated from it")
    # A token is predicted from those before it: the first one is never in the loss.
    spans = [(max(start, 1), min(end, length)) for start, end in spans if max(start, 1) < min(end, length)]
    if not spans:
        if total > length:
            raise CutOff(
                "all loss tokens are cut off by data.max_length",
                f"the prompt has {prompt_length} tokens, data.max_length is {config.max_length}",
            )
        raise RowError("the completion has no tokens")
    if total > length:
        part.truncated += 1
        part.cut_tokens += total - length
    rows.append(
        tokens[: max(length, prompt_length)],
        length,
        prompt_length,
        spans,
        instruction=example.instruction,
        answer=reference(example, segments[-1], ids[-1], renderer),
        group=example.group,
        origin=example.raw.origin,
    )


def reference(example: Example, segment: Segment, ids: Sequence[int], renderer: Renderer) -> str:
    """The answer of a row, as the model would generate it.

    A chat template may dress an answer (with an empty thought, or a tool call's own form), and of a conversation that
    became several rows each has another: then it is what the row's own tokens say.
    """
    answer = example.answer
    if renderer.chat is None:
        return answer
    text = "".join(segment.pieces).strip()
    rest = text.removeprefix(answer.strip()).strip()
    plain = text.startswith(answer.strip()) and (not rest or rest in renderer.encoder.special_names)
    return answer if plain else decoded(renderer.encoder.tokenizer, ids)


def add_text(
    rows: RowBuilder, example: Example, ids: Sequence[int], renderer: Renderer, config: DataConfig, part: PartReport
) -> None:
    """Add a plain text: all of it in the loss, in as many rows as it takes.

    Raises:
        RowError: it has fewer than two tokens, so none is predicted.
    """
    tokens = [*renderer.encoder.bos_ids, *ids]
    if len(tokens) < 2:
        raise RowError("the text has too few tokens", f"{len(tokens)}")
    size = max(config.max_length, 2)
    pieces = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    if len(pieces[-1]) == 1:
        # The first token of a row is never predicted: a rest of one would be no row.
        pieces.pop()
    part.continued += len(pieces) - 1
    for piece in pieces:
        rows.append(
            piece,
            len(piece),
            max(1, min(len(renderer.encoder.bos_ids), len(piece) - 1)),
            [(1, len(piece))],
            instruction=example.instruction,
            answer=example.answer,
            group=example.group,
            origin=example.raw.origin,
        )
