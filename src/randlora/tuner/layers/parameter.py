"""Adapted parameters without a layer of their own, such as the stacked weights of experts."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from randlora.errors import UnsupportedLayerError
from randlora.tuner.layers.base import AdaptedModule, RandLoraLayer, adapted, innermost
from randlora.tuner.layers.mergeable import require_exchangeable
from randlora.tuner.layers.read_weight import read_weight

_LINEAR = ((nn.Linear, "weight"), (nn.MultiheadAttention, "in_proj_weight"))
"""Parameters that PEFT's LoRA of their module adapts."""


class ParamWrapper(AdaptedModule, RandLoraLayer):
    """A module with RandLoRA adapters of one of its parameters.

    The module runs with W + ΔW in place of the parameter W. W is a matrix (out, in), or a stack (experts, out, in), in
    which each expert has its own λ and γ, of shapes (experts, r, n) and (experts, n, m). The bases are the same for all
    experts. If the module has a true ``is_transposed``, the stack is (experts, in, out). Wrappers of several parameters
    of one module are nested.

    W + ΔW is rounded to the dtype of W: in half precision, an update below half an ulp is rounded away. Threads run the
    module in turn, since each would find the other's sum in place of W.

    Args:
        base_layer: the module, or the wrapper of another parameter of the module.
        adapter_name: name of the first adapter.
        parameter_name: name of the parameter in the module.
        **adapter: values of the adapter, as of :meth:`RandLoraLayer.update_layer`.
    """

    computes_rows = False
    adapts_parameter = True

    def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str, **adapter: Any) -> None:
        super().__init__()
        inner = innermost(base_layer)
        count, in_features, out_features = stacked_shape(inner, parameter_name, parameter_name)
        RandLoraLayer.__init__(self, base_layer, in_features, out_features)
        self.parameter_name = parameter_name
        self.stack = (count,) if getattr(inner, parameter_name).ndim == 3 else ()
        self._transposed = _is_transposed(inner, parameter_name)
        self.is_linear = base_layer is inner and any(
            isinstance(inner, kind) and parameter_name == name for kind, name in _LINEAR
        )
        self._active_adapter = adapter_name
        self._turn = _Turn()
        self.update_layer(adapter_name, **adapter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the module with the adapted parameter, for any arguments of the module."""
        with nullcontext() if torch.compiler.is_compiling() else self._turn:
            return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        weight = self._base_weight()
        if weight.device.type == "meta" and any(p.device.type != "meta" for p in self.randlora_lambda.values()):
            raise UnsupportedLayerError(
                f"the parameter {self.parameter_name!r} is offloaded, and there is nothing to add its update to: keep "
                "its module on a device, or merge the adapter"
            )
        require_exchangeable(self.get_base_layer(), self.parameter_name, self._where())
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.randlora_lambda]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(*args, **kwargs)
        total = self.with_updates(weight, names)
        return functional_call(self.base_layer, {self._path(): total}, args, kwargs)

    def _exchanges_weight(self) -> bool:
        return True

    def delta_of(self, adapter: str, lam: Tensor, gamma: Tensor) -> Tensor:
        """Return ΔW in the shape of the parameter, in float32 or wider."""
        if not self.stack:
            return super().delta_of(adapter, lam, gamma)

        def update(lam: Tensor, gamma: Tensor) -> Tensor:
            return self._update_of(adapter, lam, gamma)

        return self._to_weight_layout(torch.vmap(update)(lam, gamma))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: PEFT's own conversion writes only `target_modules` to the config, which cannot be loaded."""
        return False

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module itself, with all adapters of the module and its parts merged or removed."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        for name, part in adapted(layer).items():
            if merge:
                part.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, part.base_layer)
        return layer

    @property
    def weight(self) -> Tensor:
        """The module's weight, with the updates of the active adapters if it is the adapted parameter."""
        return read_weight(self) if self.parameter_name == "weight" else cast("Tensor", self.base_layer.weight)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapper, W + ΔW for the adapted parameter, or else an attribute of the module."""
        if name == self.__dict__.get("parameter_name"):
            with nullcontext() if torch.compiler.is_compiling() else self._turn:  # else W may be a call's W + ΔW
                return read_weight(self)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_layer, name)  # private ones too, which torch's encoder reads from attention

    def _path(self) -> str:
        """Return the parameter's name within ``base_layer``, which may be further wrappers."""
        path, layer = self.parameter_name, self.base_layer
        while isinstance(layer, ParamWrapper):
            path, layer = f"base_layer.{path}", layer.base_layer
        return path

    def _to_weight_layout(self, update: Tensor) -> Tensor:
        return update.mT if self._transposed else update

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        weight = getattr(base_layer, self.parameter_name)
        return weight.device, weight.dtype

    def extra_repr(self) -> str:
        """Return the parameter's name."""
        return f"parameter_name={self.parameter_name!r}"


class _Turn:
    """A reentrant lock, held by the thread that exchanges a parameter. A copy has a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, object]) -> _Turn:
        return _Turn()

    def __reduce__(self) -> tuple[type[_Turn], tuple[()]]:
        return _Turn, ()


def parts_of_wrapped(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules inside of modules with wrapped parameters, with their paths; adapted layers count as one."""
    parts: list[tuple[str, nn.Module]] = []
    for path, wrapper in model.named_modules():
        if not isinstance(wrapper, ParamWrapper) or isinstance(wrapper.base_layer, ParamWrapper):
            continue
        layers: list[str] = []
        for name, part in list(wrapper.base_layer.named_modules(prefix=f"{path}.base_layer"))[1:]:
            if not any(name.startswith(f"{layer}.") for layer in layers):
                parts.append((name, part))
            if isinstance(part, RandLoraLayer):
                layers.append(name)
    return parts


def stacked_shape(module: nn.Module, parameter_name: str, name: str) -> tuple[int, int, int]:
    """Return (number of matrices, in, out) of a parameter.

    Raises:
        UnsupportedLayerError: if the parameter is computed, or neither a matrix nor a stack of matrices.
    """
    require_exchangeable(module, parameter_name, f"the module of target parameter {name!r}")
    parameter = getattr(module, parameter_name)
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if len(shape) not in (2, 3) or not parameter.is_floating_point():
        raise UnsupportedLayerError(
            f"target parameter {name!r} of shape {tuple(shape)} and {parameter.dtype} is neither a matrix (out, in) "
            "nor a stack (experts, out, in) of floating point numbers: remove it from `target_parameters`"
        )
    rows, columns = shape[-2:]
    in_features, out_features = (rows, columns) if _is_transposed(module, parameter_name) else (columns, rows)
    return (shape[0] if len(shape) == 3 else 1), in_features, out_features


def _is_transposed(module: nn.Module, parameter_name: str) -> bool:
    return getattr(module, parameter_name).ndim == 3 and bool(getattr(module, "is_transposed", False))
