"""Reads of a weight outside of its layer's forward, such as ``F.linear(x, self.proj.weight)`` in that of a parent.

Such a read returns W + ΔW, with gradients to λ and γ. Most reads need no values: many forwards read ``weight.dtype``,
``.device`` or ``.shape``. So a read returns a stand-in for the sum, with its shape, dtype and device, and the first
operation on the stand-in computes W + ΔW.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from randlora.errors import AdapterNamesError, UnsupportedLayerError
from randlora.tuner.layers.rows import calls

if TYPE_CHECKING:
    from randlora.tuner.layers.base import RandLoraLayer


def read_weight(layer: RandLoraLayer) -> Tensor:
    """Return the layer's weight for a read by its parents.

    Returns:
        The parameter itself if no adapter changes it, or if ``get_parameter`` asks for the parameter rather than its
        value, as for tying in Transformers. Else W + ΔW in the shape and dtype of W, read-only.

        Operations on W + ΔW raise :class:`UnsupportedLayerError` while dropout is active, which cannot be applied to
        it, or if W is offloaded, and :class:`AdapterNamesError` if rows of a batch have adapters of their own.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and sys._getframe(2).f_code is nn.Module.get_parameter.__code__:
        return layer.original_weight()
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    weight = cast("Tensor", getattr(layer.base_layer, layer.parameter_name))
    if layer.disable_adapters:
        return weight
    names = [name for name in layer.active_adapters if name in layer.randlora_lambda]
    mixed = bool(calls.adapters) and _of_rows(layer, compiling)
    if not mixed and (layer.merged or not names):
        return weight

    def values() -> Tensor:
        _require_readable(layer, weight, names, compiling)
        if not (compiling or layer.read_by_parent):
            layer.read_by_parent = _within_a_call()
        return layer.with_updates(weight, names)

    if compiling or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return values()  # tracers and transforms need plain operations
    parameters = [part[name] for name in names for part in (layer.randlora_lambda, layer.randlora_gamma)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (weight, *parameters)):
        return cast("Tensor", _Read.apply(layer, names, values, weight, *parameters))
    return AdaptedWeight(weight, values)


def reads_weight_of(parent: nn.Module, name: str) -> bool:
    """Return whether a module of torch reads the weight of its child ``name`` in calls without gradients.

    :class:`torch.nn.TransformerEncoderLayer` does, for its kernel of the whole block. Other modules are known to read
    weights once they have done so.
    """
    return (
        isinstance(parent, nn.TransformerEncoderLayer)
        and name in ("linear1", "linear2", "self_attn")
        and bool(parent.activation_relu_or_gelu)
        and parent.self_attn.batch_first
    )


def _within_a_call() -> bool:
    """Return whether a module runs in this thread, so that its code, not a user, reads the weight."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


class AdaptedWeight(Tensor):
    """A stand-in for W + ΔW, computed by the first operation on it. It and its views are read-only."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _make: Callable[[], Tensor]
    _made: Tensor | None

    @staticmethod
    def __new__(cls, like: Tensor, make: Callable[[], Tensor]) -> AdaptedWeight:  # noqa: D102 - documented by the class
        made = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=like.device,
        )
        made._make, made._made = make, None
        return made

    def __init__(self, like: Tensor, make: Callable[[], Tensor]) -> None:
        super().__init__()

    def plain(self) -> Tensor:
        """Return W + ΔW as a plain tensor, without a gradient."""
        if self._made is None:
            with torch.no_grad():
                made = self._make()
            same = made.stride() == self.stride()
            self._made = (
                made
                if same
                else torch.empty_strided(self.shape, self.stride(), dtype=made.dtype, device=made.device).copy_(made)
            )
        return self._made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            _require_no_write(func, args, kwargs or {})
        args, kwargs = tree_map_only(AdaptedWeight, AdaptedWeight.plain, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns):
            result = tree_map_only(Tensor, lambda view: AdaptedWeight(view, lambda: view), result)
        return result

    def data_ptr(self) -> int:
        """Return the address of W + ΔW, for kernels that are not torch's."""
        return self.plain().data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        # torch refuses where there is a gradient
        return cast("Tensor", Tensor.__deepcopy__(self if self.requires_grad else self.plain(), memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().detach().__reduce_ex__(protocol)

    def _refuse(self, *args: object) -> NoReturn:
        raise UnsupportedLayerError(_READ_ONLY)

    requires_grad_ = _refuse  # type: ignore[assignment]
    requires_grad = property(Tensor.requires_grad.__get__, _refuse)  # type: ignore[attr-defined]
    data = property(Tensor.data.__get__, _refuse)  # type: ignore[attr-defined]


class _Read(torch.autograd.Function):
    """The stand-in with a gradient: that of W + ΔW goes on to W, λ and γ."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: RandLoraLayer,
        names: list[str],
        values: Callable[[], Tensor],
        weight: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.layer, ctx.names = layer, names
        ctx.save_for_backward(*parameters)
        return AdaptedWeight(weight, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None, None, None, grad if ctx.needs_input_grad[3] else None]
        again = torch.is_grad_enabled()
        for i, name in enumerate(ctx.names):
            needed = ctx.needs_input_grad[4 + 2 * i : 6 + 2 * i]
            # views, so that the hooks of λ and γ do not run here
            with torch.enable_grad():
                pair = [tensor.view_as(tensor) for tensor in ctx.saved_tensors[2 * i : 2 * i + 2]]
                update = ctx.layer.delta_of(name, *pair)
            wanted = [tensor for tensor, need in zip(pair, needed, strict=True) if need]
            grads = iter(torch.autograd.grad(update, wanted, grad.to(update), create_graph=again) if wanted else ())
            found += [next(grads) if need else None for need in needed]
        return tuple(found)


_READ_ONLY = (
    "the weight of an adapted layer is W + ΔW, computed for each read, and a value written into it would be lost: "
    "write into the weight of its `base_layer`"
)


def _require_no_write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if any(isinstance(tensor, AdaptedWeight) for tensor in (value if isinstance(value, list) else [value])):
                raise UnsupportedLayerError(_READ_ONLY)


def _require_readable(layer: RandLoraLayer, weight: Tensor, names: list[str], compiling: bool) -> None:
    called = f"{layer.path!r}" if layer.path else f"a {layer.out_features}×{layer.in_features} layer"
    mixed = _of_rows(layer, compiling)
    if mixed:
        raise AdapterNamesError(
            f"adapter_names cannot be used while {', '.join(map(repr, mixed))} is named or active and adapts {called}: "
            "the model reads its weight past its forward, and there is one for all samples. Run the adapters one after "
            "another, with `set_adapter`"
        )
    dropping = [name for name in names if layer.drops_input and layer.drops(name)]
    if dropping:
        raise UnsupportedLayerError(
            f"the model reads the weight of {called} past its forward, so that randlora_dropout of the adapter "
            f"{dropping[0]!r} cannot be applied: set it to 0, or add the module to `exclude_modules`"
        )
    if weight.device.type == "meta" and any(layer.randlora_lambda[name].device.type != "meta" for name in names):
        raise UnsupportedLayerError(
            f"the weight of {called} is offloaded, and there is nothing to add its update to: keep its module on a "
            "device, or merge the adapter"
        )


def _of_rows(layer: RandLoraLayer, compiling: bool) -> list[str]:
    """Return this layer's adapters that are named by a mixed batch of this thread, or merged or active meanwhile."""
    names = calls.adapters
    here = next(iter(names.values()), None) if compiling else names.get(threading.get_ident())
    shaping = () if here is None else (*here, *layer.merged_adapters, *layer.active_adapters)
    return sorted({name for name in shaping if name in layer.r})
