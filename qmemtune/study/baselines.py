"""PEFT's other methods, as variants that a study runs beside LoRA and the memory."""

from __future__ import annotations

from collections.abc import Mapping

from qmemtune.study.design import Match, Variant


def peft_methods(
    vector_length: int,
    *,
    match_dora: bool = False,
    largest_rank: int = Match.largest,
    learning_rates: Mapping[str, float] | None = None,
) -> tuple[Variant, ...]:
    """DoRA, VeRA, VB-LoRA and Lily; those that are matched have at most the parameters of the variant ``lora``.

    Args:
        vector_length: of VB-LoRA's vectors; divides the widths of all adapted layers.
        match_dora: take DoRA's rank from LoRA's parameters too; else it has LoRA's rank, and its magnitudes on top.
        largest_rank: no rank above this is tried in matching.
        learning_rates: by method, of those that do not take the study's own.
    """
    rank = Match("adapter.r", "at_most", "lora", largest_rank)
    rates = learning_rates or {}

    def variant(method: str, options: tuple[str, ...], about: str, match: Match | None) -> Variant:
        rate = (f"optimizer.learning_rate={rates[method]}",) if method in rates else ()
        return Variant(method, ("adapter=peft", f"adapter.method={method}", *options, *rate), about, match)

    return (
        variant("dora", (), "DoRA", rank if match_dora else None),
        variant(
            "vera",
            ("adapter.options={r: 256, d_initial: 0.1}",),
            "VeRA of rank 256; its trained vectors are fewer",
            None,
        ),
        variant(
            "vblora",
            (f"adapter.options={{vector_length: {vector_length}}}",),
            "VB-LoRA with as many vectors as LoRA's parameters allow",
            Match("adapter.options.num_vectors", "at_most", "lora"),
        ),
        variant("lily", (), "Lily of the largest rank within LoRA's parameters", rank),
    )
