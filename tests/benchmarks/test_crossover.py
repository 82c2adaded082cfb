"""The planner's change from token space to weight space, and how it is measured."""

import pytest

from benchmarks import crossover
from randlora.ops.bases import Dense
from randlora.ops.plan import choose


@pytest.fixture(params=[(96, 64), (64, 96), (64, 64)], ids=str)
def layer(request):
    return crossover.Layer(*request.param, kind=Dense())


def test_the_planned_crossover_is_where_the_planner_changes(layer):
    found = crossover.planned_crossover(layer.problem, "forward")
    assert choose(layer.problem(found)).output == "fused"
    assert choose(layer.problem(found - 1)).output == "token"


def test_the_measured_crossover_is_where_the_times_are_equal(layer, monkeypatch):
    monkeypatch.setattr(crossover, "measured_ratio", lambda _layer, _direction, tokens, _rounds: (tokens / 100) ** 0.5)
    planned = crossover.planned_crossover(layer.problem, "backward")
    row = crossover.compare(layer, "backward", planned, rounds=1)
    assert row["measured tokens"] == 100
    assert row["planned / measured"] == pytest.approx(row["planned tokens"] / 100)
    assert 1 + row["off by"] == pytest.approx(max(row["planned / measured"], 1 / row["planned / measured"]) ** 0.5)


@pytest.mark.parametrize("direction", crossover.COSTS)
def test_a_ratio_is_measured(layer, direction):
    assert crossover.measured_ratio(layer, direction, tokens=5, rounds=2) > 0


def test_where_weight_space_never_pays_there_is_none(layer, monkeypatch):
    monkeypatch.setitem(crossover.COSTS, "forward", (lambda problem: 1.0, lambda problem: 2.0))
    assert crossover.planned_crossover(layer.problem, "forward") is None
