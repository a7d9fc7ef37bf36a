"""Which token each position predicts. Letters: B rows, T tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qmemtune.data.rows import IGNORED


def shifted_targets(labels: Tensor) -> Tensor:
    """Labels (B, T) one place to the left: position t holds the token to be predicted there, the last none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def count_targets(labels: Tensor) -> Tensor:
    """Positions in the loss: labels (B, T) that are not ignored, the first of a row left out. Scalar int64."""
    return (labels[:, 1:] != IGNORED).sum()
