"""What Trainer asks of the whole model in every step, answered without a walk over its modules.

An adapted model has thousands of modules, and Python takes some milliseconds for a walk over them: four a step, in
which a GPU waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from qmemtune.engine.replacing import replaced


@contextmanager
def without_walks(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """While open, ``train`` returns at once where the model is in training, and ``zero_grad`` looks at what is trained.

    What is trained, and in which mode submodules are while the model is in training, must not change meanwhile.

    Args:
        model: in training.
        trained: all of its parameters that have gradients.
    """

    def train(mode: bool = True) -> nn.Module:
        return model if mode and model.training else type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad.zero_()

    with replaced(model, train=train, zero_grad=zero_grad):
        yield
