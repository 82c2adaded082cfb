"""What the GPU's kernels take of a multiprocessor, read from their machine code, which Triton makes without a device.

Registers for each thread, bytes spilled to memory, shared memory, and how many instructions multiply matrices. It needs
Triton (its wheel brings ptxas, cuobjdump and nvdisasm), no GPU.
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

from randlora.ops.gpu import gradients, products, tiles

COLUMNS = (
    "arch",
    "kernel",
    "codes",
    "rank",
    "block",
    "warps",
    "stages",
    "registers",
    "spilled",
    "shared",
    "matrix instr.",
)
ARCHITECTURES = (80, 90)
RANKS = (16, 32, 256)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FLAGS: dict[str, dict[str, dict[str, bool]]] = {
    "_times_scaled": {
        "update": {"HAS_BASE": True, "HAS_FIRST": False, "HAS_BIAS": False, "STOCHASTIC": False},
        "update, stochastic": {"HAS_BASE": True, "HAS_FIRST": False, "HAS_BIAS": False, "STOCHASTIC": True},
        "tokens × Ã + base": {"HAS_BASE": False, "HAS_FIRST": True, "HAS_BIAS": False, "STOCHASTIC": False},
    },
    "_times_scaled_transposed": {"tokens × Ãᵀ": {}},
    "_sum_of_products": {"sum of products": {"HAS_SECOND": True, "HAS_BIAS": False}},
    "_scaling_gradients": {"dλ, dγ": {}},
}
_FLOATS = {"lam", "gamma", "d_lam", "d_gamma"}
_POINTERS = {"out", "x", "A", "base", "bias", "a", "b", "c", "d", "v", "left", "right"}
_UNIT_STRIDES = {"out_1", "x_1", "v_1", "left_1", "right_1", "base_1", "a_1", "b_0", "c_1", "d_0"}


def run(quick: bool) -> Iterator[dict[str, Any]]:
    for arch in ARCHITECTURES[1:] if quick else ARCHITECTURES:
        for name, variants in FLAGS.items():
            for label, flags in variants.items():
                for rank in RANKS[1:2] if quick or name == "_sum_of_products" else RANKS:
                    for codes in (False, True) if label in ("update", "dλ, dγ") and rank == 32 else (False,):
                        for sizes in _sizes(name, rank, codes or flags.get("STOCHASTIC", False))[
                            : 1 if quick else None
                        ]:
                            yield resources(arch, name, label, flags, rank, codes, sizes)


def resources(
    arch: int, name: str, label: str, flags: dict[str, bool], rank: int, codes: bool, sizes: dict[str, int]
) -> dict[str, Any]:
    """One row: the kernel of that name, compiled."""
    kernel = _kernel(name)
    options = {key: sizes[key] for key in ("num_warps", "num_stages")}
    constants: dict[str, Any] = flags | {key: size for key, size in sizes.items() if key not in options}
    constants |= {"RANK": rank, "POWER": triton.next_power_of_2(rank)} if name != "_sum_of_products" else {}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature, attributes = {}, {}
    for number, argument in enumerate(kernel.arg_names):
        signature[argument] = _type(argument, codes)
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in _UNIT_STRIDES:
            signature[argument], constants[argument] = "constexpr", 1
        elif argument not in ("rows", "bucket"):  # pointers and sizes that 16 divides, as of the usual layers
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    block = "×".join(str(sizes[key]) for key in ("ROWS", "COLUMNS", "DEPTH"))
    return {
        "arch": f"sm_{arch}",
        "kernel": label,
        "codes": "int8" if codes else "bf16",
        "rank": rank,
        "block": block,
        "warps": sizes["num_warps"],
        "stages": sizes["num_stages"],
        **_usage(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
    }


def _kernel(name: str) -> Any:
    module = gradients if name == "_scaling_gradients" else products
    kernel = getattr(module, name)
    return getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel


def _sizes(name: str, rank: int, smaller: bool) -> list[dict[str, int]]:
    """The block sizes among which a GPU chooses."""
    if name != "_scaling_gradients":
        return tiles.CONFIGS["product"][smaller:]
    return [
        config | {"ROWS": tile, "COLUMNS": tile, "PART": min(triton.next_power_of_2(rank), tile)}
        for config in tiles.CONFIGS["reduction"]
        for tile in (128, 64)
    ]


def _type(argument: str, codes: bool) -> str:
    if argument in _FLOATS:
        return "*fp32"
    if argument == "seed":
        return "*i32"
    if argument in _POINTERS:
        return "*i8" if codes and argument in ("A", "x", "left") else "*bf16"
    return "i32"


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
