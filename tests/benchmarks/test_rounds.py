import pytest
from benchmarks.rounds import added_ratio, interleave, ratio, typical

# A disturbance that slows a whole round down, and one that falls on a single action.
HISTORY = [
    {"frozen": 1.0, "peer": 3.0, "ours": 2.0},
    {"frozen": 2.0, "peer": 6.0, "ours": 4.0},
    {"frozen": 1.0, "peer": 3.0, "ours": 90.0},
]


def test_actions_run_in_turn_in_each_round():
    calls: list[str] = []
    history = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b", "a", "b"]
    assert [set(times) for times in history] == [{"a", "b"}] * 2
    assert all(seconds >= 0 for times in history for seconds in times.values())


def test_ratios_are_of_the_same_round_and_medians_over_rounds():
    assert ratio(HISTORY, "ours", "frozen") == 2.0
    assert ratio(HISTORY, "peer", "frozen") == 3.0
    assert ratio(HISTORY, "ours", "peer") == pytest.approx(2 / 3)
    assert typical(HISTORY, "frozen") == 1.0


def test_the_added_ratio_is_that_beyond_the_frozen_step():
    assert added_ratio(HISTORY, "ours", "peer", "frozen") == 0.5
