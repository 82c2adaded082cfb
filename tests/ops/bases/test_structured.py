"""Structured bases: what they are, an update of full rank at any size, and the contract of all kinds."""

import hashlib
import math

import numpy as np
import pytest
import torch

from randlora.ops import naive
from randlora.ops.bases import BasisSpec, Structured, get_basis
from randlora.ops.bases.structured import hadamard
from randlora.ops.operands import Sizes

from .contract import CPU, KindContract, Layer

SHAPES = [(1, 1), (1, 9), (2, 3), (5, 5), (7, 8), (8, 8), (9, 40), (16, 16), (17, 17), (31, 33), (33, 33), (48, 64)]


class OfRankEight(Layer):
    """Of 4 groups; neither 17 nor 26 is a multiple of 4."""

    rank = 8


class TestStructured(KindContract):
    kind = Structured(4)

    def layer(self, dtype=torch.float32, tokens=9):
        return OfRankEight(self.kind, dtype, tokens)


class TestManyGroups(TestStructured):
    kind = Structured(8)  # more groups than some layers have columns to fill


class TestOneGroup(TestStructured):
    kind = Structured(1)  # A dense, B with orthogonal columns


class TestMoreTokensThanRows(TestStructured):
    def layer(self, dtype=torch.float32, tokens=40):
        return OfRankEight(self.kind, dtype, 40)


class TestOneToken(TestStructured):
    """It passes A, γ and λ in turn, with as many tokens as a group has rows of A or fewer."""

    def layer(self, dtype=torch.float32, tokens=1):
        return OfRankEight(self.kind, dtype, 1)


class TestTwoTokensOfSizesThatDivide(TestStructured):
    def layer(self, dtype=torch.float32, tokens=2):
        return _Even(self.kind, dtype, 2)


class TestSizesThatDivide(TestStructured):
    def layer(self, dtype=torch.float32, tokens=9):
        return _Even(self.kind, dtype, tokens)


class _Even(Layer):
    rank, m, M = 8, 16, 24


def spec(rank, m, M, key=0, groups=8):
    return BasisSpec(rank, m, M, key, Structured(groups), m, M)


def sign(word):
    return 1 if word < 2**23 else -1


def bits(a, b):
    return (-1) ** bin(a & b).count("1")


def test_they_are_what_the_definition_says():
    """The definition, number by number, from the words of MT19937."""
    r, m, M, g, key = 8, 10, 21, 4, 7
    A, B = get_basis(spec(r, m, M, key, g)).tensors(CPU, torch.float64)
    rho, n = 2, 2
    words = np.random.RandomState(key).randint(0, 2**32, size=4 + 10 * (rho + 1), dtype=np.uint32) & 0xFFFFFF
    index = words[4:].reshape(10, rho + 1)
    for k in range(r):
        for j in range(m):
            value = (2 * int(index[j, k % rho]) + 1 - 2**24) / 2**24 * math.sqrt(3 * g)
            group = next(i for i, columns in enumerate(np.array_split(range(m), g)) if j in columns)
            assert A[k, j] == pytest.approx(value if group == k // rho else 0.0, rel=1e-12)
    for row in range(M):
        a, rows = next((a, list(rows)) for a, rows in enumerate(np.array_split(range(M), g)) if row in rows)
        t = rows.index(row)
        for column in range(n * r):
            i, kappa = column // (rho * n), column % (rho * n)
            expected = sign(words[a]) * bits(a, i) * sign(index[t, rho]) * bits(t, kappa)
            assert B[row, column] == expected


@pytest.mark.parametrize("groups", [1, 2, 8, 32])
@pytest.mark.parametrize("rank", [1, 3, 4, 6, 8, 32])
def test_the_update_has_full_rank_at_every_size(rank, groups):
    torch.manual_seed(rank)
    for m, M in [
        (1, 1),
        (1, 9),
        (2, 3),
        (5, 5),
        (7, 8),
        (8, 8),
        (9, 40),
        (16, 16),
        (17, 17),
        (31, 33),
        (33, 33),
        (48, 64),
    ]:
        basis, n = get_basis(spec(rank, m, M, key=m * 100 + M, groups=groups)), -(-m // rank)
        A, B = basis.tensors(CPU, torch.float64)
        update = naive.delta_weight(A, B, torch.randn(rank, n).double(), torch.randn(n, m).double(), 1.0, M, m)
        values = torch.linalg.svdvals(update)
        assert values[-1] > 1e-9 * values[0], (m, M)


def test_a_layer_reads_the_same_numbers_whatever_the_other_layers_are():
    sizes = Sizes(21, 10, 2)
    alone = get_basis(spec(8, 10, 21)).tensors(CPU, torch.float64, sizes)
    among = get_basis(spec(8, 64, 100)).tensors(CPU, torch.float64, sizes)
    assert all(torch.equal(a, b) for a, b in zip(alone, among, strict=True))


def test_mean_squares_are_those_of_dense_bases():
    A, B = get_basis(spec(32, 512, 1024)).tensors(CPU, torch.float64)
    assert A.square().mean() == pytest.approx(1, abs=0.03)
    assert B.square().mean() == 1


def test_columns_of_b_are_orthogonal_where_rows_are_a_power_of_two():
    _, B = get_basis(spec(16, 128, 256)).tensors(CPU, torch.float64)
    assert torch.equal(B.T @ B, 256 * torch.eye(128, dtype=torch.float64))


@pytest.mark.parametrize(("rank", "groups", "expected"), [(32, 8, 8), (32, 64, 32), (12, 8, 4), (5, 8, 1), (4, 8, 4)])
def test_groups_divide_the_rank(rank, groups, expected):
    assert Structured(groups).groups_of(rank) == expected


def test_every_leading_part_of_a_hadamard_matrix_has_full_rank():
    whole = hadamard(16, 16).double()
    assert torch.equal(whole @ whole.T, 16 * torch.eye(16, dtype=torch.float64))
    for rows in range(1, 17):
        for columns in range(1, 17):
            part = hadamard(rows, columns)
            assert torch.equal(part.double(), whole[:rows, :columns])
            assert torch.linalg.matrix_rank(part.double()) == min(rows, columns)


def test_golden_numbers():
    basis = get_basis(spec(32, 100, 130, key=5))
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in basis.stored.numbers())).hexdigest()
    assert (digest[:16], basis.fingerprint[:16]) == ("87d79dc8a5a3e782", "f0a471e8bf96da8c")


def test_what_is_kept_is_kilobytes():
    assert get_basis(spec(32, 3072, 8192)).nbytes < 60_000


class TestAFewTokens(TestStructured):
    """Of which A, γ and λ are applied in turn."""

    def layer(self, dtype=torch.float32, tokens=2):
        return OfRankEight(self.kind, dtype, 2)
