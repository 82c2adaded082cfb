"""What a model with adapters should be, said with dense weights: W + Σ scale·ΔW, in float64.

Adapters are known by the paths of the layers that they adapt, as in a model in which nothing is wrapped.
"""

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from randlora import RandLoraConfig, RandLoraLayer
from randlora.ops import naive

from .models import Mixed

# of updates, which are float32 where the model is float64
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.1}


@dataclass
class Part:
    """What an adapter has in one layer."""

    lam: Tensor
    gamma: Tensor
    bases: tuple[Tensor, Tensor]  # A (r, m), B (M, n·r)
    shape: tuple[int, int]  # (out, in)
    initial: float  # scale, by the config
    scale: float  # now

    @classmethod
    def of(cls, layer: RandLoraLayer, name: str, path: str, config: RandLoraConfig) -> "Part":
        lam, gamma = (held[name].detach().clone() for held in (layer.randlora_lambda, layer.randlora_gamma))
        bases = layer.basis(name).tensors(torch.device("cpu"), torch.float64, layer.sizes(name))
        rank, count = lam.shape[-2:]
        alpha = next((a for key, a in config.alpha_pattern.items() if path.endswith(key)), config.randlora_alpha)
        scale = alpha / (rank * (math.sqrt(count) if config.randlora_scaling == "paper" else 1))
        return cls(lam, gamma, bases, (layer.out_features, layer.in_features), scale, scale)

    def update(self, scale: float) -> Tensor:
        """ΔW (out, in), of experts one for each."""
        A, B, lam, gamma = (value.double() for value in (*self.bases, self.lam, self.gamma))
        if lam.ndim == 2:
            return naive.delta_weight(A, B, lam, gamma, scale, *self.shape)
        pairs = zip(lam, gamma, strict=True)
        return torch.stack([naive.delta_weight(A, B, *pair, scale, *self.shape) for pair in pairs])


@dataclass
class Adapter:
    config: RandLoraConfig
    parts: dict[str, Part]  # by path
    classifier: nn.Module | None  # its own, where modules_to_save says so
    trains: bool = False


@dataclass
class Reference:
    """The plain model, its adapters, and which of them are in force."""

    plain: Mixed
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    enabled: bool = True
    merged: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by path and adapter: updates when merged
    wrapped: set[str] = field(default_factory=set)  # paths that any adapter has ever had: as in PEFT, they stay wrapped

    @property
    def dtype(self) -> torch.dtype:
        return self.plain.back.weight.dtype

    def add(
        self, name: str, config: RandLoraConfig, layers: dict[str, RandLoraLayer], classifier: nn.Module | None
    ) -> None:
        """Notes an adapter that has just come. As in PEFT, that unmerges what was merged, and makes nothing active."""
        self.unmerge()
        parts = {p: Part.of(layer, name, p, config) for p, layer in layers.items() if name in layer.randlora_lambda}
        self.adapters[name] = Adapter(config, parts, copy.deepcopy(classifier))
        self.wrapped |= parts.keys()

    def activate(self, names: list[str], trains: bool = True) -> None:
        """As in PEFT, that unmerges too."""
        self.unmerge()
        self.active = list(names)
        for name, adapter in self.adapters.items():
            adapter.trains = name in names and trains

    def enable(self, enabled: bool) -> None:
        self.enabled = enabled
        for name, adapter in self.adapters.items():
            adapter.trains = name in self.active and enabled

    def merge(self, names: list[str]) -> None:
        for name in names:
            for path in self.adapters[name].parts:
                self.merged.setdefault(path, {}).setdefault(name, self.update(name, path))

    def unmerge(self) -> None:
        self.merged = {}

    def is_merged(self, name: str) -> bool:
        return any(name in updates for updates in self.merged.values())

    def delete(self, name: str) -> None:
        del self.adapters[name]
        if name in self.active:
            self.activate([n for n in self.active if n != name] or sorted(self.adapters)[:1])

    def cast(self, dtype: torch.dtype) -> None:
        self.plain.to(dtype)
        for adapter in self.adapters.values():
            for part in adapter.parts.values():
                part.lam, part.gamma = part.lam.to(dtype), part.gamma.to(dtype)
            if adapter.classifier is not None:
                adapter.classifier.to(dtype)

    def update(self, name: str, path: str, as_saved: bool = False) -> Tensor:
        """ΔW as the layer at ``path`` stores its weight."""
        part = self.adapters[name].parts[path]
        update = part.update(part.initial if as_saved else part.scale)
        weight = self.plain.get_parameter(weight_of(path))
        return (update.T if path.startswith(("embedding", "conv1d")) else update).reshape(weight.shape)

    def dense(self) -> Mixed:
        """The model as it is, of dense weights. A disabled one unmerges."""
        if not self.enabled:
            self.unmerge()
            return self._dense({}, None)
        updates = {path: self.merged.get(path) or self._updates(path) for path in self.wrapped}
        classifiers = [self.adapters[name].classifier for name in self.active if self.adapters[name].classifier]
        return self._dense(updates, classifiers[0] if classifiers else None, everywhere=self.merged)

    def dense_alone(self, name: str) -> Mixed:
        """The one adapter, as it is saved, in a model of its own."""
        adapter = self.adapters[name]
        updates = {path: {name: self.update(name, path, as_saved=True)} for path in adapter.parts}
        return self._dense(updates, adapter.classifier)

    def _updates(self, path: str) -> dict[str, Tensor]:
        return {name: self.update(name, path) for name in self.active if path in self.adapters[name].parts}

    def _dense(
        self, updates: dict[str, dict[str, Tensor]], classifier: nn.Module | None, everywhere: Collection[str] = ()
    ) -> Mixed:
        """The plain model with updates in its weights, none of which is tied to another, in float64.

        Of a module at two places PEFT wraps the first. But its merged weight is ``everywhere``.
        """
        dense = copy.deepcopy(self.plain)
        dense.again = copy.deepcopy(dense.again)
        dense.double()
        if classifier is not None:
            dense.classifier = copy.deepcopy(classifier).double()
        for path, added in updates.items():
            if added:
                owner, _, weight = weight_of(path).rpartition(".")
                module = dense.get_submodule(owner)
                total = nn.Parameter(getattr(module, weight) + sum(added.values()))
                setattr(module, weight, total)
                if "shared" in path and path in everywhere:
                    dense.again.weight = total
        return dense


def weight_of(path: str) -> str:
    """Name of the weight of an adapted place in the plain model."""
    attention = path.startswith("attention") and not path.endswith("out_proj")
    return f"{path}.in_proj_weight" if attention else f"{path}.weight"
