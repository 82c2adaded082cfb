"""The number format of the frozen pretrained weights, beneath the adapter."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings

_HEADS = ["classifier", "score", "lm_head"]  # not quantised: heads are new, or feed a softmax


def weights_as(settings: TrainSettings) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for the weights: float32, or codes of 4 or 8 bits.

    Raises:
        ConfigError: if bitsandbytes is not installed.
    """
    if settings.quantization == "none":
        return {"dtype": "float32"}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization={settings.quantization!r} needs bitsandbytes: pip install 'randlora[quant]'")
    compute = torch.bfloat16 if settings.bf16 else torch.float32
    if settings.quantization == "8bit":
        return {
            "quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_HEADS),
            "dtype": compute,
        }
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=_HEADS,
    )
    return {"quantization_config": four_bits, "dtype": compute}
