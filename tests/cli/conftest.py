"""Adapters of a tiny language model, as folders."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from randlora import RandLoraConfig, get_peft_model


def save_adapter(base: str, folder: Path, seed: int = 0, **config) -> Path:
    """An adapter with random λ and γ."""
    values = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), RandLoraConfig(**values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, tiny_llama) -> Path:
    """Without bases, as `randlora train` saves."""
    return save_adapter(tiny_llama, tmp_path_factory.mktemp("adapter"), save_projection=False)


@pytest.fixture(scope="session")
def adapter_with_bases(tmp_path_factory, tiny_llama) -> Path:
    """The same λ and γ, with bases; q and k are square, so that these are whole."""
    return save_adapter(tiny_llama, tmp_path_factory.mktemp("bases"), target_modules=["q_proj", "k_proj"])
