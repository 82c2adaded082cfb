"""Kinds of basis that the library lacks, to compare orthogonal with drawn columns of B."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from randlora.ops.bases.dense import Dense, DenseStored
from randlora.ops.bases.spec import BasisSpec
from randlora.ops.bases.structured import Structured, StructuredBases, StructuredStored, hadamard
from randlora.ops.operands import Sizes


@dataclass(frozen=True)
class OrthogonalDense(Dense):
    """Dense bases whose B is ±1 with orthogonal columns: part of a Hadamard matrix, its rows with drawn signs."""

    def draw(self, spec: BasisSpec) -> DenseStored:
        drawn = super().draw(spec)
        rows, columns = drawn.b.shape
        return DenseStored(drawn.a, (signs(spec.key, rows, 1) * hadamard(rows, columns)).to(drawn.b.dtype))


@dataclass(frozen=True)
class DrawnStructured(Structured):
    """Structured bases whose Q_b is drawn, each entry ±1 by itself."""

    def draw(self, spec: BasisSpec) -> "DrawnStored":
        drawn = super().draw(spec)
        return DrawnStored(drawn.a, drawn.mix_signs, drawn.row_signs, drawn.max_dim, spec.key)


class DrawnStored(StructuredStored):
    def __init__(self, a: Tensor, mix_signs: Tensor, row_signs: Tensor, max_dim: int, key: int) -> None:
        super().__init__(a, mix_signs, row_signs, max_dim)
        self.key = key

    def operands(self, device: torch.device, dtype: torch.dtype, sizes: Sizes, tokens: int | None) -> StructuredBases:
        found = super().operands(device, dtype, sizes, tokens)
        shape = found.B.shape
        B = self.forms.get(("drawn", device, dtype, shape), lambda: (signs(self.key, *shape).to(found.B),))
        return found._replace(B=B[0])


def signs(key: int, rows: int, columns: int) -> Tensor:
    """Return drawn signs ±1 (rows, columns), in int8."""
    return torch.from_numpy(np.random.RandomState(key).choice(np.array([-1, 1], np.int8), (rows, columns)))
