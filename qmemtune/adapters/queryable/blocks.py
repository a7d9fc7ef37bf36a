"""Which layers share a route: contiguous blocks of decoder layers."""

from __future__ import annotations

from torch import nn


def layer_group(name: str) -> str:
    """The decoder layer a module belongs to: its dotted path up to the first number.

    A module with no number in its path (a linear layer of a plain MLP) is a group of its own.
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return name


class BlockPlan:
    """Numbers the blocks as layers are adapted, in module order.

    Args:
        block_size: decoder layers that share one route.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.groups: dict[str, int] = {}

    def block_of(self, name: str) -> int:
        """The block of the module ``name``."""
        group = layer_group(name)
        if group not in self.groups:
            self.groups[group] = len(self.groups)
        return self.groups[group] // self.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks so far."""
        return -(-len(self.groups) // self.block_size)


def refuse_unroutable(name: str, module: nn.Module, model: nn.Module) -> None:
    """Refuse modules in which one route a token makes no sense.

    Args:
        name: dotted path of the module.
        module: the target.
        model: the whole base model.

    Raises:
        ValueError: with the reason and the way out.
    """
    way_out = "leave it out with exclude_modules, or use LoRA"
    lowered = name.lower()
    if any(part in lowered.split(".") for part in ("experts", "expert")) or any(
        p.dim() == 3 for p in module.parameters(recurse=False)
    ):
        raise ValueError(
            f"{name} is an expert of a mixture: it sees a part of the tokens in another order, "
            f"so a route formed for the sequence does not fit: {way_out}"
        )
    cross = ("crossattention", "cross_attn", "cross_attention", "encoder_attn", "encdecattention")
    if any(word in lowered for word in cross):
        raise ValueError(
            f"{name} is cross-attention: its keys and values come from another sequence than its queries, "
            f"so there is no one route a token: {way_out}"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: its layers see two sequences, and a route belongs to a "
            "token of one: use LoRA for this model"
        )
