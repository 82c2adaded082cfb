"""The state and the operations that all kinds of adapted layers share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from randlora.errors import MergeError, UnsupportedLayerError
from randlora.ops import linear as ops
from randlora.ops.bases import AwaitedBasis, Basis, num_bases
from randlora.ops.bases.dense import DenseBases
from randlora.ops.bases.spec import RowOperands
from randlora.ops.operands import Operands, Sizes
from randlora.ops.precision import at_least_float32, without_autocast
from randlora.tuner.layers.checksum import checksum
from randlora.tuner.layers.dropout import Dropouts
from randlora.tuner.layers.mergeable import require_linear, require_stored
from randlora.tuner.layers.plain import has_plain_product, is_only_moved, is_plain
from randlora.tuner.layers.read_weight import read_weight
from randlora.tuner.layers.rows import calls, mixed_forward
from randlora.tuner.layers.scale import ScaledLayer
from randlora.tuner.wrappers import unwrapped

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class AdaptedModule(nn.Module):
    """A module in place of its ``base_layer``, with the attributes of that layer, such as ``stride``."""

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of this module, or one of the base layer that is not private."""
        modules = self.__dict__.get("_modules", {})
        found = modules.get(name)
        if found is not None:  # a shortcut for the modules that a forward reads
            return found
        try:
            return super().__getattr__(name)
        except AttributeError:
            base_layer = modules.get("base_layer")
            if base_layer is None or name == "weight" or name.startswith("_"):
                raise
            try:
                return getattr(base_layer, name)
            except AttributeError:
                pass
            raise

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the base layer plus the updates of the active adapters.

        Args:
            x: the input of the base layer, in a shape that its kind defines.
            *args: passed on to the base layer.
            **kwargs: likewise.
        """
        if self._disable_adapters and self.merged_adapters:  # not the properties, which take longer
            self.unmerge()
        mixed = mixed_forward(self, x, *args, **kwargs) if calls.running else None
        if mixed is not None:
            return mixed
        active = self._active_adapter
        return self.forward_with([active] if isinstance(active, str) else active, x, *args, **kwargs)

    def forward_with(self, adapters: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output as if ``adapters`` were the active ones."""
        raise NotImplementedError

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a weight or bias in the base layer, which owns them, as for tying to another tensor.

        Raises:
            MergeError: for the weight while adapters are merged into it.
        """
        if name not in ("weight", "bias") or "base_layer" not in self._modules:
            super().register_parameter(name, param)
            return
        layer = cast("RandLoraLayer", self)
        if name == "weight" and layer.merged:
            raise MergeError(
                f"{', '.join(layer.merged_adapters)} is merged into the weight that is to be replaced or tied: call "
                "`unmerge_adapter()` first"
            )
        setattr(layer.base_layer, name, param)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the layer; a merged weight that was intact remains so."""
        layer = cast("RandLoraLayer", self)
        intact = bool(layer.merged) and layer._is_intact()
        result = super()._apply(fn, recurse)
        if intact:
            layer._merged_bits = layer._weight_bits()
        for name in layer.bases:
            layer._cast_basis(name)
        return result

    def __repr__(self) -> str:
        return "randlora." + super().__repr__()


class RandLoraLayer(ScaledLayer):
    """Adapters of one base layer.

    A subclass wraps one kind of base layer. It sets ``in_features`` and ``out_features``, defines the layout of the
    weight, and computes the forward.

    Attributes:
        randlora_lambda: per adapter λ of shape (r, n), trained, float32.
        randlora_gamma: per adapter γ of shape (n, m), trained, float32; m = min(in, out).
        bases: per adapter the frozen A and B, shared with all other layers and not part of the module tree.
        r: per adapter the rank of each basis.
        scaling: per adapter the factor of the update.
        gamma_factor: per adapter the share of the scaling that γ includes, 1 unless γ is in the form of a file.
        parameter_name: name of the weight in the base layer.
        adapts_parameter: whether `target_parameters` names the parameter, rather than `target_modules` the layer.
        stack: leading dimensions of λ and γ, one for a weight that is a stack of matrices, each with its own.
        fan_in_fan_out: whether the weight is stored as (in, out).
        is_linear: whether the layer multiplies its input with the weight, as a LoRA of a matrix does.
        read_by_parent: whether a module around the layer computes with the weight itself, as far as is known.
        computes_rows: whether each row of an input can be given an adapter of its own.
        path: name of the base layer in its model when it was adapted.
        drops_input: whether dropout is applied to the adapters' input.
        cast_input_dtype_enabled: PEFT's switch for casting inputs to the adapter's dtype, without effect here.
    """

    parameter_name: str = "weight"
    adapts_parameter: bool = False
    stack: tuple[int, ...] = ()
    fan_in_fan_out: bool = False
    is_linear: bool = False
    read_by_parent: bool = False
    computes_rows: bool = True
    path: str = ""
    drops_input: bool = True
    cast_input_dtype_enabled: bool = True
    adapter_layer_names: tuple[str, ...] = ("randlora_lambda", "randlora_gamma")
    other_param_names: tuple[str, ...] = (
        "randlora_dropout",
        "bases",
        "r",
        "scaling",
        "initial_scaling",
        "gamma_factor",
        "num_bases",
    )

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        self.base_layer = base_layer
        self.in_features = in_features
        self.out_features = out_features
        self.randlora_lambda = nn.ParameterDict({})
        self.randlora_gamma = nn.ParameterDict({})
        self.randlora_dropout = Dropouts()
        self.bases: dict[str, Basis | AwaitedBasis] = {}
        self.r: dict[str, int] = {}
        self.num_bases: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.gamma_factor: dict[str, float] = {}
        self._disable_adapters = False
        self._may_train: set[str] = set()  # inactive adapters that `set_requires_grad` lets train
        self.merged_adapters: list[str] = []
        self._unmerged_weight: tuple[nn.Parameter] | None = None  # a tuple hides it from this module's parameters
        self._merged_bits: int | None = None

    def get_base_layer(self) -> nn.Module:
        """Return the module inside all adapters and other wrappers (``torch.compile``, checkpointing)."""
        return unwrapped(super().get_base_layer())

    @property
    def min_dim(self) -> int:
        """Smaller dimension m of the weight."""
        return min(self.in_features, self.out_features)

    @property
    def max_dim(self) -> int:
        """Larger dimension M of the weight."""
        return max(self.in_features, self.out_features)

    @property
    def num_matrices(self) -> int:
        """Number of matrices in a stack, else 1."""
        return math.prod(self.stack)

    @property
    def randlora_A(self) -> Mapping[str, Tensor]:
        """For each adapter, a copy of the whole basis A of shape (r, 1, m); every layer reads a slice of it."""
        return ProjectionView(lambda: self.bases, 0)

    @property
    def randlora_B(self) -> Mapping[str, Tensor]:
        """For each adapter, a copy of the whole basis B of shape (M, n, r); every layer reads a slice of it."""
        return ProjectionView(lambda: self.bases, 1)

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        scaling: float,
        gamma_factor: float = 1.0,
        randlora_dropout: float = 0.0,
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Add the parameters of an adapter; its bases are bound when all layers are known (``bind_basis``)."""
        n = num_bases(r, self.min_dim)
        self.r[adapter_name], self.num_bases[adapter_name] = r, n
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = scaling
        self.gamma_factor[adapter_name] = gamma_factor
        if randlora_dropout > 0:
            self.randlora_dropout.add(adapter_name, randlora_dropout)
        initial = torch.zeros if init_weights else torch.randn  # no random numbers without need
        self.randlora_lambda[adapter_name] = nn.Parameter(initial(*self.stack, r, n, dtype=torch.float32))
        self.randlora_gamma[adapter_name] = nn.Parameter(
            torch.full((*self.stack, n, self.min_dim), gamma_factor / self.max_dim, dtype=torch.float32)
        )
        if init_weights:
            self.reset_randlora_parameters(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._require_grad([adapter_name], False)  # until it is active
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def shapes(self, adapter_name: str) -> dict[str, tuple[int, ...]]:
        """Return the full shapes of λ and γ, also if this process has only parts of them."""
        r, n = self.r[adapter_name], self.num_bases[adapter_name]
        return {"randlora_lambda": (*self.stack, r, n), "randlora_gamma": (*self.stack, n, self.min_dim)}

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, and, unless in ``inference_mode``, the only ones that train.

        The time does not depend on the number of adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._freeze()
        self._require_grad(names, not inference_mode)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set whether adapters train, active or not, until others become active."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._require_grad(names, requires_grad)
        if requires_grad:
            self._may_train.update(names)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable the active adapters, or disable and freeze all adapters."""
        self._disable_adapters = not enabled
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            self._freeze()

    def _freeze(self) -> None:
        """Freeze all adapters, by visiting only those that may train."""
        self._require_grad([*self.active_adapters, *self._may_train], False)
        if self._may_train:
            here = self.randlora_lambda  # without those that `alone` hides
            self._may_train = {name for name in self._may_train if name not in here}

    def _require_grad(self, adapter_names: Iterable[str], requires_grad: bool) -> None:
        # attribute lookups would take longer than the loop below
        held = [cast("Any", self)._modules[group]._parameters for group in self.adapter_layer_names]
        for name in adapter_names:
            for parameters in held:
                parameter = parameters.get(name)
                if parameter is not None and parameter.is_leaf:  # not so below FSDP
                    parameter.requires_grad_(requires_grad)

    def reset_randlora_parameters(self, adapter_name: str) -> None:
        """Set λ = 0 and γ = 1 / max(n, m), as the authors' code and PEFT do."""
        if adapter_name in self.randlora_lambda:
            gamma = self.randlora_gamma[adapter_name]
            nn.init.zeros_(self.randlora_lambda[adapter_name])
            nn.init.constant_(gamma, self.gamma_factor[adapter_name] / max(gamma.shape[-2:]))

    def unfold_gamma(self, adapter_name: str) -> None:
        """Move the scaling's share from γ back to the scaling, before γ's values are replaced."""
        for scaling in (self.scaling, self.initial_scaling):
            scaling[adapter_name] *= self.gamma_factor[adapter_name]
        self.gamma_factor[adapter_name] = 1.0

    def bind_basis(self, adapter_name: str, basis: Basis | AwaitedBasis) -> None:
        """Give the adapter its bases."""
        self.bases[adapter_name] = basis
        self._cast_basis(adapter_name)

    def _cast_basis(self, adapter_name: str) -> None:
        """Cast an adapter's bases for the base layer ahead of its first call, which may be traced by a compiler."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if not isinstance(self.bases[adapter_name], Basis) or device is None:
            return
        if dtype is not None and dtype.is_floating_point:
            self._operands(adapter_name, device, dtype)

    def get_scaled_bases(self, adapter: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return the two factors of the update in the order in which they multiply an input, without ``scaling``.

        Args:
            adapter: name of the adapter.
            device: device of the results; by default that of λ.

        Returns:
            (first, second) with ``F.linear(F.linear(x, first), second)`` the unscaled update: Ã (q, m) and B (M, q),
            or Bᵀ and Ãᵀ where out < in. q = n·r.
        """
        lam, gamma = self.randlora_lambda[adapter], self.randlora_gamma[adapter]
        device = lam.device if device is None else device
        lam, gamma = lam.to(device), gamma.to(device)
        A, B = self.basis(adapter).tensors(device, at_least_float32(lam.dtype), self.sizes(adapter))
        scaled = DenseBases(A.unsqueeze(1), B, B.dtype).scaled(lam, gamma)
        return (scaled, B) if self.out_features >= self.in_features else (B.T, scaled.T)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ΔW in the layout of the base layer's weight, on its device, in float32 or wider.

        Args:
            adapter: name of the adapter.
        """
        return self.delta_of(adapter, self.randlora_lambda[adapter], self.randlora_gamma[adapter])

    def delta_of(self, adapter: str, lam: Tensor, gamma: Tensor) -> Tensor:
        """Return :meth:`get_delta_weight` of an adapter with these λ and γ in place of its own."""
        return self._to_weight_layout(self._update_of(adapter, lam, gamma))

    def _update_of(self, adapter: str, lam: Tensor, gamma: Tensor) -> Tensor:
        """Return ΔW (out, in) of λ (r, n) and γ (n, m) with the bases and the scaling of the adapter."""
        dtype = at_least_float32(lam.dtype)
        bases = self._operands(adapter, lam.device, dtype)
        wide = self.out_features < self.in_features
        with without_autocast(lam.device.type):
            return ops.delta_weight(bases, lam.to(dtype), gamma.to(dtype), self._scaling(adapter), wide)

    @property
    def weight(self) -> Tensor:
        """W plus the updates of the active adapters, for a parent that reads it: see :func:`read_weight`."""
        return read_weight(self)

    def with_updates(self, weight: Tensor, adapter_names: list[str]) -> Tensor:
        """Return ``weight`` plus the updates of adapters, in the dtype of ``weight``, differentiable in all of them."""
        total = weight
        for name in adapter_names:
            total = total + self.get_delta_weight(name).to(weight.device)
        return total.to(weight.dtype)

    def drops(self, adapter_name: str) -> bool:
        """Return whether the adapter's dropout is active."""
        dropouts: Dropouts = self._modules["randlora_dropout"]  # type: ignore[attr-defined]
        return adapter_name in dropouts and dropouts[adapter_name].training

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the adapters to the base weight.

        The original weight is kept aside until ``unmerge``, which restores it bit for bit.

        Args:
            safe_merge: whether to refuse a merged weight that is not finite, leaving the layer unchanged.
            adapter_names: adapters to merge; by default the active ones.

        Raises:
            MergeError: as :meth:`require_mergeable`; with ``safe_merge``, if the merged weight holds NaN or infinity.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.randlora_lambda]
        if not names:
            return
        self.require_mergeable()
        self._require_intact()
        self._put_merged_weight(self.merged_weight(names, safe_merge))
        self._merged_bits = self._weight_bits()
        self.merged_adapters.extend(names)

    def require_mergeable(self) -> None:
        """Check that W + ΔW may take the place of W, without a change of the layer.

        Raises:
            MergeError: if the base layer cannot store W + ΔW, or would compute something else with it than the adapter.
        """
        base = self.get_base_layer()
        weight = require_stored(base, self.parameter_name, self._where())
        plain = is_plain(base) and (has_plain_product(base) or type(base) is nn.Embedding)
        if not (plain or self._exchanges_weight() or is_only_moved(base)):
            with without_autocast(weight.device.type):
                x = self._probe(weight.detach())
                require_linear(base, self.parameter_name, x, lambda change: self._product(x, change), self._where())

    def _exchanges_weight(self) -> bool:
        """Return whether the unmerged layer runs with W + ΔW in place of W, so that merging changes no output."""
        return False

    def _probe(self, weight: Tensor) -> Tensor:
        """Return a small input of the base layer."""
        raise NotImplementedError

    def _product(self, x: Tensor, update: Tensor) -> Tensor:
        """Return the part of the output for ``x`` that an update, in the layout of the weight, adds."""
        raise NotImplementedError

    def _where(self) -> str:
        name = f"{self.path!r}" if self.path else f"an adapted layer of {self.out_features}×{self.in_features}"
        return f"{name}, a {type(self.get_base_layer()).__name__},"

    def merged_weight(self, adapter_names: list[str], require_finite: bool = False) -> Tensor:
        """Return the base weight plus the updates of ``adapter_names``, summed in float32 or wider and rounded once.

        Raises:
            MergeError: with ``require_finite``, if it holds NaN or infinity.
        """
        weight = self._dense_base_weight()
        total = weight
        for name in adapter_names:
            total = total + self.get_delta_weight(name).detach().to(weight.device)
        merged = total.to(weight.dtype)
        if require_finite and not torch.isfinite(merged).all():
            raise MergeError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken: "
                f"merging it into a {self.out_features}×{self.in_features} layer of {merged.dtype} gives values that "
                "are not finite. The base weights are unchanged."
            )
        return merged

    def unmerge(self) -> None:
        """Put the original base weight back, bit for bit.

        Raises:
            MergeError: if the merged weight was written or replaced, so that it is not the original plus updates.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._require_intact()
        self._restore_base_weight()
        self._merged_bits = None
        self.merged_adapters = []

    def _weight_bits(self) -> int | None:
        base = self.get_base_layer()
        weight = (base._buffers | base._parameters).get(self.parameter_name)  # not a computed weight
        return None if weight is None else checksum(weight)

    def _is_intact(self) -> bool:
        """Return whether the base weight is still the merged one, as far as its bits can be read."""
        found = None if self._merged_bits is None else self._weight_bits()
        return found is None or found == self._merged_bits

    def _require_intact(self) -> None:
        if not self._is_intact():
            raise MergeError(
                f"the base weight of {self._where()} was changed while {', '.join(self.merged_adapters)} was merged "
                "into it, so that it is not a sum with the weight that unmerging would put back. To keep it as it is "
                "now, call `unload()`; to go back, load the merged weight again."
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether a LoRA in PEFT can take the place of the update; PEFT asks before it converts."""
        return self.why_no_lora() is None

    def why_no_lora(self) -> str | None:
        """Return why no LoRA in PEFT can take the place of the update, or ``None`` if one can."""
        if not self.is_linear:
            return "only the weights of linear layers can be converted"
        if self.read_by_parent:
            return (
                "the module around it computes with its weight and does not call it, so that a LoRA would have no "
                "effect there"
            )
        return None

    def _base_weight(self) -> nn.Parameter:
        return cast("nn.Parameter", getattr(self.get_base_layer(), self.parameter_name))

    def original_weight(self) -> nn.Parameter:
        """Return the original parameter of the base model, also while adapters are merged."""
        return self._base_weight() if self._unmerged_weight is None else self._unmerged_weight[0]

    def _dense_base_weight(self) -> Tensor:
        """Return the base weight as plain numbers."""
        return self._base_weight().data

    def _put_merged_weight(self, merged: Tensor) -> None:
        """Give the base layer ``merged`` as a weight of its own, and keep the original aside.

        Layers that share the original, such as the output layer of a language model, keep it unchanged.
        """
        weight = self._base_weight()
        if self._unmerged_weight is None:
            self._unmerged_weight = (weight,)
        if isinstance(weight, nn.Parameter):  # `remove_parametrizations` may leave a plain frozen tensor
            merged = nn.Parameter(merged, requires_grad=weight.requires_grad)
        setattr(self.get_base_layer(), self.parameter_name, merged)

    def _restore_base_weight(self) -> None:
        """Put back the original that ``_put_merged_weight`` kept."""
        if self._unmerged_weight is not None:
            merged = require_stored(self.get_base_layer(), self.parameter_name, self._where())
            (weight,) = self._unmerged_weight
            # the model may have been moved or cast in between
            weight.data = weight.data.to(device=merged.device, dtype=merged.dtype)
            setattr(self.get_base_layer(), self.parameter_name, weight)
        self._unmerged_weight = None

    def _plain_weight(self, adapter_name: str, x: Tensor) -> Tensor | None:
        """Return the base weight if the base layer is only its product with the adapter's own input, else ``None``.

        It is ``None`` where the base layer must be called (:func:`is_plain`), for a quantised or sharded weight, and
        with active dropout.
        """
        base: Any = self._modules["base_layer"]  # type: ignore[attr-defined]
        if not (has_plain_product(base) and is_plain(base)) or self.drops(adapter_name):
            return None
        weight = base.weight
        plain = type(weight) in (nn.Parameter, Tensor) and weight.dtype in FLOATING and weight.device == x.device
        return weight if plain else None

    def _call_base(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the base layer's own output, a tensor.

        Raises:
            UnsupportedLayerError: if the output is not a tensor.
        """
        result = self.base_layer(x, *args, **kwargs)
        if not isinstance(result, Tensor):
            raise UnsupportedLayerError(
                f"{self._where()} returns a {type(result).__name__}, to which no update can be added: add "
                f"{self.path or 'the module'!r} to `exclude_modules`"
            )
        return result

    def _add(self, result: Tensor, update: Tensor) -> Tensor:
        """Return the sum of ``result`` and ``update``, in the dtype of ``result``.

        Raises:
            UnsupportedLayerError: if the two differ in shape.
        """
        if result.shape != update.shape:
            raise UnsupportedLayerError(
                f"{self._where()} gives an output of shape {tuple(result.shape)}, where its update is of shape "
                f"{tuple(update.shape)}: its forward is another than that of its kind. Add "
                f"{self.path or 'the module'!r} to `exclude_modules`."
            )
        return result + update.to(result.dtype)

    def _own_input(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return the adapter's input: that of the layer, after dropout."""
        dropouts: Dropouts = self._modules["randlora_dropout"]  # type: ignore[attr-defined]
        return dropouts[adapter_name](x) if adapter_name in dropouts else x

    def _to_weight_layout(self, update: Tensor) -> Tensor:
        """Return an update (out, in) in the layout in which the base layer stores its weight."""
        raise NotImplementedError

    def basis(self, adapter_name: str) -> Basis:
        """Return the adapter's bases.

        Raises:
            BasisMismatchError: if the bases must come from the adapter's file, and no file has been loaded.
        """
        return known_basis(self.bases[adapter_name])

    def _operands(
        self, adapter_name: str, device: torch.device, dtype: torch.dtype, tokens: int | None = None
    ) -> Operands:
        """Return this layer's slices of the shared bases, for products in ``dtype``."""
        return self.basis(adapter_name).operands(device, dtype, self.sizes(adapter_name), tokens)

    def _lookup(self, adapter_name: str, device: torch.device, dtype: torch.dtype) -> RowOperands:
        """Return this layer's slices of the shared bases in their stored form, for layers that read a few rows."""
        return self.basis(adapter_name).lookup(device, dtype, self.sizes(adapter_name))

    def sizes(self, adapter_name: str) -> Sizes:
        """Return the sizes of the slices of the adapter's bases that this layer reads."""
        return Sizes(self.max_dim, self.min_dim, self.num_bases[adapter_name])

    def _scalings(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return λ and γ, bypassing attribute lookups, which take longer than a small product."""
        modules = self._modules  # type: ignore[attr-defined]
        try:  # by `[]`, which DeepSpeed watches to gather sharded tensors
            lam = modules["randlora_lambda"]._parameters[adapter_name]
            return lam, modules["randlora_gamma"]._parameters[adapter_name]
        except KeyError:  # below FSDP they are not parameters
            return self.randlora_lambda[adapter_name], self.randlora_gamma[adapter_name]

    def _scaling(self, adapter_name: str) -> float:
        """Return the factor of the operands' update."""
        return self.scaling[adapter_name] * self.basis(adapter_name).factor

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        if is_parametrized(base_layer, self.parameter_name):  # reading changes a spectral norm
            first = next(base_layer.parametrizations[self.parameter_name].parameters())
            return first.device, first.dtype
        return super()._get_base_layer_device_and_dtype(base_layer)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move λ and γ to the base layer's device, or to ``device``; ``autocast_adapter_dtype`` sets their dtype."""
        if device is None:
            base_layer = self.get_base_layer()
            device, _ = self._get_base_layer_device_and_dtype(base_layer)
            if device is not None and device.type == "meta" and hasattr(base_layer, "_hf_hook"):
                # the device to which Accelerate will move the weight
                device = getattr(base_layer._hf_hook, "execution_device", None)
        if device is None:
            return
        device = torch.device(device)
        for parameters in (self.randlora_lambda, self.randlora_gamma):
            held = parameters.get(adapter_name, None)
            if held is not None and held.device != device and held.device.type != "meta":
                parameters[adapter_name] = nn.Parameter(held.detach().to(device), requires_grad=held.requires_grad)


class ProjectionView(Mapping[str, Tensor]):
    """Copies of the current bases by adapter, under PEFT's names ``randlora_A`` and ``randlora_B``.

    Writing into a copy does not change the bases, which all layers and adapters with the same numbers share.

    Args:
        bases: function that returns the adapters' bases.
        which: 0 for A, 1 for B.
    """

    def __init__(self, bases: Callable[[], Mapping[str, Basis | AwaitedBasis]], which: int) -> None:
        self._bases = bases
        self._which = which

    def __getitem__(self, adapter_name: str) -> Tensor:
        return known_basis(self._bases()[adapter_name]).projections()[self._which]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bases())

    def __len__(self) -> int:
        return len(self._bases())


def adapted(model: nn.Module, *adapters: str) -> dict[str, RandLoraLayer]:
    """Return the adapted layers of ``model`` by name; given adapters, only the layers that carry one of them."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RandLoraLayer)}
    if not adapters:
        return layers
    return {name: layer for name, layer in layers.items() if any(a in layer.r for a in adapters)}


def innermost(layer: nn.Module) -> nn.Module:
    """Return the module inside all adapters."""
    while hasattr(layer, "base_layer"):
        layer = cast("nn.Module", layer.base_layer)
    return layer


def known_basis(basis: Basis | AwaitedBasis) -> Basis:
    """Return the basis itself.

    Raises:
        BasisMismatchError: if the basis must come from a file, and no file has been loaded.
    """
    if isinstance(basis, AwaitedBasis):
        raise basis.error()
    return basis
