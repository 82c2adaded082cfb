"""Intervals over seeds and examples."""

import numpy as np
import pytest

from randlora.report.statistics import crossed_interval, t_quantile, wilson_interval


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (5, 2.571), (30, 2.042), (1e9, 1.960)]
)  # of printed tables
def test_quantiles_of_student_s_t(freedom, expected):
    assert t_quantile(0.95, freedom) == pytest.approx(expected, abs=1e-3)


def test_one_seed_is_a_mean_of_examples():
    values = np.random.default_rng(0).normal(size=(1, 31))
    found = crossed_interval(values, np.ones(31))
    spread = 2.0423 * values.std(ddof=1) / np.sqrt(31)  # t of 30 degrees of freedom
    assert (found.mean, found.high - found.mean) == pytest.approx((values.mean(), spread), rel=1e-4)


def test_seeds_that_differ_widen_the_interval():
    draw = np.random.default_rng(0)
    alike = draw.normal(size=(3, 200))
    apart = alike + np.array([[-0.5], [0.0], [0.5]])
    narrow, wide = (crossed_interval(values, np.ones(200)) for values in (alike, apart))
    assert wide.mean == pytest.approx(narrow.mean)
    # three seeds at -0.5, 0 and 0.5: their mean has a standard error of 0.29, and t of two degrees of freedom is 4.3
    assert wide.high - wide.mean == pytest.approx(4.303 * 0.5 / np.sqrt(3), rel=0.1)
    assert narrow.high - narrow.mean < 0.2


def test_seeds_that_differ_by_chance_only_add_nothing():
    """Shares that the seeds repeat exactly are as unsure as the examples are."""
    values = np.repeat((np.arange(200) % 4 > 0)[None].astype(float), 3, axis=0)
    once, thrice = crossed_interval(values[:1], np.ones(200)), crossed_interval(values, np.ones(200))
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))


@pytest.mark.parametrize("seed_spread", [0.0, 0.2])
def test_nineteen_in_twenty_intervals_hold_the_truth(seed_spread):
    draw = np.random.default_rng(0)

    def shares(examples, seeds):
        return 1 / (1 + np.exp(-(1.5 + examples + seed_spread * seeds[:, None])))

    truth = shares(draw.normal(size=2000), draw.normal(size=2000)).mean()
    held = []
    for _ in range(200):
        chances = shares(draw.normal(size=200), draw.normal(size=4))
        found = crossed_interval((draw.random(chances.shape) < chances).astype(float), np.ones(200), is_share=True)
        held.append(found.low <= truth <= found.high)
    assert 0.90 <= np.mean(held) <= 0.99


def test_examples_count_what_they_weigh():
    values, weights = np.array([[1.0, 0.0, 0.0]]), np.array([2.0, 1.0, 1.0])
    assert crossed_interval(values, weights).mean == 0.5
    doubled = crossed_interval(values, 2 * weights)
    assert doubled == crossed_interval(values, weights)


def test_all_right_is_not_certain():
    found = crossed_interval(np.ones((3, 40)), np.ones(40), is_share=True)
    assert (found.low, found.high) == pytest.approx(wilson_interval(40, 40, t_quantile(0.95, 39)))


def test_one_example_has_no_spread():
    with pytest.raises(ValueError, match="1 examples"):
        crossed_interval(np.ones((3, 1)), np.ones(1))
