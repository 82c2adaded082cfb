"""Ternary numbers, four to a byte."""

import pytest
import torch

from randlora.ops.codes import pack, unpack
from randlora.ops.units import in_units

DTYPES = [torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64]


def ternary(*shape):
    return torch.randint(-1, 2, shape, dtype=torch.int8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 16, 30])
def test_the_numbers_come_back(columns, dtype):
    numbers = ternary(7, columns)
    packed = pack(numbers)
    assert packed.dtype == torch.uint8
    assert packed.shape == (7, -(-columns // 4))
    found = unpack(packed, columns, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, in_units(numbers, dtype))


def test_the_first_columns_of_some_rows():
    numbers = ternary(9, 14)
    packed, some = pack(numbers), torch.tensor([[3, 0], [8, 3]])
    assert torch.equal(unpack(packed[2:6], 5, torch.float32), numbers[2:6, :5].float())
    assert torch.equal(unpack(packed[some], 14, torch.float32), numbers[some].float())


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_nothing(shape):
    assert unpack(pack(ternary(*shape)), shape[1], torch.float32).shape == shape


def test_under_compile_and_on_the_meta_device():
    numbers = ternary(5, 6)
    compiled = torch.compile(lambda packed: 2 * unpack(packed, 6, torch.float32), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pack(numbers)), 2 * numbers.float())
    assert unpack(pack(numbers).to("meta"), 6, torch.float32).shape == (5, 6)
