"""Calibration fits the planner's rates to what was measured; no test depends on a real time."""

from functools import partial

import pytest

from ops.test_plan import problem_of
from randlora import calibrate as calibration
from randlora.calibrate import Timing, calibrate, chosen_seconds, fitted, measure
from randlora.ops import plan
from randlora.ops.bases import Dense, Ternary
from randlora.ops.plan import Rates, backward_cost, choose, forward_cost


@pytest.fixture(autouse=True)
def rates():
    before = plan.rates
    yield
    plan.set_rates(before)


def made_up(truth: Rates, tokens: int, kind: str) -> Timing:
    """What a machine with the rates ``truth`` would measure."""
    plan.set_rates(truth)
    make = partial(problem_of, tokens, 1024, 1024, 32, True, products=kind, density=(0.03, 0.02))
    problem = make()
    return Timing(
        make,
        {way: forward_cost(problem, way) * 1e-12 for way in ("token", "fused")},
        {ways: backward_cost(problem, *ways) * 1e-12 for ways in calibration._WAYS},
    )


@pytest.mark.parametrize(
    ("kind", "name", "truth"), [("split", "split", 0.5), ("split", "split", 1.6), ("sparse", "sparse", 20.0)]
)
def test_the_switch_lands_where_this_machine_crosses(kind, name, truth):
    machine = Rates(**{name: truth})
    timings = [made_up(machine, tokens, kind) for tokens in range(64, 2048, 64)]
    start = getattr(Rates(), name)
    found = fitted(timings, Rates(), {name: calibration._around(start)})

    def switch(with_rates):
        plan.set_rates(with_rates)
        problems = (problem_of(T, 1024, 1024, 32, True, products=kind, density=(0.03, 0.02)) for T in range(1, 4096))
        return next(problem.tokens for problem in problems if choose(problem).output == "fused")

    assert switch(found) == pytest.approx(switch(machine), rel=0.2)
    plan.set_rates(found)
    best = sum(min(t.forward.values()) + min(t.backward.values()) for t in timings)
    assert sum(map(chosen_seconds, timings)) <= 1.01 * best


def test_fitting_leaves_the_rates_in_force_alone():
    before = plan.rates
    timing = made_up(before, 256, "split")
    fitted([timing], before, {"split": [0.1, 3.0]})
    assert plan.rates is before


@pytest.mark.parametrize("kind", [Dense(), Ternary(64.0)], ids=str)
def test_measuring_times_every_way(kind):
    timing = measure((96, 64), 8, kind, calibration.torch.device("cpu"))
    assert set(timing.forward) == {"token", "fused"}
    assert set(timing.backward) == set(calibration._WAYS)
    assert timing.problem().tokens == 8


def test_half_precision_times_the_ways_that_it_may_take():
    timing = measure((96, 64), 8, Dense(), calibration.torch.device("cpu"), calibration.torch.bfloat16)
    assert set(timing.forward) == {"token", "weight"}
    assert set(timing.backward) == set(calibration._HALF_WAYS)


def test_a_gpu_is_fitted_by_rates_of_its_own(monkeypatch):
    cpu, gpu = plan.rates, plan.gpu_rates
    real = calibration.measure
    monkeypatch.setattr(calibration, "measure", lambda *call: real(*call[:3], calibration.torch.device("cpu"), call[4]))
    try:
        found = calibrate("cuda", shapes=[(64, 64)], tokens=[8])
        assert plan.gpu_rates is found
        assert plan.rates is cpu
    finally:
        plan.set_rates(gpu, "cuda")


def test_calibrate_puts_its_rates_in_force():
    found = calibrate(shapes=[(64, 64)], tokens=[8])
    assert plan.rates is found
    assert found.split > 0
