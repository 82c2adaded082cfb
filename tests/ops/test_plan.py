"""The cost table is what the products really cost, and the choice is its minimum."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from randlora.ops.linear import adapted_linear
from randlora.ops.plan import Plan, Problem, backward_cost, choose, force, forward_cost

WAYS = ("token", "weight", "fused")
dims = st.integers(1, 40)


def problems(**fixed):
    fields = {
        "tokens": st.integers(1, 80),
        "out_features": dims,
        "in_features": dims,
        "rank": st.integers(1, 12),
        "can_fuse": st.booleans(),
        "input_needs_grad": st.booleans(),
    } | {name: st.just(value) for name, value in fixed.items()}

    def build(tokens, out_features, in_features, rank, can_fuse, input_needs_grad):
        n = -(-min(out_features, in_features) // rank)
        return Problem(tokens, out_features, in_features, rank, n, can_fuse, input_needs_grad)

    return st.builds(build, **fields)


def multiply_adds(counter: FlopCounterMode) -> int:
    """Of all matrix products but the batched ones, which are the sums over diagonals: 2·q·m, whatever the plan."""
    counted = counter.get_flop_counts().get("Global", {})
    return sum(flops for product, flops in counted.items() if product is not torch.ops.aten.bmm) // 2


def measured(problem: Problem, way: str, with_weight: bool) -> tuple[int, int]:
    """Multiply-adds of forward and backward beyond the base layer's own, as counted at torch's dispatcher."""
    r, n = problem.rank, problem.num_bases
    out, in_ = problem.out_features, problem.in_features
    m, M = min(out, in_), max(out, in_)
    x = torch.randn(problem.tokens, in_, requires_grad=problem.input_needs_grad)
    weight = torch.randn(out, in_) if with_weight else None
    lam, gamma = torch.randn(r, n, requires_grad=True), torch.randn(n, m, requires_grad=True)
    with force(way, way), FlopCounterMode(display=False) as forward:
        y = adapted_linear(x, torch.randn(r, m), torch.randn(M, n * r), lam, gamma, 1.0, out, weight)
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.ones_like(y))
    base = problem.tokens * out * in_ if with_weight else 0
    return multiply_adds(forward) - base, multiply_adds(backward) - base * problem.input_needs_grad


class TestCosts:
    @settings(deadline=None)
    @given(problem=problems(can_fuse=True), way=st.sampled_from(WAYS))
    def test_table_equals_the_counted_products(self, problem, way):
        expected = forward_cost(problem, way), backward_cost(problem, way)
        assert measured(problem, way, with_weight=True) == expected

    @settings(deadline=None)
    @given(problem=problems(can_fuse=False), way=st.sampled_from(WAYS[:2]))
    def test_table_equals_the_counted_products_of_the_update_alone(self, problem, way):
        expected = forward_cost(problem, way), backward_cost(problem, way)
        assert measured(problem, way, with_weight=False) == expected

    def test_the_numbers_of_the_design_for_a_square_layer(self):
        m, T = 512, 2048
        problem = Problem(T, m, m, 32, m // 32, can_fuse=True)
        assert forward_cost(problem, "token") == T * m * 2 * m
        assert forward_cost(problem, "fused") == m**3
        assert forward_cost(problem, "weight") == m**3 + T * m * m
        assert backward_cost(problem, "fused") == 2 * m**3 + T * m * m

    def test_thresholds_of_the_design_for_a_square_layer(self):
        m = 64
        few = choose(Problem(m // 2, m, m, 8, 8, can_fuse=True))
        some = choose(Problem(m // 2 + 1, m, m, 8, 8, can_fuse=True))
        many = choose(Problem(m + 1, m, m, 8, 8, can_fuse=True))
        assert few == Plan("token", "token")
        assert some == Plan("fused", "token")
        assert many == Plan("fused", "fused")


class TestChoice:
    @settings(deadline=None)
    @given(problem=problems())
    def test_is_the_minimum_of_what_is_allowed(self, problem):
        allowed = [way for way in WAYS if problem.can_fuse or way != "fused"]
        plan = choose(problem)
        assert plan.forward in allowed
        assert plan.backward in allowed
        assert forward_cost(problem, plan.forward) == min(forward_cost(problem, way) for way in allowed)
        assert backward_cost(problem, plan.backward) == min(backward_cost(problem, way) for way in allowed)

    @pytest.mark.parametrize(("forward", "backward"), itertools.product(WAYS, WAYS))
    def test_forced_plan_holds_within_its_context(self, forward, backward):
        problem = Problem(5, 8, 9, 2, 4, can_fuse=True)
        before = choose(problem)
        with force(forward, backward):
            assert choose(problem) == Plan(forward, backward)
            with force("token", "token"):
                assert choose(problem) == Plan("token", "token")
            assert choose(problem) == Plan(forward, backward)
        assert choose(problem) == before

    def test_fused_is_never_forced_where_it_would_round(self):
        with force("fused", "fused"):
            assert choose(Problem(5, 8, 9, 2, 4, can_fuse=False)) == Plan("weight", "weight")

    def test_an_error_ends_the_forcing(self):
        problem = Problem(1, 64, 64, 8, 8, can_fuse=True)
        with pytest.raises(KeyError), force("fused", "fused"):
            raise KeyError
        assert choose(problem) == Plan("token", "token")
