"""Conversations through the tokenizer's chat template, with the assistant's turns found exactly.

A turn is found by rendering: the conversation before it with the generation prompt, and the conversation up to its
end. Both must be beginnings of the whole rendering. Where a template writes earlier turns differently once later ones
follow (some drop reasoning), each assistant turn becomes a row of its own, rendered as the model will see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jinja2

from qmemtune.data.conversations import THOUGHTS, Message
from qmemtune.data.encode import Encoder, Segment, special_names
from qmemtune.data.records import RowError
from qmemtune.errors import UserError

Span = tuple[int, int]
TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
"""What a template raises by itself or by what it does with a conversation it was not written for."""
NOT_A_PREFIX = "the chat template renders an answer differently from the prompt that asks for it"


class ChatRenderer:
    """Renders conversations to segments.

    Args:
        tokenizer: a tokenizer with a chat template.
        encoder: its encoder.

    Raises:
        UserError: there is no chat template, or no answer can be masked safely with it.
    """

    def __init__(self, tokenizer: Any, encoder: Encoder) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "the tokenizer has no chat template, and the rows are to be rendered as a chat",
                where="data.chat",
                fix="use an instruction-tuned model, give a Jinja file with model.chat_template=FILE, "
                "or use prompt/completion rows with data.chat=never",
            )
        self.tokenizer = tokenizer
        self.encoder = encoder
        self._tools: list[Any] | None = None
        self.ends_turns = self._probe()
        """Whether the template ends an answer with a special token, so that generation can stop there."""
        self.incomplete = 0
        """Conversations rendered so far of which the template leaves out or changes a text."""

    def text(self, conversation: Sequence[Message], generation_prompt: bool = False) -> str:
        """The rendered conversation.

        Raises:
            RowError: the template refuses the conversation.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(conversation),
                tools=self._tools,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except TEMPLATE_FAULTS as error:
            raise RowError("the chat template refuses the conversation", str(error)) from error
        return text

    def _probe(self) -> bool:
        """Check the template on the simplest conversation."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        where = "the tokenizer's chat template"
        fix = "give a Jinja file with model.chat_template=FILE whose answers begin with its generation prompt"
        try:
            before, whole = self.text([question], generation_prompt=True), self.text([question, answer])
        except RowError as error:
            raise UserError(f"it fails on a plain question and answer: {error.detail}", where=where, fix=fix) from error
        if not whole.startswith(before):
            raise UserError(
                "answers cannot be masked safely: the prompt for an answer is not the beginning of the answered "
                f"conversation (prompt ends {before[-40:]!r}, conversation {whole[-60:]!r})",
                where=where,
                fix=fix,
            )
        turn = whole[len(before) :]
        if "answer" not in turn:
            raise UserError("it leaves out the assistant's answer", where=where, fix=fix)
        return self.encoder.ends_with_special(turn.rstrip())

    def _turn(self, conversation: Sequence[Message], index: int) -> tuple[str, Span]:
        """The rendering up to the end of message ``index``, and where that message's answer lies in it."""
        before = self.text(conversation[:index], generation_prompt=True)
        after = self.text(conversation[: index + 1])
        if not after.startswith(before):
            raise RowError(NOT_A_PREFIX)
        # What follows the closing token (a line feed in ChatML) belongs to what comes next: generation stops before it.
        closed = after.rstrip()
        end = len(closed) if len(closed) > len(before) and self.encoder.ends_with_special(closed) else len(after)
        return after, (len(before), end)

    def _spans(self, conversation: Sequence[Message], whole: str, indices: Sequence[int]) -> list[Span] | None:
        """Where the answers lie in ``whole``; None if it does not begin with every turn's own rendering."""
        spans = []
        for index in indices:
            after, span = self._turn(conversation, index)
            if not whole.startswith(after):
                return None
            spans.append(span)
        return spans

    def training_rows(
        self,
        conversation: Sequence[Message],
        muted: frozenset[int],
        *,
        tools: Sequence[Any] = (),
        last_turn: bool = False,
    ) -> list[list[Segment]]:
        """One row of segments, or one for each answer if the template rewrites earlier turns.

        In each the last segment is the last answer; all before it are its prompt.

        Args:
            muted: indices of answers that are not in the loss.
            tools: functions on offer.
            last_turn: leave all answers but the last out of the loss.

        Raises:
            RowError: the template refuses the conversation, or an answer cannot be found in its rendering.
        """
        marked, mark = self._marked(conversation, tools)
        answers = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
        if last_turn:
            muted = muted | set(answers[:-1])
        if muted.issuperset(answers):
            raise RowError("every assistant message in the loss has weight 0")
        whole, last = self._turn(marked, answers[-1])
        self._check_whole(marked, whole, mark)
        spans = self._spans(marked, whole, answers[:-1])
        if spans is not None:
            spans.append(last)
        if spans is not None:
            for i, (start, end) in zip(answers, spans, strict=True):
                check_calls(marked[i], whole[start:end])
            losses = [i not in muted for i in answers]
            return [self._segments(whole[: spans[-1][1]], spans, losses, mark)]
        rows = []
        for index in answers:
            if index not in muted:
                after, span = self._turn(marked, index)
                check_calls(marked[index], after[span[0] :])
                history = self._history(marked[:index], self.text(marked[:index], generation_prompt=True))
                rows.append(self._segments(after[: span[1]], [*history, span], [False] * len(history) + [True], mark))
        return rows

    def prompt(self, conversation: Sequence[Message], tools: Sequence[Any] = ()) -> list[Segment]:
        """Segments of a conversation that the model is to answer: the same as a training row's before its answer."""
        marked, mark = self._marked(conversation, tools)
        whole = self.text(marked, generation_prompt=True)
        spans = self._history(marked, whole)
        return self._segments(whole, spans, [False] * len(spans), mark)

    def _history(self, conversation: Sequence[Message], whole: str) -> list[Span]:
        answers = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
        return self._spans(conversation, whole, answers) or []

    def _marked(self, conversation: Sequence[Message], tools: Sequence[Any]) -> tuple[list[Message], str]:
        """The conversation with a mark inside every special token's name in its texts, and the mark."""
        mark = self.encoder.free_mark(texts_in([conversation, tools]))

        def marked(value: Any) -> Any:
            if isinstance(value, str):
                return mark.join(self.encoder.protected(value))
            if isinstance(value, dict):
                return {marked(key): marked(part) for key, part in value.items()}
            return [marked(part) for part in value] if isinstance(value, list | tuple) else value

        self._tools = [marked(tool) for tool in tools] or None
        # A role is one of a few words, and the template compares it.
        return [{k: v if k in ("role", "type") else marked(v) for k, v in m.items()} for m in conversation], mark

    def _check_whole(self, conversation: Sequence[Message], whole: str, mark: str) -> None:
        """Refuse what would lose tools or let text become a control token; count texts that are not there."""
        if mark.encode("ascii", "backslashreplace").decode() in whole:
            raise RowError("the chat template escapes text in a way that special tokens cannot be kept out of")
        for tool in self._tools or ():
            name = tool.get("function", tool).get("name") if isinstance(tool.get("function", tool), dict) else None
            if isinstance(name, str) and name not in whole:
                raise RowError("the chat template leaves out the tools on offer", name)
        texts = [message["content"] for message in conversation]
        # What was thought before earlier answers is left out by many templates, on purpose.
        texts += [conversation[-1].get(key, "") for key in THOUGHTS]
        self.incomplete += any(text.strip() not in whole for text in texts)

    @staticmethod
    def _segments(text: str, spans: Sequence[Span], losses: Sequence[bool], mark: str) -> list[Segment]:
        segments, end = [], 0
        for (start, stop), loss in zip(spans, losses, strict=True):
            segments.append(Segment(tuple(text[end:start].split(mark)), False))
            segments.append(Segment(tuple(text[start:stop].split(mark)), loss))
            end = stop
        if end < len(text):
            segments.append(Segment(tuple(text[end:].split(mark)), False))
        return segments


def turn_end(tokenizer: Any) -> int | None:
    """The special token with which the tokenizer's chat template ends an answer; None where there is none.

    A base model's end of text is often another token, so that generation would run past the turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text: str = tokenizer.apply_chat_template(conversation, tokenize=False).rstrip()
    except TEMPLATE_FAULTS:
        return None
    names = [name for name in special_names(tokenizer) if text.endswith(name)]
    return int(tokenizer.convert_tokens_to_ids(max(names, key=len))) if names else None


def check_calls(message: Message, turn: str) -> None:
    """Raise RowError if the rendering of an answer lacks a tool that it calls."""
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in turn:
            raise RowError("the chat template leaves out tool calls", call["function"]["name"])


def texts_in(value: Any) -> Iterator[str]:
    """Every text in nested lists and objects, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from texts_in(key)
            yield from texts_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts_in(part)
