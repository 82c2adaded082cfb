"""Against multiply-adds counted by hand from the table of the design page, in units of T·m·m or m·m·m."""

import pytest
from benchmarks.floor import step_floor
from benchmarks.methods import DENSE, LORA, PEFT_DENSE, SPARSE, VERY_SPARSE

SQUARE = [(64, 64)]  # q = m = M = 64; the base is 2·T·m²


def floor(method: str, tokens: int, shapes=SQUARE, layers=None, rank: int = 32, fusible: bool = True) -> float:
    return step_floor(method, shapes, layers or shapes, tokens, rank, fusible)


@pytest.mark.parametrize("tokens", [1, 64, 10_000])
def test_the_peer_takes_five_products_at_any_number_of_tokens(tokens):
    assert floor(PEFT_DENSE, tokens) == (2 + 5) / 2


def test_few_tokens_cost_what_the_peer_costs():
    assert floor(DENSE, 8) == floor(SPARSE, 8) == floor(PEFT_DENSE, 8)


def test_a_wide_layer_projects_its_input_again():
    # token space forward T·q·(m+M), dÃ T·q·(M+m), dx T·q·(m+M), beside a base of 2·T·m·M
    assert floor(DENSE, 1, [(64, 128)]) == (2 * 128 + 3 * 192) / (2 * 128)
    assert floor(DENSE, 1, [(128, 64)]) == (2 * 128 + 2 * 192 + 64) / (2 * 128)


def test_many_tokens_go_through_the_weight():
    T, m = 4096, 64
    # forward and dx rebuild ΔW (m³ each); dÃ is T·m² for dW and m³ for Bᵀ dW
    assert floor(DENSE, T) == (2 * T * m * m + 3 * m**3 + T * m * m) / (2 * T * m * m)


def test_half_precision_adds_two_products_with_the_update():
    T, m = 4096, 64
    assert floor(DENSE, T, fusible=False) == floor(DENSE, T) + 2 * T * m * m / (2 * T * m * m)


def test_the_rank_that_does_not_divide_the_width_is_rounded_up():
    # m = 65, r = 32: three bases, q = 96
    assert floor(PEFT_DENSE, 1, [(65, 65)]) == (2 * 65 * 65 + 5 * 96 * 65) / (2 * 65 * 65)


def test_very_sparse_bases_take_their_share_of_the_products():
    # density 1/√64 = 1/8: few tokens take five products of which an eighth is work
    assert floor(VERY_SPARSE, 1) == (2 + 5 / 8) / 2


def test_layers_without_an_adapter_bring_the_floor_closer_to_one():
    assert floor(PEFT_DENSE, 8, layers=[*SQUARE, (64, 64)]) == (4 + 5) / 4


def test_only_randlora_has_a_floor():
    assert floor(LORA, 8) is None
