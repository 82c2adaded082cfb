"""RandLoRA: full-rank parameter-efficient fine-tuning on Hugging Face PEFT.

Importing this package puts its classes in PEFT's registries for ``PeftType.RANDLORA``, so that PEFT, Transformers and
everything built on them use these classes.
"""

from randlora.quiet import quiet_imports

with quiet_imports():
    from peft import PeftModel, get_peft_model

    from randlora.errors import (
        AdapterNamesError,
        BasisMismatchError,
        CheckpointError,
        CombinationError,
        ConfigError,
        HotswapError,
        MergeError,
        RandLoraError,
        UnsupportedLayerError,
    )
    from randlora.ops.rounding import set_stochastic_rounding
    from randlora.tuner.config import RandLoraConfig
    from randlora.tuner.files.hotswap import hotswap_adapter
    from randlora.tuner.layers.base import RandLoraLayer
    from randlora.tuner.layers.linear import Linear
    from randlora.tuner.layers.quantized import Linear4bit, Linear8bitLt, QuantizedLinear
    from randlora.tuner.layers.weight_cache import set_weight_cache
    from randlora.tuner.model import RandLoraModel
    from randlora.tuner.register import register

__version__ = "0.1.0"

__all__ = [
    "AdapterNamesError",
    "BasisMismatchError",
    "CheckpointError",
    "CombinationError",
    "ConfigError",
    "HotswapError",
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "MergeError",
    "PeftModel",
    "QuantizedLinear",
    "RandLoraConfig",
    "RandLoraError",
    "RandLoraLayer",
    "RandLoraModel",
    "UnsupportedLayerError",
    "get_peft_model",
    "hotswap_adapter",
    "set_stochastic_rounding",
    "set_weight_cache",
]

register()
