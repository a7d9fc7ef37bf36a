"""Statistics of the router during training, and the word about one that collapses."""

from __future__ import annotations

import pytest
import torch

from qmemtune.adapters.queryable.statistics import RouteStatistics, RouteUse
from qmemtune.engine.run import train

# A router learning rate far too high drives the keys to where one atom wins every token.
COLLAPSING = (
    "adapter.router_norm=false", "adapter.memory_learning_rate_multiplier=1000", "optimizer.warmup_steps=0",
    "trainer.max_steps=6",
)  # fmt: skip


def routes_of(lines):
    return [line for line in lines if line["event"] == "routes"]


def test_a_collapsed_router_is_named_once_with_its_remedy(composed, recorder, read_lines, tmp_path):
    progress = recorder()
    summary = train(composed(*COLLAPSING, "trainer.route_stats_steps=1", adapter="queryable"), progress=progress)
    said = [message for message in progress.messages if "collapsed" in message]
    assert len(said) == 1
    assert "atoms" in said[0]
    assert "set adapter.router_norm=true" in said[0]
    assert "lower adapter.memory_learning_rate_multiplier (now 1000)" in said[0]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    warnings = [line for line in lines if line["event"] == "warning"]
    assert [line["step"] for line in warnings] == [summary["router_collapsed_at_step"]]


def test_generated_cores_have_no_routes_to_watch(composed, recorder, read_lines, tmp_path):
    progress = recorder()
    options = ("adapter.generated_core=true", "trainer.route_stats_steps=1")
    summary = train(composed(*options, adapter="queryable"), progress=progress)
    assert not [message for message in progress.messages if "collapsed" in message]
    assert routes_of(read_lines(tmp_path / "run" / "metrics.jsonl")) == []
    assert summary["router_collapsed_at_step"] is None


def test_a_healthy_router_is_logged_at_its_interval_and_not_named(composed, recorder, read_lines, tmp_path):
    progress = recorder()
    summary = train(composed("trainer.route_stats_steps=2", adapter="queryable"), progress=progress)
    lines = routes_of(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert len(line["use"]) == len(line["entropy"]) == 2
        for block, effective in zip(line["use"], line["effective_atoms"], strict=True):
            assert sum(block) == pytest.approx(1, abs=1e-3)
            assert 1 <= effective <= 4.001
    assert summary["router_collapsed_at_step"] is None
    assert not any("collapsed" in message for message in progress.messages)


def test_statistics_change_no_weight(composed, adapter_bytes, tmp_path):
    for run, interval in (("with", "1"), ("without", "null")):
        train(composed(f"trainer.route_stats_steps={interval}", adapter="queryable", run=run))
    assert adapter_bytes(tmp_path / "with" / "adapter") == adapter_bytes(tmp_path / "without" / "adapter")


def test_statistics_reach_the_logging_back_ends_of_each_run(composed, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for run in ("before", "run"):
        options = ("trainer.route_stats_steps=2", "trainer.max_steps=2", "tracking.backends=[tensorboard]")
        train(composed(*options, adapter="queryable", run=run))
    folder = next((tmp_path / "run" / "tracking").rglob("events.*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/router_entropy", "train/router_dead_atoms"} <= set(events.Tags()["scalars"])


def test_padding_does_not_count():
    weights = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    statistics = RouteStatistics("default")
    statistics("default", 0, weights, torch.tensor([[1, 0]]))
    statistics("other", 0, weights, None)
    use = statistics.use(statistics.table(torch.device("cpu")))
    assert use == RouteUse(use=[[1.0, 0.0]], entropy=[0.0], tokens=1)


@pytest.mark.parametrize(
    ("use", "collapsed"),
    [
        ([[0.97, 0.01, 0.01, 0.01]], True),
        ([[0.25, 0.25, 0.25, 0.25]], False),
        ([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]], False),
        ([[0.5, 0.5, 0.0, 0.0]], False),
        ([[0.6, 0.4, 0, 0, 0, 0, 0, 0]], True),
        ([[1.0]], False),
    ],
)
def test_what_counts_as_collapsed(use, collapsed):
    assert (RouteUse(use, [0.5] * len(use), 10).collapse() is not None) == collapsed


def test_hard_routes_have_collapsed_unless_one_atom_a_token_is_wanted():
    use = RouteUse([[0.3, 0.3, 0.2, 0.2]], [0.001], 10)
    assert "entropy near zero" in str(use.collapse())
    assert use.collapse(top_k=1) is None
