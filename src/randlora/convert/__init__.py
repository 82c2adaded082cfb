"""Adapters as something else: a LoRA adapter, or merged weights."""

from randlora.convert.lora import ConvertedLayer, LoraConversion, to_lora
from randlora.convert.merged import save_merged

__all__ = ["ConvertedLayer", "LoraConversion", "save_merged", "to_lora"]
