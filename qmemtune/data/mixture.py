"""Several sets of training rows, mixed by weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np

from qmemtune.config.data import DataConfig, SourceConfig
from qmemtune.data.rows import TokenRows, joined_rows
from qmemtune.errors import Finding, UserError

OWN_KEY = re.compile(rf"\bdata\.({'|'.join(field.name for field in fields(SourceConfig))})\b")
"""An option that each set of a mixture may have for itself."""


def source_configs(config: DataConfig) -> dict[str, DataConfig]:
    """The data options of each set, by name; one set named "" where ``data.path`` gives the rows."""
    if not config.sources:
        return {"": config}
    configs = {}
    for name, source in config.sources.items():
        given = {key: value for key, value in vars(source).items() if key != "weight" and value not in (None, {})}
        configs[name] = replace(config, sources={}, **({"name": None} | given))
    return configs


def with_keys_of(name: str, text: str) -> str:
    """A text with the options of the set of that name where it speaks of those in data; "" is the only set."""
    return OWN_KEY.sub(lambda key: f"data.sources.{name}.{key[1]}", text) if name else text


@contextmanager
def keys_of(name: str) -> Iterator[None]:
    """Errors from within speak of the set's own options, which mend one set and leave the others alone."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        told = [
            Finding(finding.problem, *(text and with_keys_of(name, text) for text in (finding.where, finding.fix)))
            for finding in error.findings
        ]
        raise type(error).many(told) from error


def first_source(config: DataConfig) -> DataConfig:
    """The data options of the first set, as whose rows prompts from outside are rendered."""
    return next(iter(source_configs(config).values()))


def heldout_source(config: DataConfig) -> DataConfig | None:
    """The data options of held-out rows that are read apart, with their path and split; None where there are none."""
    if config.eval_path is not None:
        return replace(config, path=config.eval_path, split=config.eval_split or config.split, sources={})
    if config.eval_split is not None and not config.sources:
        return replace(config, split=config.eval_split)
    return None


def mixed(parts: Mapping[str, TokenRows], weights: Mapping[str, float], seed: int) -> TokenRows:
    """One pass over a mixture: each set's rows as often as its weight says.

    The sets are dealt out evenly, so that the beginning of the mixture is mixed like the whole. Which rows stand for a
    weight's fraction depends on ``seed`` and the set's name only.
    """
    orders: list[np.ndarray] = []
    places: list[np.ndarray] = []
    start = 0
    for name, rows in parts.items():
        order = start + repeated(len(rows), weights[name], [seed, *name.encode()])
        orders.append(order)
        places.append((np.arange(len(order)) + 0.5) / max(len(order), 1))
        start += len(rows)
    whole = joined_rows(list(parts.values()))
    return whole.select(np.concatenate(orders)[np.argsort(np.concatenate(places), kind="stable")])


def first_of_mixture(
    counts: Mapping[str, int], weights: Mapping[str, float], limit: int | None
) -> tuple[dict[str, int], dict[str, float]]:
    """How many rows of each set the first ``limit`` of a mixture are made of, and with which weights.

    Args:
        counts: rows of each set.
        weights: of each set, 1 or more.
        limit: rows of the mixture; None for all of it.

    Returns:
        rows of each set, the first ones, and weights with which they make up its share: a set that is not used up has
        no row twice. Together up to one row a set more than the limit.
    """
    whole = {name: count * weights[name] for name, count in counts.items()}
    total = sum(whole.values())
    if limit is None or total <= limit:
        return dict(counts), dict(weights)
    shares = {name: min(math.ceil(limit * rows / total), math.ceil(rows)) for name, rows in whole.items()}
    kept = {name: min(shares[name], count) for name, count in counts.items()}
    return kept, {name: shares[name] / kept[name] if kept[name] else 1.0 for name in kept}


def repeated(count: int, weight: float, seed: Sequence[int]) -> np.ndarray:
    """Row numbers of one pass with that weight: all rows its whole part often, and a random choice for the rest."""
    times = math.floor(weight)
    rest = round((weight - times) * count)
    if count and not times:
        rest = max(rest, 1)
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:rest])
    return np.concatenate([*[np.arange(count)] * times, chosen])
