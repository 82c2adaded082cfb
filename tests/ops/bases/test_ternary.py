"""Sparse and very sparse bases keep the contract of every kind."""

import pytest
import torch

from randlora.ops.bases import Ternary
from randlora.ops.bases.dense import DenseBases
from randlora.ops.bases.ternary import SparseBases

from .contract import CPU, KindContract


class TestSparse(KindContract):
    kind = Ternary(3.0)


class TestVerySparse(KindContract):
    kind = Ternary(16.0)

    @pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="products that skip zeros are MKL's")
    @pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 4096), (torch.bfloat16, 1), (torch.bfloat16, 4096)])
    def test_zeros_are_skipped_but_for_many_tokens_in_half_precision(self, dtype, tokens):
        layer = self.layer(dtype)
        found = layer.basis.operands(CPU, dtype, layer.sizes, tokens)
        assert isinstance(found, DenseBases if (dtype, tokens) == (torch.bfloat16, 4096) else SparseBases)
