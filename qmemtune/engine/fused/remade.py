"""Inputs of linear layers that are made again in the backward pass instead of being kept for it.

What a normalisation or a gated unit hands on is an elementwise function of tensors that it keeps itself. The adapted
layers behind it need it once more, for the gradient of their low-rank factor: they keep the same tensors as well, which
takes nothing, and make it again, once for all layers at one input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

MARK = "_qmemtune_remade"
"""Attribute of a tensor that can be made again."""


class Remade:
    """How one tensor is made again.

    Args:
        make: from the tensors that are kept, the tensor, and what comes about on the way there, if anything, and
            :meth:`by_product` may use.
    """

    def __init__(self, make: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
        self._make = make
        self._waiting = 0
        self._value: Tensor | None = None
        self._by_product: Tensor | None = None

    def expect(self) -> None:
        """One more layer will :meth:`take` it."""
        self._waiting += 1

    def take(self, *kept: Tensor) -> Tensor:
        """The tensor, made by the first layer that needs it and held until the last one had it."""
        value = self._value
        if value is None:
            value, self._by_product = self._make(*kept)
        self._waiting -= 1
        # A second backward pass through one graph finds none waiting, and makes it for each layer.
        self._value = value if self._waiting > 0 else None
        return value

    def by_product(self) -> Tensor | None:
        """What came about on the way, for one who may change it; None where nothing was made."""
        found, self._by_product, self._value = self._by_product, None, None
        return found


def mark(tensor: Tensor, remade: Remade, *kept: Tensor) -> Tensor:
    """``tensor``, from now on known to be made of ``kept``."""
    setattr(tensor, MARK, (remade, kept, tensor._version))
    return tensor


def marked(tensor: Tensor) -> tuple[Remade | None, tuple[Tensor, ...]]:
    """How a tensor is made again and of what; of itself where that is not known, or where it was changed since."""
    found: tuple[Any, ...] | None = getattr(tensor, MARK, None)
    if found is None or found[2] != tensor._version:
        return None, ()
    return found[0], found[1]
