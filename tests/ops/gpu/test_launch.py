"""The launching of compiled kernels, with a kernel in place of Triton's: which calls may share a compiled kernel."""

import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is for Linux only")


class Compiled:
    """What Triton's launch returns: a kernel for arguments like the first ones."""

    def __init__(self, made_for):
        self.made_for, self.calls = made_for, []

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((grid, arguments))


class Kernel:
    """A kernel as `triton.jit` makes it, which compiles at each call."""

    def __init__(self):
        self.fn, self.arg_names, self.compiled = (lambda: None), ["out", "x", "rows", "k", "COLUMNS"], []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.compiled.append(Compiled((arguments, constants)))
            return self.compiled[-1]

        return run


@pytest.fixture
def launch(monkeypatch):
    from randlora.ops.gpu import launch as module

    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(module, "interpreting", False)
    return module.launch


def aligned(dtype=torch.float32):
    """A tensor whose address is divisible by 256, as on a GPU."""
    memory = torch.zeros(128, dtype=dtype)
    start = -memory.data_ptr() % 256 // memory.itemsize
    return memory[start : start + 64]


class Elsewhere(torch.Tensor):
    def get_device(self):
        return 1


VALUES = {"COLUMNS": 16, "num_warps": 4}


@cache
def constants(block):
    from randlora.ops.gpu.launch import Constants

    return Constants(VALUES | {"COLUMNS": block}, {})


def run(launch, kernel, out, x, rows=3, k=5, grid=(1, 1, 1), block=16):
    launch(kernel, grid, (out, x), (k,), constants(block), rows=(rows,))


def test_a_like_call_runs_the_compiled_kernel_with_its_own_arguments(launch):
    kernel, (out, x, other) = Kernel(), (aligned() for _ in range(3))
    run(launch, kernel, out, x)
    run(launch, kernel, out, other, rows=7, grid=(2, 1, 1))
    (compiled,) = kernel.compiled
    assert compiled.made_for == ((out, x, 3, 5), VALUES)
    (grid, (given_out, given, rows, k, block)), = compiled.calls  # fmt: skip
    assert (grid, rows, k, block) == ((2, 1, 1), 7, 5, 16)  # without the compiler's options
    assert (given_out, given) == (out.data_ptr(), other.data_ptr())


@pytest.mark.parametrize(
    "change",
    [
        {"x": aligned(torch.int32)},
        {"x": aligned()[1:]},
        {"x": aligned().as_subclass(Elsewhere)},
        {"x": None},
        {"k": 1},
        {"k": 2**31},
        {"block": 32},
    ],
    ids=["dtype", "alignment", "device", "none", "a size of one", "a wide size", "constants"],
)
def test_what_triton_may_specialise_on_is_compiled_anew(launch, change):
    kernel, given = Kernel(), {"out": aligned(), "x": aligned()}
    run(launch, kernel, **given)
    run(launch, kernel, **(given | change))
    assert len(kernel.compiled) == 2
    assert not kernel.compiled[0].calls


def test_two_kernels_are_two(launch):
    first, second, out = Kernel(), Kernel(), torch.zeros(4)
    run(launch, first, out, out)
    run(launch, second, out, out)
    assert len(first.compiled) == len(second.compiled) == 1


def test_the_kept_kernels_are_bounded(launch, monkeypatch):
    from randlora.ops.gpu import launch as module

    monkeypatch.setattr(module, "_MOST", 3)
    kernel, out = Kernel(), torch.zeros(4)
    for k in range(10):
        run(launch, kernel, out, out, k=k)
    assert len(module._compiled) <= 3


PARAMETERS = """
from randlora.ops.gpu import elementwise, gradients, products
kernels = [k for m in (elementwise, gradients, products) for k in vars(m).values() if hasattr(k, "do_not_specialize")]
kernels = [k for k in kernels if "out" in k.arg_names[0] or "d_lam" == k.arg_names[0]]
assert len(kernels) == 5, kernels
for kernel in kernels:
    free = [p.name for p in kernel.params if p.do_not_specialize]
    assert free == [name for name in kernel.arg_names if name == "rows"], (kernel, free)
    constants = [p.is_constexpr for p in kernel.params]
    assert constants == sorted(constants), kernel  # last
"""


def test_kernels_specialise_on_everything_but_rows():
    """In a process of its own, where Triton does not interpret."""
    run = subprocess.run(
        [sys.executable, "-c", PARAMETERS], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
