"""Adapters as something else: a LoRA adapter, merged weights, or a smaller file."""

from randlora.convert.compact import Compacted, compact_adapter
from randlora.convert.lora import ConvertedLayer, LoraConversion, convert_folder_to_lora, to_lora
from randlora.convert.shards import save_merged

__all__ = [
    "Compacted",
    "ConvertedLayer",
    "LoraConversion",
    "compact_adapter",
    "convert_folder_to_lora",
    "save_merged",
    "to_lora",
]
