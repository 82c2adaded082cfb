"""Where the kernels run, and the sentence that says why not."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from randlora.ops.bases import BasisSpec, Dense, Ternary, get_basis
from randlora.ops.bases.dense import DenseBases
from randlora.ops.gpu import availability
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
    assert availability.kernels(torch.bfloat16, torch.ones(2)) is None


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


def test_compiled_code_may_be_the_first_to_ask(monkeypatch):
    """Of a device to which the model has gone since. What the answer needs, Dynamo of torch 2.11 does not trace."""
    monkeypatch.setattr(availability, "_found", {})
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def ask(x):
        return x + 1 if availability.why_not(CPU, torch.bfloat16) is None else x

    found = torch.compile(ask, backend="eager", fullgraph=True)(torch.zeros(1))
    assert found == (1 if find_spec("triton") else 0)


class TestWhereTheyMayBeCalled:
    """Only where nobody looks at single operations: else a graph, a derivative or a sample would go without them."""

    @pytest.fixture
    def there(self, monkeypatch):
        monkeypatch.setattr(availability, "_found", {CPU: None})
        monkeypatch.setattr(availability, "loaded", lambda: "kernels")

    def test_on_plain_tensors(self, there):
        plain, trained = torch.ones(2), nn.Parameter(torch.ones(2))
        with torch.no_grad():
            assert availability.kernels(torch.bfloat16, plain, None, trained) == "kernels"
        assert availability.kernels(torch.bfloat16, plain) == "kernels"

    def test_not_where_a_derivative_is_taken(self, there):
        assert availability.kernels(torch.bfloat16, torch.ones(2), torch.ones(2, requires_grad=True)) is None

    def test_not_where_operations_are_recorded(self, there):
        found = []

        def ask(x):
            found.append(availability.kernels(torch.bfloat16, x))
            return x + 1

        torch.func.vmap(ask)(torch.ones(2))
        torch.jit.trace(ask, torch.ones(2), check_trace=False)
        with FlopCounterMode(display=False):
            ask(torch.ones(2))
        with FakeTensorMode() as fake:
            x = fake.from_tensor(torch.ones(2))
        ask(x)  # a tensor of another class
        torch.compile(ask, backend="eager", fullgraph=True)(torch.ones(2))
        assert found == [None] * 5


def test_operands_are_those_of_other_devices(monkeypatch):
    basis = get_basis(BasisSpec(4, 11, 17, 5, Dense(), 11, 17))
    without = basis.operands(CPU, torch.bfloat16, Sizes(9, 6, 2))
    monkeypatch.setattr(availability, "why_not", lambda _device, _dtype: None)
    found = basis.operands(CPU, torch.bfloat16, Sizes(9, 6, 2))
    assert type(found) is DenseBases
    assert [t.data_ptr() for t in found.tensors()] == [t.data_ptr() for t in without.tensors()]


@pytest.mark.parametrize("sparsity", [3.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_kept_as_numbers_once_for_all_layers(monkeypatch, sparsity, dtype):
    """As dense bases are, so that a call of theirs launches no more; on a CPU each call makes them."""
    basis = get_basis(BasisSpec(4, 11, 17, 5, Ternary(sparsity), 11, 17))
    without, stored = basis.operands(CPU, dtype, Sizes(9, 6, 2)).ready(), basis.nbytes
    monkeypatch.setattr(availability, "why_not", lambda _device, _dtype: None)
    large, found = (basis.operands(CPU, dtype, sizes) for sizes in (Sizes(17, 11, 3), Sizes(9, 6, 2)))
    assert type(found) is DenseBases
    assert found.ready() is found
    assert torch.equal(found.B, without.B)
    assert torch.equal(found.A, without.A.to(dtype))
    assert [t.data_ptr() for t in found.tensors()] == [t.data_ptr() for t in large.tensors()]
    assert basis.nbytes == stored + 2 * (4 * 11 + 17 * 12)
