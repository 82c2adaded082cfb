"""Resources of the GPU's kernels, read from their machine code, which Triton makes without a device.

The resources are registers for each thread, bytes spilled to memory, shared memory, and the number of instructions that
multiply matrices. The benchmark needs Triton (its wheel has ptxas, cuobjdump and nvdisasm), but no GPU.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from randlora.ops.gpu import elementwise, gradients, products

COLUMNS = ("arch", "kernel", "block", "warps", "registers", "spilled", "shared", "matrix instr.")
ARCHITECTURES = (80, 90)
SUM = "sum of products"
KERNELS: dict[str, tuple[Any, list[dict[str, int]], dict[str, Any]]] = {
    "Ã": (elementwise._scaled, [elementwise.SCALED.values], {}),
    "W + ΔW, stochastic": (elementwise._stochastic_sum, [elementwise.ROW.values], {"update_1": 1, "base_1": 1}),
    "dλ, dγ": (gradients._scaling_gradients, [gradients.BLOCK.values], {"d_2": 1}),
    SUM: (
        products._rounded_sum,
        [products.LARGE, products.SMALL],
        {"HAS_SECOND": True, "HAS_ADDEND": False, "a_1": 1, "b_0": 1, "c_1": 1, "d_0": 1},
    ),
}
"""Kernels, block sizes and constants, by name. Strides are those of x Wᵀ + h Bᵀ."""
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {"lam": "*fp32", "gamma": "*fp32", "d_lam": "*fp32", "d_gamma": "*fp32", "seed": "*i32"}
_TYPES |= dict.fromkeys(("out", "A", "a", "b", "c", "d", "addend", "update", "base", "d_scaled"), "*bf16")


def run(quick: bool) -> Iterator[dict[str, Any]]:
    for arch in ARCHITECTURES[1:] if quick else ARCHITECTURES:
        for name, (kernel, blocks, constants) in KERNELS.items():
            for sizes in blocks:
                yield resources(arch, name, kernel, sizes, constants)


def resources(arch: int, name: str, kernel: Any, sizes: dict[str, int], constants: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a kernel, compiled for pointers and sizes divisible by 16, as in the usual layers."""
    options = {"num_warps": 4} | {key: size for key, size in sizes.items() if key.startswith("num_")}
    constants = constants | {key: size for key, size in sizes.items() if key not in options}
    signature = {
        argument: "constexpr" if argument in constants else _TYPES.get(argument, "i32") for argument in kernel.arg_names
    }
    attributes = {
        (number,): [["tt.divisibility", 16]]
        for number, argument in enumerate(kernel.arg_names)
        if argument not in constants and argument != "rows"
    }
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {
        "arch": f"sm_{arch}",
        "kernel": name,
        "block": "×".join(str(sizes[key]) for key in ("ROWS", "COLUMNS", "DEPTH") if key in sizes),
        "warps": options["num_warps"],
        **_usage(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
    }


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = _output("cuobjdump", "-res-usage", file.name)
        code = _output("nvdisasm", "-c", file.name)
    registers, stack = (int(re.findall(rf"{word}:(\d+)", used)[-1]) for word in ("REG", "STACK"))
    return {
        "registers": registers,
        "spilled": stack,
        "matrix instr.": len(re.findall(r"\b(?:HGMMA|HMMA)\.", code)),
    }


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout
