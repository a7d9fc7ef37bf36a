"""Access tokens: found in texts, so that none is written anywhere."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

HIDDEN = "***"
SHORTEST = 8
"""Characters of the shortest value of a variable that is taken for a token: shorter ones are in ordinary words."""
_NAMES = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD|ACCESS_?KEY)$", re.I)
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bgh[opsu]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}"  # GitHub
    r"|\bwandb_v1_[A-Za-z0-9_]{20,}"  # Weights & Biases
    # OpenAI and others, GitLab: 16 letters and digits in a row, some of each kind, as no file's name has them.
    r"|\b(?:sk|glpat)-(?:[a-z0-9]+-)*(?=[\w-]*[A-Z])(?=[\w-]*[0-9])(?=[\w-]*[A-Za-z0-9]{16})[\w-]{20,}"
    r"|\bAKIA[A-Z0-9]{16}\b"  # Amazon
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)",  # user:password@ in an address
)


def hide(text: str) -> str:
    """The text with every token replaced by asterisks."""
    for token in planted():
        text = text.replace(token, HIDDEN)
    return _SHAPES.sub(HIDDEN, text)


def holds_token(text: str) -> bool:
    """Whether a text holds an access token."""
    return hide(text) != text


def planted() -> Iterator[str]:
    """Values of the environment's variables that are named like tokens, longest first."""
    values = {value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= SHORTEST}
    return iter(sorted(values, key=len, reverse=True))
