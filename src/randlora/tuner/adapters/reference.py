"""The adapter that preference trainers compare a trained one with: a second one, which starts as a copy of it.

TRL's DPO, KTO, GRPO and RLOO call ``model.add_adapter("ref", model.peft_config["default"])`` and copy each parameter
whose name holds ``.default.``. Names of λ and γ end there, so TRL passes over them, and over the rows of embeddings
that are trained. They are copied when such an adapter is added.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftConfig
from torch import nn

from randlora.tuner.layers.base import adapted

_TRAINED, _REFERENCE = "default", "ref"


def is_reference(configs: Mapping[str, PeftConfig], adapter_name: str) -> bool:
    """Return whether the adapter is named as TRL's reference and has the very config object of the trained one."""
    return adapter_name == _REFERENCE and configs.get(_TRAINED) is configs[adapter_name]


@torch.no_grad()
def fill_reference(model: nn.Module) -> None:
    """Give the reference the tensors that TRL leaves out, and the state beside: bases of a file, scaling."""
    for layer in adapted(model, _REFERENCE).values():
        layer.bind_basis(_REFERENCE, layer.bases[_TRAINED])
        for held in (layer.scaling, layer.initial_scaling, layer.gamma_factor):
            held[_REFERENCE] = held[_TRAINED]
    for name, parameter in list(model.named_parameters()):
        owner, _, adapter = name.rpartition(".")
        if adapter == _TRAINED:
            model.get_parameter(f"{owner}.{_REFERENCE}").copy_(parameter)
