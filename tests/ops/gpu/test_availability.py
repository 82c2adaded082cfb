"""Where the kernels run, and the sentence that says why not."""

import pytest
import torch

from randlora.ops.bases import BasisSpec, Dense, Ternary, get_basis
from randlora.ops.bases.dense import DenseBases
from randlora.ops.gpu import availability, reference
from randlora.ops.gpu.grouped import GroupedBases, grouped
from randlora.ops.operands import Sizes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of compute capability 9.0, as far as the choice looks."""
    monkeypatch.setattr(availability, "_found", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(availability, "find_spec", lambda _name: object())
    return monkeypatch


def test_they_run_in_half_precision_on_a_gpu(gpu):
    assert availability.why_not(CUDA, torch.bfloat16) is None
    assert availability.why_not(CUDA, torch.float16) is None
    assert "not in float32" in availability.why_not(CUDA, torch.float32)


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu"])
def test_there_are_none_for_other_devices(gpu, kind):
    gpu.delenv("TRITON_INTERPRET", raising=False)
    assert f"devices of type {kind}" in availability.why_not(torch.device(kind), torch.bfloat16)
    assert availability.kernels(torch.device(kind), torch.bfloat16) is reference


def test_each_hindrance_is_named(gpu):
    def reason():
        availability._found.clear()
        return availability.why_not(CUDA, torch.bfloat16)

    gpu.setattr(availability, "find_spec", lambda _name: None)
    assert "pip install triton" in reason()
    gpu.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert "8.0 or newer" in reason()
    gpu.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in reason()
    availability.set_kernels(False)
    try:
        assert "set_kernels(False)" in reason()
    finally:
        availability.set_kernels(True)


@pytest.mark.parametrize("kind", [Dense(), Ternary(3.0)], ids=["dense", "codes"])
def test_bases_lie_as_the_kernels_read_them(monkeypatch, kind):
    basis = get_basis(BasisSpec(4, 11, 17, 5, kind, 11, 17))
    monkeypatch.setattr(availability, "why_not", lambda _device, dtype: None if dtype == torch.bfloat16 else "wide")
    monkeypatch.setattr(availability, "kernels", lambda *_: reference)
    bases = basis.operands(CPU, torch.bfloat16, Sizes(9, 6, 2))
    assert isinstance(bases, GroupedBases)
    assert bases.B.dtype == (torch.bfloat16 if kind == Dense() else torch.int8)
    plain = basis.lookup(CPU, torch.bfloat16, Sizes(9, 6, 2)).ready()
    assert torch.equal(bases.A, plain.A.squeeze(1))
    for b in range(2):
        assert torch.equal(bases.B[:, 4 * b : 4 * b + 4].bfloat16(), plain.B.view(9, 4, 2)[:, :, b])
    assert basis.operands(CPU, torch.bfloat16, Sizes(17, 6, 2)).B.data_ptr() == bases.B.data_ptr()
    assert isinstance(basis.operands(CPU, torch.float32, Sizes(9, 6, 2)), DenseBases)


def test_grouping_keeps_every_column():
    B = torch.arange(24).view(2, 12)
    assert grouped(B, 3).tolist()[0] == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
