"""Walks over a model that a step does without: what they did is done all the same."""

from __future__ import annotations

import torch
from torch import nn

from qmemtune.engine.replacing import replaced
from qmemtune.engine.walks import without_walks


def test_training_mode_and_gradients() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with without_walks(model, list(model[2].parameters())):
        model(torch.ones(1, 2)).sum().backward()
        assert model[2].weight.grad is not None
        model.zero_grad(set_to_none=False)
        assert torch.equal(model[2].weight.grad, torch.zeros(2, 2))
        model.zero_grad()
        assert model[2].weight.grad is None
        assert not model.eval().training
        assert not model[1].training
        assert model.train().training
        assert model[1].training
        # In training already: its parts are not looked at.
        model[1].eval()
        assert model.train() is model
        assert not model[1].training
    assert model.train()[1].training
    assert "train" not in model.__dict__
    assert "zero_grad" not in model.__dict__


def test_methods_come_back_behind_an_error() -> None:
    model = nn.Linear(2, 2)
    try:
        with replaced(model, parameters=lambda recurse=True: iter([])):
            assert list(model.parameters()) == []
            raise RuntimeError
    except RuntimeError:
        pass
    assert len(list(model.parameters())) == 2
