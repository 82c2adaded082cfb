"""Linear layers with a quantised base weight, of any kind of quantisation.

The adapted layer calls the base layer unchanged, and computes the update beside it in the dtype of the input. For
merging, PEFT's ``QuantizationBackend`` of the kind reads the weight as plain numbers and writes numbers back. A warning
reports the measured rounding error, and the original is kept whole.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from randlora.errors import MergeError
from randlora.tuner.layers.base import innermost
from randlora.tuner.layers.linear import Linear


class QuantizedLinear(Linear):
    """A quantised linear layer with RandLoRA adapters.

    Args:
        base_layer: the quantised layer, any module with ``in_features`` and ``out_features``.
        adapter_name: name of the first adapter.
        backend: reader and writer of the layer's weight.
        **adapter: values of the adapter, as of :meth:`RandLoraLayer.update_layer`.
    """

    weight = BaseTunerLayer.weight  # its codes, to which no update can be added

    def __init__(self, base_layer: nn.Module, adapter_name: str, backend: QuantizationBackend, **adapter: Any) -> None:
        _keep_trainable_format(innermost(base_layer))
        super().__init__(base_layer, adapter_name, **adapter)
        self.quantization_backend = backend
        self._unmerged: _Kept | None = None

    def require_mergeable(self) -> None:
        """Check that the weight can be written.

        Raises:
            MergeError: for a kind of quantisation whose weight cannot be written.
        """
        backend = self._backend()
        if not backend.supports_merge:
            raise MergeError(
                f"{self._where()} as one quantised with {backend.backend_name} cannot be merged into: what was "
                "calibrated cannot be written back. Merge into the model as it was before quantisation, or keep the "
                "adapter separate."
            )

    def _dense_base_weight(self) -> Tensor:
        self.require_mergeable()
        backend = self._backend()
        return backend.get_base_weight(self.get_base_layer())

    def _put_merged_weight(self, merged: Tensor) -> None:
        before = self._dense_base_weight()
        kept = _Kept.of(self)
        self._backend().set_base_weight(self, merged)
        kept.complete(self)
        rounded = self._dense_base_weight()
        if merged.isfinite().all() and not rounded.isfinite().all():
            kept.restore(self)
            raise MergeError(
                f"the merged weight of a {self.out_features}×{self.in_features} layer reaches "
                f"{merged.abs().max():.3g}, which {self._backend().backend_name} cannot hold. The base weights are "
                "unchanged."
            )
        self._unmerged = self._unmerged or kept
        _report(Rounding.measure(before, merged, rounded))

    def _restore_base_weight(self) -> None:
        if self._unmerged is not None:
            self._unmerged.restore(self)
        self._unmerged = None

    def _backend(self) -> QuantizationBackend:
        assert self.quantization_backend is not None
        return self.quantization_backend

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        return _device(base_layer) if device is None else device, dtype


class Linear8bitLt(QuantizedLinear):
    """A ``Linear8bitLt`` of bitsandbytes with RandLoRA adapters, under the name that PEFT gives it."""


class Linear4bit(QuantizedLinear):
    """A ``Linear4bit`` of bitsandbytes with RandLoRA adapters, under the name that PEFT gives it."""


def quantized_class(backend: QuantizationBackend) -> type[QuantizedLinear]:
    """Return the class for a layer of that kind."""
    return {"bnb 8bit": Linear8bitLt, "bnb 4bit": Linear4bit}.get(backend.backend_name, QuantizedLinear)


def quantization_backend(base_layer: nn.Module, model: nn.Module) -> QuantizationBackend | None:
    """Return the backend that reads and writes the layer's weight; ``None`` if the weight is not quantised.

    For a quantised linear layer that PEFT does not know, the backend allows calls but no merging.

    Args:
        base_layer: a layer of ``model``.
        model: the model; if loaded by Transformers, it knows how to quantise again.
    """
    if is_parametrized(base_layer, "weight"):
        return None
    weight = getattr(base_layer, "weight", None)
    if type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1:
        return None
    known_how = get_quantization_kwargs(model)
    if type(weight).__module__.startswith("torchao.") and not known_how:
        return ForwardOnlyQuantizationBackend("torchao, outside of Transformers,")
    try:
        backend = resolve_quantization_backend(base_layer, **known_how)
    except ImportError:  # PEFT asks for a companion of GPTQ's package, which calls do not need
        backend = None
    of_one_byte = isinstance(weight, Tensor) and weight.element_size() == 1
    if backend is None and (of_one_byte or hasattr(base_layer, "qweight")) and hasattr(base_layer, "in_features"):
        return ForwardOnlyQuantizationBackend(type(base_layer).__name__)
    return backend


@dataclass
class _Kept:
    """The objects of a base layer before merging, which unmerging puts back without computation."""

    layer: nn.Module
    weight: nn.Parameter | None
    state: Any

    @classmethod
    def of(cls, adapted: QuantizedLinear) -> _Kept:
        layer: Any = adapted.get_base_layer()
        kept = cls(layer, getattr(layer, "weight", None), getattr(layer, "state", None))
        if kept.state is not None:
            layer.state = copy.copy(kept.state)  # bitsandbytes writes into it
        return kept

    def complete(self, adapted: QuantizedLinear) -> None:
        """Give the old bias to a base layer that the backend has created."""
        new: Any = adapted.get_base_layer()
        if new is not self.layer and new.bias is None:
            new.bias = self.layer.bias

    def restore(self, adapted: QuantizedLinear) -> None:
        """Put all objects back, on the device of the merged layer."""
        layer: Any = self.layer
        device = _device(adapted.get_base_layer())
        if adapted.base_layer is not layer and adapted.get_base_layer() is adapted.base_layer:
            adapted.base_layer = layer
        if self.weight is not None:
            del layer.weight
            layer.weight = self.weight
        if self.state is not None:
            layer.state = self.state
        if _device(layer) != device:
            layer.to(device)


@dataclass(frozen=True)
class Rounding:
    """The error of quantising a merged weight.

    Attributes:
        of_weight: norm of the error divided by the norm of the merged weight.
        of_update: norm of the error divided by the norm of the update; at 1 the update is lost.
    """

    of_weight: float
    of_update: float

    @classmethod
    def measure(cls, before: Tensor, merged: Tensor, rounded: Tensor) -> Rounding:
        """Return the rounding error, from the weight before merging, the exact sum, and the sum after quantisation."""
        error = torch.linalg.vector_norm(rounded.float() - merged.float())
        update = torch.linalg.vector_norm(merged.float() - before.float())
        return cls(float(error / torch.linalg.vector_norm(merged.float())), float(error / update))


_collected: ContextVar[list[Rounding] | None] = ContextVar("_collected", default=None)


@contextmanager
def one_rounding_warning() -> Iterator[None]:
    """Make all layers together warn once of the rounding of merged weights, within this context."""
    token = _collected.set([])
    try:
        yield
    finally:
        found = _collected.get()
        _collected.reset(token)
        if found:
            worst = max(found, key=lambda rounding: rounding.of_update)
            _warn(f"{len(found)} quantised layers, at worst", worst)


def _report(rounding: Rounding) -> None:
    found = _collected.get()
    if found is None:
        _warn("a quantised layer", rounding)
    else:
        found.append(rounding)


def _warn(where: str, rounding: Rounding) -> None:
    warnings.warn(
        f"Merging into {where}: quantising the sum again changes it by {rounding.of_weight:.2%} of the weight and "
        f"{rounding.of_update:.1%} of the update. unmerge() restores the original exactly; to keep the update whole, "
        "leave the adapter separate, or merge it into the model as it was before quantisation.",
        stacklevel=4,
    )


def _device(base_layer: Any) -> torch.device | None:
    held = next((getattr(base_layer, n) for n in ("weight", "qweight", "W_q") if hasattr(base_layer, n)), None)
    return None if held is None else held.device


def _keep_trainable_format(base_layer: Any) -> None:
    """Keep a 4-bit layer of bitsandbytes in the format that has a gradient.

    On CPUs with AVX512-BF16, evaluating such a layer packs its weight for inference. A packed layer returns no gradient
    for its input, cannot be read as numbers, and raises for sizes that are not a multiple of 32 (out) or of a block
    (in).
    """
    if not getattr(base_layer, "support_avx512bf16_for_cpu", False):
        return
    base_layer.support_avx512bf16_for_cpu = False
    state: Any = getattr(base_layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse  # noqa: PLC0415 - optional

        base_layer.weight.data, state = _convert_weight_packed_for_cpu_inverse(base_layer.weight.data, state)
        if state.absmax.ndim == 2:  # which the inverse leaves packed
            state.absmax = state.absmax.T.reshape(-1).float()
        base_layer.weight.quant_state = base_layer.quant_state = state
