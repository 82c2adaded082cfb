"""The cost table is what the products really cost, and the choice is its minimum."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from randlora.ops import plan as plans
from randlora.ops.bases import Dense, Ternary
from randlora.ops.bases.dense import DenseBases, dense_costs
from randlora.ops.bases.ternary import _sparse_costs
from randlora.ops.linear import adapted_linear
from randlora.ops.operands import Sizes
from randlora.ops.plan import (
    Plan,
    Problem,
    Rates,
    backward_cost,
    call_cost,
    choose,
    force,
    forward_cost,
    set_rates,
    step_cost,
    sum_cost,
)

WAYS = ("token", "weight", "fused")
PLANS = [Plan(*ways) for ways in itertools.product(WAYS, WAYS, WAYS[:2])]
dims = st.integers(1, 40)


def problem_of(tokens, out, in_, rank, can_fuse, input_needs_grad=True, products="plain", density=(0.1, 0.2)):
    """The problem of a layer with its products with the bases computed in one of the three ways."""
    sizes = Sizes(max(out, in_), min(out, in_), -(-min(out, in_) // rank))
    if products == "sparse":
        costs = _sparse_costs(rank, sizes, tokens, density)
    else:
        costs = dense_costs(rank, sizes, tokens, plans.rates, splits=products == "split")
    return Problem(tokens, out, in_, costs, can_fuse, input_needs_grad)


def shapes(**fixed):
    """Arguments of ``problem_of``: of the rates of that moment, problems are made in the tests."""
    fields = {
        "tokens": st.integers(1, 80),
        "out": dims,
        "in_": dims,
        "rank": st.integers(1, 12),
        "can_fuse": st.booleans(),
        "input_needs_grad": st.booleans(),
    } | {name: st.just(value) for name, value in fixed.items()}
    return st.fixed_dictionaries(fields)


@pytest.fixture
def products_only():
    """Counts multiply-adds and nothing else, as the design's table does."""
    before = plans.rates
    set_rates(Rates(split=1.0, sparse=1.0, element=0.0, element_sparse=0.0))
    yield
    set_rates(before)


def multiply_adds(counter: FlopCounterMode) -> int:
    """Of all matrix products but the batched ones, which are the sums over diagonals: 2·q·m, whatever the plan."""
    counted = counter.get_flop_counts().get("Global", {})
    return sum(flops for product, flops in counted.items() if product is not torch.ops.aten.bmm) // 2


def measured(problem: Problem, r: int, plan: Plan, with_weight: bool) -> tuple[int, int]:
    """Multiply-adds of forward and backward beyond the base layer's own, as counted at torch's dispatcher."""
    out, in_ = problem.out_features, problem.in_features
    m, M = min(out, in_), max(out, in_)
    n = -(-m // r)
    x = torch.randn(problem.tokens, in_, requires_grad=problem.input_needs_grad)
    weight = torch.randn(out, in_) if with_weight else None
    lam, gamma = torch.randn(r, n, requires_grad=True), torch.randn(n, m, requires_grad=True)
    bases = DenseBases(torch.randn(r, 1, m), torch.randn(M, n * r), torch.float32)
    with force(plan), FlopCounterMode(display=False) as forward:
        y = adapted_linear(x, bases, lam, gamma, 1.0, out, weight)
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.ones_like(y))
    base = problem.tokens * out * in_ if with_weight else 0
    return multiply_adds(forward) - base, multiply_adds(backward) - base * problem.input_needs_grad


@pytest.mark.usefixtures("products_only")
class TestCosts:
    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(shape=shapes(can_fuse=True), plan=st.sampled_from(PLANS))
    def test_table_equals_the_counted_products(self, shape, plan):
        problem = problem_of(**shape)
        expected = forward_cost(problem, plan.output), backward_cost(problem, plan.grad_input, plan.grad_basis)
        assert measured(problem, shape["rank"], plan, with_weight=True) == expected

    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(shape=shapes(can_fuse=False), plan=st.sampled_from(PLANS))
    def test_table_equals_the_counted_products_of_the_update_alone(self, shape, plan):
        problem = problem_of(**shape)
        allowed = plans._allowed(plan, problem)
        expected = (
            forward_cost(problem, allowed.output),
            backward_cost(problem, allowed.grad_input, allowed.grad_basis),
        )
        assert measured(problem, shape["rank"], plan, with_weight=False) == expected

    def test_the_numbers_of_the_design_for_a_square_layer(self):
        m, T = 512, 2048
        problem = problem_of(T, m, m, 32, can_fuse=True)
        assert forward_cost(problem, "token") == T * m * 2 * m
        assert forward_cost(problem, "fused") == m**3
        assert forward_cost(problem, "weight") == m**3 + T * m * m
        assert backward_cost(problem, "fused", "weight") == 2 * m**3 + T * m * m
        assert backward_cost(problem, "token", "token") == 3 * T * m * m

    def test_thresholds_of_the_design_for_a_square_layer(self):
        m = 64
        few = choose(problem_of(m // 2, m, m, 8, can_fuse=True))
        some = choose(problem_of(m // 2 + 1, m, m, 8, can_fuse=True))
        many = choose(problem_of(m + 1, m, m, 8, can_fuse=True))
        assert few == Plan("token", "token", "token")
        assert some == Plan("fused", "token", "token")
        assert many == Plan("fused", "fused", "weight")

    def test_sparse_products_cost_their_density(self):
        sparse = problem_of(64, 96, 64, 8, True, products="sparse", density=(0.25, 0.125))
        assert forward_cost(sparse, "token") == 64 * 64 * (64 * 0.25 + 96 * 0.125)
        assert forward_cost(sparse, "fused") == 64 * 64 * 96 * 0.125
        assert backward_cost(sparse, "fused", "weight") == 64 * 64 * 96 * (1 + 2 * 0.125)
        # with A as sparse as B, few products are left but dW itself, which is therefore avoided
        sparser = problem_of(4096, 96, 64, 8, True, products="sparse", density=(0.02, 0.02))
        assert choose(sparser).grad_basis == "token"


class TestRates:
    def test_cheaper_products_with_b_move_the_switch(self):
        m = 512

        def switch(products):
            problems = (problem_of(T, m, m, 32, True, products=products) for T in range(1, 4 * m))
            return next(problem.tokens for problem in problems if choose(problem).output == "fused")

        before = plans.rates
        try:
            set_rates(Rates(split=0.5, element=0.0))
            assert switch("plain") == m // 2 + 1
            assert switch("split") == m // 3 + 1  # T m² (1 + 0.5) against 0.5 m³
        finally:
            set_rates(before)

    def test_what_is_held_saves_is_what_a_call_costs(self):
        problem = problem_of(1, 64, 96, 8, can_fuse=True)
        assert call_cost(problem) > forward_cost(problem, choose(problem).output)
        assert sum_cost(problem) == forward_cost(problem, "fused")


def on_a_gpu(tokens, out, in_, stochastic=False):
    """A layer's problem on a GPU in bf16 at r = 32, with its base weight at hand only for stochastic rounding."""
    sizes = Sizes(max(out, in_), min(out, in_), min(out, in_) // 32)
    costs = Dense().costs(32, sizes, torch.device("cuda"), torch.bfloat16, tokens)
    return Problem(tokens, out, in_, costs, can_fuse=stochastic)


LLAMA = {"q": (3072, 3072), "o": (3072, 3072), "k": (1024, 3072), "v": (1024, 3072)}
LLAMA |= {"gate": (8192, 3072), "up": (8192, 3072), "down": (3072, 8192)}
"""(out, in) of the layers of Llama-3.2-3B."""


class TestGpuRates:
    """The plans of the layers that were measured on an H100 (docs/gpu.md)."""

    def step(self, names, tokens, way=None):
        """What the step of these layers costs by the plans that are chosen, or by one way throughout."""
        problems = [on_a_gpu(tokens, *LLAMA[name]) for name in names]
        if way is None:
            return sum(map(step_cost, problems))
        return sum(forward_cost(problem, way) + backward_cost(problem, way, way) for problem in problems)

    @pytest.mark.parametrize("name", LLAMA)
    def test_few_tokens_go_through_the_bases(self, name):
        assert choose(on_a_gpu(840, *LLAMA[name])) == Plan("token", "token", "token")

    def test_4096_tokens_take_the_weight_where_it_is_as_small(self):
        output = {name: choose(on_a_gpu(4096, *shape)).output for name, shape in LLAMA.items()}
        assert output == dict.fromkeys("qokv", "weight") | dict.fromkeys(("gate", "up", "down"), "token")
        # 410 ms in token space, 486 by weights, 396 as chosen
        chosen, token, weight = (self.step(LLAMA, 4096, way) for way in (None, "token", "weight"))
        assert chosen < token < weight

    @pytest.mark.parametrize("name", LLAMA)
    def test_16384_tokens_take_the_weight(self, name):
        # in an exact plan, dy B of a much taller layer serves dÃ and dx: three products beside four
        backward = ("token", "token") if name in ("gate", "up") else ("weight", "weight")
        assert choose(on_a_gpu(16384, *LLAMA[name])) == Plan("weight", *backward)
        assert choose(on_a_gpu(16384, *LLAMA[name], stochastic=True)) == Plan("fused", "fused", "weight")

    def test_each_device_has_its_own(self):
        before = plans.rates, plans.gpu_rates
        try:
            for device in ("cpu", "cuda:1"):
                set_rates(Rates(element=7.0), device)
                assert plans.rates_on(torch.device(device)).element == 7
                assert (plans.rates is before[0], plans.gpu_rates is before[1]) == (False, device == "cpu")
        finally:
            set_rates(before[0])
            set_rates(before[1], "cuda")


class TestChoice:
    @settings(deadline=None)
    @given(shape=shapes(), products=st.sampled_from(["plain", "split", "sparse"]))
    def test_is_the_minimum_of_what_is_allowed(self, shape, products):
        problem = problem_of(**shape, products=products)
        allowed = [way for way in WAYS if problem.can_fuse or way != "fused"]
        plan = choose(problem)
        assert plan.output in allowed
        assert plan.grad_input in allowed
        assert forward_cost(problem, plan.output) == min(forward_cost(problem, way) for way in allowed)
        assert backward_cost(problem, plan.grad_input, plan.grad_basis) == min(
            backward_cost(problem, way, basis) for way in allowed for basis in WAYS[:2]
        )

    @pytest.mark.parametrize("plan", PLANS, ids=str)
    def test_forced_plan_holds_within_its_context(self, plan):
        problem = problem_of(5, 8, 9, 2, can_fuse=True)
        before, other = choose(problem), Plan("token", "token", "token")
        with force(plan):
            assert choose(problem) == plan
            with force(other):
                assert choose(problem) == other
            assert choose(problem) == plan
        assert choose(problem) == before

    def test_fused_is_never_forced_where_it_would_round(self):
        with force(Plan("fused", "fused", "weight")):
            plan = choose(problem_of(5, 8, 9, 2, can_fuse=False))
        assert plan == Plan("weight", "weight", "weight")

    def test_an_error_ends_the_forcing(self):
        problem = problem_of(1, 64, 64, 8, can_fuse=True)
        with pytest.raises(KeyError), force(Plan("fused", "fused", "weight")):
            raise KeyError
        assert choose(problem) == Plan("token", "token", "token")


def test_zeros_are_skipped_in_half_precision_for_few_tokens_only(monkeypatch):
    monkeypatch.setattr(plans, "rates", Rates(sparse_tokens=100))
    cpu, kind = torch.device("cpu"), Ternary(16.0)
    for dtype in (torch.bfloat16, torch.float16):
        found = [kind.skips_zeros(cpu, dtype, tokens) for tokens in (1, 100, 101, None)]
        assert found == [True, True, False, False]
    assert kind.skips_zeros(cpu, torch.float32, 1 << 20)
    assert not Ternary(15.9).skips_zeros(cpu, torch.float32, 1)
