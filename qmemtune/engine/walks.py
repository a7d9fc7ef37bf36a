"""What Trainer asks of the whole model in every step, answered without a walk over its modules.

An adapted model has thousands of modules, and Python takes some milliseconds for a walk over them: four a step, in
which a GPU waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_walks(model: nn.Module) -> Iterator[None]:
    """While open, ``train`` returns at once where the model is in training, and ``zero_grad`` looks at what is trained.

    What is trained, and in which mode submodules are while the model is in training, must not change meanwhile.

    Args:
        model: in training.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

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


@contextmanager
def replaced(model: nn.Module, **methods: Any) -> Iterator[None]:
    """Give one module other methods of these names while the block runs."""
    for name, method in methods.items():
        model.__dict__[name] = method
    try:
        yield
    finally:
        for name in methods:
            del model.__dict__[name]
