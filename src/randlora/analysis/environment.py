"""The abilities of this machine and installation: versions, devices, and the products that run, tried out."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Literal

import torch
from packaging.requirements import Requirement
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType

from randlora.ops import bf16, naive
from randlora.ops.bases import BasisKind, BasisSpec, Dense, Structured, Ternary, get_basis
from randlora.ops.gpu import availability
from randlora.ops.linear import adapted_linear
from randlora.ops.operands import Sizes
from randlora.tuner.model import RandLoraModel

Verdict = Literal["ok", "absent", "broken"]
_OPTIONAL = {
    "bitsandbytes": "4- and 8-bit base models",
    "torchao": "quantised base models",
    "hqq": "quantised base models",
    "trl": "SFTTrainer, randlora train on preferences",
    "datasets": "randlora train",
    "typer": "the randlora command",
    "matplotlib": "pictures",
    "huggingface_hub": "randlora push",
}
_CPU = torch.device("cpu")
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the output's norm, against the formula in float64


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        topic: "version", "device", "product" or "optional".
        name: of the thing that was checked.
        verdict: "ok"; "absent", which something slower or nothing stands in for; "broken", which must be mended.
        detail: the finding in words, and the way out where it is not ok.
    """

    topic: str
    name: str
    verdict: Verdict
    detail: str


def examine() -> list[Finding]:
    """Return the findings about this machine and installation. It takes about a second and changes nothing."""
    return [*_versions(), *_devices(), *_products(), *_optional()]


def _versions() -> list[Finding]:
    found = [
        Finding("version", "python", "ok", f"{platform.python_version()} ({sys.executable})"),
        Finding("version", "randlora", "ok", version("randlora")),
    ]
    for line in requires("randlora") or ():
        wanted = Requirement(line)
        if wanted.marker is not None:  # of an extra
            continue
        there = version(wanted.name)
        fits = wanted.specifier.contains(there, prereleases=True)
        detail = (
            there
            if fits
            else f"{there}, but it must be {wanted.specifier}: pip install '{wanted.name}{wanted.specifier}'"
        )
        found.append(Finding("version", wanted.name, "ok" if fits else "broken", detail))
    ours = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] is RandLoraModel
    said = (
        "PEFT uses this package for RandLoRA"
        if ours
        else "another package has taken RandLoRA in PEFT: import randlora last"
    )
    return [*found, Finding("version", "registration", "ok" if ours else "broken", said)]


def _devices() -> list[Finding]:
    cores = os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    found = [
        Finding("device", "cpu", "ok", f"{cores} cores, torch uses {torch.get_num_threads()} threads, {capability}")
    ]
    if not torch.accelerator.is_available():
        return [*found, Finding("device", "accelerator", "absent", "none that torch sees; training runs on the CPU")]
    kind = torch.accelerator.current_accelerator()
    for index in range(torch.accelerator.device_count()):
        name = torch.cuda.get_device_name(index) if kind is not None and kind.type == "cuda" else str(kind)
        found.append(Finding("device", f"{kind}:{index}", "ok", name))
    return found


def _products() -> list[Finding]:
    split = (
        Finding("product", "exact bf16 products", "ok", "float32 products with bf16 bases run on bf16 matrix units")
        if bf16.available
        else Finding("product", "exact bf16 products", "absent", "plain float32 products instead; results are the same")
    )
    mkl = torch.backends.mkl.is_available()
    sparse = Finding(
        "product",
        "sparse products (MKL)",
        "ok" if mkl else "absent",
        "zeros of very sparse bases are skipped" if mkl else "very sparse bases are multiplied as dense ones",
    )
    kernels = _guarded("product", "GPU kernels (Triton)", _kernels)
    kinds: dict[str, BasisKind] = {"dense": Dense(), "very sparse": Ternary(64.0), "structured": Structured()}
    layers = (_tried(name, kind) for name, kind in kinds.items())
    return [split, sparse, kernels, *layers]


def _kernels() -> tuple[Verdict, str]:
    device = torch.accelerator.current_accelerator() or _CPU
    reason = availability.why_not(device, torch.bfloat16)
    if reason is not None:
        return "absent", f"torch's own products: {reason}"
    return _compare(Dense(), device, torch.bfloat16)


def _tried(name: str, kind: BasisKind) -> Finding:
    """Return the finding of a comparison of one layer's output with the formula."""
    return _guarded("product", f"{name} layer", lambda: _compare(kind))


def _compare(kind: BasisKind, device: torch.device = _CPU, dtype: torch.dtype = torch.float32) -> tuple[Verdict, str]:
    rank, out, into, tokens = 16, 320, 256, 64
    basis = get_basis(BasisSpec(rank, into, out, 0, kind, into, out))
    operands = basis.operands(device, dtype, Sizes(out, into, basis.num_bases), tokens)
    generator = torch.Generator().manual_seed(0)
    lam = torch.randn(rank, basis.num_bases, generator=generator)
    gamma = torch.randn(basis.num_bases, into, generator=generator)
    x = torch.randn(tokens, into, generator=generator).to(dtype)
    y = adapted_linear(x.to(device), operands, lam.to(device), gamma.to(device), basis.factor, out).cpu()
    A, B = basis.tensors(torch.device("cpu"), torch.float64)
    expected = x.double() @ naive.delta_weight(A, B, lam.double(), gamma.double(), 1.0, out, into).T
    error = float((y - expected).norm() / expected.norm())
    detail = f"relative error {error:.0e} against float64, by {operands.costs(tokens).products} products"
    return ("ok" if error < _TOLERANCE[dtype] else "broken"), detail


def _optional() -> list[Finding]:
    found = []
    for name, purpose in _OPTIONAL.items():
        if find_spec(name) is None:
            found.append(Finding("optional", name, "absent", f"for {purpose}: pip install {name}"))
            continue
        try:
            there = version(name)
        except PackageNotFoundError:
            there = "of unknown version"
        found.append(Finding("optional", name, "ok", f"{there}, for {purpose}"))
    return found


def _guarded(topic: str, name: str, look: Callable[[], tuple[Verdict, str]]) -> Finding:
    try:
        return Finding(topic, name, *look())
    except Exception as error:  # whatever a broken installation raises is the finding
        return Finding(topic, name, "broken", f"{type(error).__name__}: {error}")
