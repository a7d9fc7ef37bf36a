"""What the processes of a run must agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from qmemtune.errors import UserError

Result = TypeVar("Result")


def from_first(function: Callable[[], Result], args: TrainingArguments) -> Result:
    """Call ``function`` in the first process only and give its result, or its error, to all.

    Raises:
        UserError: what ``function`` raised, in every process, so that none waits for another that has gone.
    """
    if args.world_size == 1:
        return function()
    box: list[object] = [None, None]
    if args.process_index == 0:
        try:
            box[0] = function()
        except UserError as error:
            box[1] = error
    broadcast_object_list(box)
    if isinstance(box[1], UserError):
        raise box[1]
    return box[0]  # type: ignore[return-value]
