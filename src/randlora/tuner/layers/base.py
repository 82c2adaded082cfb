"""The state and the operations that every kind of adapted layer has: once, for all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from randlora.errors import MergeError
from randlora.ops import linear as ops
from randlora.ops.bases import AwaitedBasis, Basis, num_bases
from randlora.tuner.layers.scaled import ScaledLayer


class RandLoraLayer(ScaledLayer):
    """Adapters of one base layer.

    A subclass wraps one kind of base layer: it sets ``in_features`` and ``out_features``, says how its weight is laid
    out, and computes its forward.

    Attributes:
        randlora_lambda: per adapter λ of shape (r, n), trained, float32.
        randlora_gamma: per adapter γ of shape (n, m), trained, float32; m = min(in, out).
        bases: per adapter the frozen A and B, shared with all other layers; no part of the module tree.
        r: per adapter the rank of each basis.
        scaling: per adapter the factor of the update.
        gamma_factor: per adapter the share of the scaling that γ holds already, 1 unless γ is as a file has it.
    """

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
        self.randlora_dropout = nn.ModuleDict({})
        self.bases: dict[str, Basis | AwaitedBasis] = {}
        self.r: dict[str, int] = {}
        self.num_bases: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.gamma_factor: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged_weight: Tensor | None = None

    @property
    def min_dim(self) -> int:
        """m, the smaller dimension of the weight."""
        return min(self.in_features, self.out_features)

    @property
    def max_dim(self) -> int:
        """M, the larger dimension of the weight."""
        return max(self.in_features, self.out_features)

    @property
    def randlora_A(self) -> Mapping[str, Tensor]:
        """Per adapter the whole basis A of shape (r, 1, m); every layer reads a slice of it."""
        return ProjectionView(lambda: self.bases, 0)

    @property
    def randlora_B(self) -> Mapping[str, Tensor]:
        """Per adapter the whole basis B of shape (M, n, r); every layer reads a slice of it."""
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
        """Adds the parameters of an adapter; its bases are bound when all layers are known (``bind_basis``)."""
        n = num_bases(r, self.min_dim)
        self.r[adapter_name], self.num_bases[adapter_name] = r, n
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = scaling
        self.gamma_factor[adapter_name] = gamma_factor
        self.randlora_dropout[adapter_name] = nn.Dropout(randlora_dropout) if randlora_dropout > 0 else nn.Identity()
        self.randlora_lambda[adapter_name] = nn.Parameter(torch.randn(r, n, dtype=torch.float32))
        self.randlora_gamma[adapter_name] = nn.Parameter(
            torch.full((n, self.min_dim), gamma_factor / self.max_dim, dtype=torch.float32)
        )
        if init_weights:
            self.reset_randlora_parameters(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def reset_randlora_parameters(self, adapter_name: str) -> None:
        """λ = 0 and γ = 1 / max(n, m), as the authors' code and PEFT do."""
        if adapter_name in self.randlora_lambda:
            gamma = self.randlora_gamma[adapter_name]
            nn.init.zeros_(self.randlora_lambda[adapter_name])
            nn.init.constant_(gamma, self.gamma_factor[adapter_name] / max(gamma.shape))

    def unfold_gamma(self, adapter_name: str) -> None:
        """Takes the scaling's share back from γ, whose values are about to be replaced."""
        for scaling in (self.scaling, self.initial_scaling):
            scaling[adapter_name] *= self.gamma_factor[adapter_name]
        self.gamma_factor[adapter_name] = 1.0

    def bind_basis(self, adapter_name: str, basis: Basis | AwaitedBasis) -> None:
        """Gives the adapter its bases, and casts them for the base layer: not while a compiled step is traced."""
        self.bases[adapter_name] = basis
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if isinstance(basis, Basis) and dtype is not None and dtype.is_floating_point:
            basis.tensors(device, dtype)

    def get_scaled_bases(self, adapter: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """The two factors of the update in the order in which they are applied to an input, without ``scaling``.

        Returns:
            (first, second) with ``F.linear(F.linear(x, first), second)`` the unscaled update: Ã (q, m) and B (M, q),
            or Bᵀ and Ãᵀ where out < in. q = n·r.
        """
        lam, gamma = self.randlora_lambda[adapter], self.randlora_gamma[adapter]
        device = lam.device if device is None else device
        lam, gamma = lam.to(device), gamma.to(device)
        A, B = self._sliced_bases(adapter, device, _at_least_float32(lam.dtype))
        scaled = ops.scaled_basis(A, lam, gamma, A.dtype)
        return (scaled, B) if self.out_features >= self.in_features else (B.T, scaled.T)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in the layout of the base layer's weight, on its device, in float32 or wider.

        Args:
            adapter: name of the adapter.
        """
        lam, gamma = self.randlora_lambda[adapter], self.randlora_gamma[adapter]
        A, B = self._sliced_bases(adapter, lam.device, _at_least_float32(lam.dtype))
        wide = self.out_features < self.in_features
        return self._to_weight_layout(ops.delta_weight(A, B, lam, gamma, self.scaling[adapter], wide))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates of the adapters to the base weight.

        The original weight is kept aside until ``unmerge``, which restores it bit for bit.

        Args:
            safe_merge: refuse a merged weight that is not finite, and leave the layer as it was.
            adapter_names: adapters to merge; by default the active ones.

        Raises:
            MergeError: with ``safe_merge``, if the merged weight holds NaN or infinity.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.randlora_lambda]
        if not names:
            return
        merged = self.merged_weight(names, safe_merge)
        weight = self._base_weight()
        if self._unmerged_weight is None:
            self._unmerged_weight = weight.data
        weight.data = merged
        self.merged_adapters.extend(names)

    def merged_weight(self, adapter_names: list[str], require_finite: bool = False) -> Tensor:
        """The base weight plus the updates of ``adapter_names``, summed in float32 or wider and rounded once.

        Raises:
            MergeError: with ``require_finite``, if it holds NaN or infinity.
        """
        weight = self._base_weight().data
        total = weight
        for name in adapter_names:
            total = total + self.get_delta_weight(name).detach().to(weight.device)
        merged = total.to(weight.dtype)
        if require_finite and not torch.isfinite(merged).all():
            raise MergeError(
                f"NaNs detected in the merged weights: merging {', '.join(adapter_names)} into a "
                f"{self.out_features}×{self.in_features} layer of {merged.dtype} gives values that are not finite. "
                "The base weights are unchanged."
            )
        return merged

    def unmerge(self) -> None:
        """Puts the original base weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self._base_weight()
        if self._unmerged_weight is not None:
            # the model may have been moved or cast in between
            weight.data = self._unmerged_weight.to(device=weight.device, dtype=weight.dtype)
        self._unmerged_weight = None
        self.merged_adapters = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is additive, so that PEFT can approximate it by a LoRA."""
        return True

    def _base_weight(self) -> nn.Parameter:
        return cast("nn.Parameter", self.get_base_layer().weight)

    def _to_weight_layout(self, update: Tensor) -> Tensor:
        """(out, in) to the layout in which the base layer stores its weight."""
        raise NotImplementedError

    def basis(self, adapter_name: str) -> Basis:
        """The adapter's bases.

        Raises:
            BasisMismatchError: if they were to come from its file, and no file has been loaded.
        """
        return known_basis(self.bases[adapter_name])

    def _sliced_bases(self, adapter_name: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Views A (r, m) and B (M, q) of the shared bases."""
        A, B = self.basis(adapter_name).tensors(device, dtype)
        return A[:, : self.min_dim], B[: self.max_dim, : self.num_bases[adapter_name] * self.r[adapter_name]]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves λ and γ to the base layer's device; their dtype is the business of ``autocast_adapter_dtype``."""
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is None:
            return
        for parameters in (self.randlora_lambda, self.randlora_gamma):
            held = parameters.get(adapter_name, None)
            if held is not None and held.device != device and held.device.type != "meta":
                parameters[adapter_name] = nn.Parameter(held.detach().to(device), requires_grad=held.requires_grad)


class ProjectionView(Mapping[str, Tensor]):
    """What PEFT's users know as ``randlora_A`` and ``randlora_B``: the bases by adapter, as they are now.

    Args:
        bases: gives the adapters' bases.
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


def known_basis(basis: Basis | AwaitedBasis) -> Basis:
    """The basis itself.

    Raises:
        BasisMismatchError: if it was to come from a file, and no file has been loaded.
    """
    if isinstance(basis, AwaitedBasis):
        raise basis.error()
    return basis


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast asks for, else that of the input."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
