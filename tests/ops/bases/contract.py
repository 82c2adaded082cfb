"""What every kind of basis keeps: its operands compute what the formula says, and its costs are those of what it does.

A kind's tests inherit ``KindContract`` and say ``kind``. The judge is the formula with A and B in float64.
"""

import pytest
import torch

from randlora.ops import naive
from randlora.ops.bases import KINDS, BasisSpec, get_basis
from randlora.ops.operands import Beside, Sizes

CPU, META = torch.device("cpu"), torch.device("meta")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


class Layer:
    """A layer of M × m with slices of larger bases, λ, γ and activations, and the same in float64."""

    rank, m, M = 5, 17, 26  # 17 is no multiple of 5

    def __init__(self, kind, dtype, tokens=9):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        n = -(-self.m // self.rank)
        self.basis = get_basis(BasisSpec(self.rank, 23, 31, 3, kind, 23, 31))
        self.sizes, self.dtype, self.tokens = Sizes(self.M, self.m, n), dtype, tokens
        self.operands = self.basis.operands(CPU, dtype, self.sizes, tokens)
        self.factor = self.basis.factor / self.operands.unit  # what λ makes up for
        self.lam, self.gamma = draw(self.rank, n), draw(n, self.m) / 4
        self.u, self.v = draw(tokens, self.M).to(dtype).double(), draw(tokens, self.m).to(dtype).double()
        self.A, self.B = self.basis.tensors(CPU, torch.float64, self.sizes)
        self.update = naive.delta_weight(self.A, self.B, self.lam, self.gamma, 1.0, self.M, self.m)

    def scaled(self, operands):
        """Ã, with all that the operands leave out in λ."""
        lam, gamma = self.factors()
        return operands.scaled(lam * (self.operands.unit / operands.unit), gamma)

    def factors(self):
        wide = torch.promote_types(self.dtype, torch.float32)
        return (self.lam * self.factor).to(wide), self.gamma.to(wide)

    def close(self, found, expected, name=""):
        assert found.shape == expected.shape, name
        error = (found.double() - expected).norm() / expected.norm()
        assert error <= TOLERANCE[self.dtype], f"{name}: {error:.1e}"


class KindContract:
    kind = None

    def layer(self, dtype=torch.float32, tokens=9):
        return Layer(self.kind, dtype, tokens)

    def test_it_is_registered(self):
        assert KINDS[self.kind.name] is type(self.kind)
        assert hash(self.kind) == hash(type(self.kind)(**vars(self.kind)))

    @DTYPES
    def test_the_update_and_its_sum_with_a_base(self, dtype):
        layer = self.layer(dtype)
        operands = layer.operands.ready()
        found = operands.weight(layer.scaled(operands))
        assert found.dtype == dtype
        layer.close(found, layer.update)
        if dtype in (torch.float32, torch.float64):
            for base in (torch.ones(layer.M, layer.m, dtype=dtype), torch.ones(layer.m, layer.M, dtype=dtype).T):
                layer.close(operands.weight(layer.scaled(operands), base), layer.update + 1)

    @DTYPES
    @pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the base product"])
    def test_tokens_both_ways(self, dtype, beside):
        layer = self.layer(dtype)
        operands = layer.operands.ready()
        scaled = layer.scaled(operands)
        u, v = layer.u.to(dtype), layer.v.to(dtype)
        W = torch.ones(layer.M, layer.m, dtype=dtype) / 8
        wide, narrow = (Beside(v, W.T, None), Beside(u, W, None)) if beside else (None, None)
        base = W.double() if beside else torch.zeros_like(layer.update)
        found = operands.widen(v, scaled, wide)
        assert found.dtype == dtype
        layer.close(found, layer.v @ (layer.update + base).T, "widen")
        found = operands.narrow(operands.project(u, scaled), scaled, narrow)
        layer.close(found, layer.u @ (layer.update + base), "narrow")
        if not beside:
            update = operands.weight(scaled)
            layer.close(operands.times(v, update.T, None), layer.v @ layer.update.T, "times")

    @DTYPES
    def test_gradients_from_tokens_and_from_the_weight(self, dtype):
        layer = self.layer(dtype)
        operands = layer.operands.ready()
        lam, gamma = layer.lam.clone().requires_grad_(), layer.gamma.clone().requires_grad_()
        update = naive.delta_weight(layer.A, layer.B, lam, gamma, 1.0, layer.M, layer.m)
        d_weight = layer.u.T @ layer.v
        expected = torch.autograd.grad(update, (lam, gamma), d_weight)
        scaled = layer.scaled(operands)
        projected, *from_tokens = operands.from_tokens(layer.u.to(dtype), layer.v.to(dtype), *layer.factors(), scaled)
        from_weight = operands.from_weight(d_weight.to(dtype), *layer.factors())
        for name, (d_lam, d_gamma) in {"tokens": from_tokens, "weight": from_weight}.items():
            layer.close(d_lam * layer.factor, expected[0], f"dλ from {name}")
            layer.close(d_gamma, expected[1], f"dγ from {name}")
        layer.close(operands.narrow(projected, scaled, None), layer.u @ layer.update, "shared with dx")

    @DTYPES
    def test_layers_that_are_scaled_alike_share_operands_of_the_scaled_update(self, dtype):
        layer = self.layer(dtype)
        before = layer.basis.nbytes

        def scaled_by(scaling):
            return layer.basis.scaled_operands(CPU, dtype, layer.sizes, layer.tokens, scaling)

        operands = scaled_by(3.0)
        assert scaled_by(3.0) is operands
        assert scaled_by(2.0) is not operands
        assert layer.basis.nbytes > before
        lam, gamma = (t.to(torch.promote_types(dtype, torch.float32)) for t in (layer.lam, layer.gamma))
        operands = operands.ready()
        layer.close(operands.weight(operands.scaled(lam, gamma)), 3 * layer.update)

    def test_scalings_that_are_long_past_are_let_go(self):
        layer = self.layer()
        for scaling in range(1, 200):
            layer.basis.scaled_operands(CPU, torch.float32, layer.sizes, layer.tokens, scaling / 8)
        assert len(list(layer.basis._scaled)) <= 64

    def test_operands_are_their_tensors_and_plain_values(self):
        operands = self.layer().operands
        again = type(operands).of(operands.tensors(), operands.static())
        assert all(a is b for a, b in zip(again.tensors(), operands.tensors(), strict=True))
        assert again.static() == operands.static()
        assert hash(operands.static()) is not None
        assert operands.dtype == torch.float32

    @DTYPES
    @pytest.mark.parametrize("tokens", [1, 64, 4096])
    def test_costs_are_those_of_the_operands_that_a_layer_gets(self, dtype, tokens):
        layer = self.layer(dtype, tokens=1)
        operands = layer.basis.operands(CPU, dtype, layer.sizes, tokens)
        found = operands.costs(tokens)
        expected = self.kind.costs(layer.rank, layer.sizes, CPU, dtype, tokens)
        assert found.products == expected.products
        assert min(found[1:]) > 0
        assert found.element == expected.element

    @DTYPES
    @pytest.mark.parametrize("wide", [True, False], ids=["wide", "tall"])
    def test_rows_and_table(self, dtype, wide):
        layer = self.layer(dtype)
        operands = layer.basis.lookup(CPU, dtype, layer.sizes)
        scaled = layer.scaled(operands)
        update = layer.update if wide else layer.update.T
        ids = torch.tensor([[3, 0], [11, 3]])
        layer.close(operands.rows(ids, scaled, wide), update[ids])
        layer.close(operands.table(scaled, wide), update)

    def test_bytes_are_those_of_the_storage(self):
        basis = get_basis(BasisSpec(4, 20, 30, 77, self.kind, 13, 25))
        assert basis.nbytes == basis.spec.nbytes

    def test_on_the_meta_device(self):
        layer = self.layer()
        n, operands = layer.sizes.num_bases, layer.basis.operands(META, torch.float32, layer.sizes, 9).ready()
        lam, gamma = (torch.empty(shape, device=META) for shape in ((layer.rank, n), (n, layer.m)))
        assert operands.weight(operands.scaled(lam, gamma)).shape == (layer.M, layer.m)
