"""Freed memory goes back to the system."""

from __future__ import annotations

import pytest

from qmemtune.models import heap


def test_asked_for_where_the_allocator_can_and_passed_over_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    heap.return_freed_memory()
    asked: list[int] = []
    monkeypatch.setattr(heap, "_malloc_trim", lambda: asked.append)
    heap.return_freed_memory()
    assert asked == [0]
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    heap.return_freed_memory()
