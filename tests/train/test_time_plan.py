"""What fits into the minutes that there are."""

import pytest

from randlora.analysis.counts import count_lora, count_trainable
from randlora.errors import ConfigError
from randlora.train.settings import load_settings
from randlora.train.time_plan import LEAST_SEEDS, MOST_SEEDS, Cost, Times, make_plan, measure_cost

FAST = Cost(trainable=10, whole_run=100, load=2.0, step=0.5, example=0.01)
SLOW = Cost(trainable=20, whole_run=100, load=4.0, step=1.0, example=0.02)


def times(*costs, start=5.0, selection=50, test=200):
    return Times(costs, start, selection, test)


def test_runs_and_searches_add_up():
    both = times(FAST, SLOW)
    assert both.run(FAST, 100) == 2 + 100 * 0.5 + 200 * 0.01
    assert both.round(100) == both.run(FAST, 100) + both.run(SLOW, 100)
    assert both.search(10) == 4 * ((2 + 10 * 0.5 + 2 * 50 * 0.01) + (4 + 10 + 2 * 50 * 0.02))
    assert both.of(SLOW).round(10) == both.run(SLOW, 10)


@pytest.mark.parametrize("minutes", [8, 15, 30, 60, 600])
def test_a_plan_fits_into_its_time(minutes):
    plan = make_plan(times(FAST, SLOW), 60 * minutes)
    assert plan.seconds <= 60 * minutes
    assert plan.seconds == plan.search_seconds + 2 * 5 + plan.seeds * times(FAST, SLOW).round(plan.steps)
    assert LEAST_SEEDS <= plan.seeds <= MOST_SEEDS
    assert max(plan.steps / 4, 20) <= plan.search_steps <= plan.steps <= 100


def test_more_time_gives_longer_runs_first_and_then_seeds_and_then_searches():
    plans = [make_plan(times(FAST, SLOW), 60 * minutes) for minutes in range(8, 60)]
    assert [p.steps for p in plans] == sorted(p.steps for p in plans)
    assert all(p.seeds == LEAST_SEEDS for p in plans if p.steps < 90)
    assert (plans[-1].steps, plans[-1].seeds, plans[-1].search_steps) == (100, MOST_SEEDS, 100)


def test_the_plan_says_which_time_would_shorten_nothing():
    short = make_plan(times(FAST, SLOW), 60 * 10)
    assert short.steps < short.whole_run == 100
    assert make_plan(times(FAST, SLOW), 60 * short.minutes_for_whole).steps == 100
    assert make_plan(times(FAST, SLOW), 60 * (short.minutes_for_whole - 1)).steps < 100


def test_too_short_a_time_is_refused_with_the_one_that_is_needed():
    with pytest.raises(ConfigError, match=r"1\.0 are left.*3 seeds of 20 steps of 2 methods take (\d+\.\d)") as caught:
        make_plan(times(FAST, SLOW), 60)
    needed = float(str(caught.value).partition("methods take ")[2].split(". ")[0])
    assert make_plan(times(FAST, SLOW), 60 * (needed + 0.1)).steps >= 20


def test_a_run_of_few_steps_is_not_made_longer():
    one = Cost(trainable=1, whole_run=3, load=0.0, step=1.0, example=0.0)
    assert make_plan(times(one), 600).steps == 3


def test_costs_are_measured_and_ranks_match(tmp_path, tiny_bert, reviews):
    values = {"model": tiny_bert, "data": reviews, "max_length": 16, "batch_size": 16, "epochs": 2}
    cost = measure_cost(load_settings(None, {**values, "r": 8}))
    assert min(cost.load, cost.step, cost.example) > 0
    assert cost.whole_run == 2 * 8  # 120 sentences by 16
    shapes = [(32, 32)] * 8 + [(32, 48), (48, 32)] * 2 + [(32, 32)]  # the pooler too
    ours = count_trainable(shapes, 8)
    off = {rank: abs(count_lora(shapes, rank) - ours) for rank in range(1, 9)}
    assert cost.lora_rank == min(off, key=off.get)
    assert cost.trainable == ours + 66  # the head
    assert measure_cost(load_settings(None, {**values, "method": "head"})).lora_rank is None
