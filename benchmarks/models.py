"""The model shapes that benchmarks share, with random weights: only shapes matter for speed and size."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """A Llama; the vocabulary is small so that embeddings do not hide what the layers cost."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    rank: int  # of RandLoRA

    @property
    def matched_lora_rank(self) -> int:
        """The LoRA rank whose number of trainable parameters is nearest to RandLoRA's."""
        d, f, r = self.hidden, self.intermediate, self.rank
        randlora = 7 * -(-d // r) * (r + d)  # every one of the seven projections has d as its smaller dimension
        lora = 4 * (d + d) + 3 * (d + f)  # for each rank
        return round(randlora / lora)


LLAMA = Shape(hidden=1024, intermediate=2816, layers=4, heads=16, vocab=2048, rank=32)
LLAMA_QUICK = Shape(hidden=256, intermediate=704, layers=2, heads=4, vocab=512, rank=32)


def build(shape: Shape) -> LlamaForCausalLM:
    """The same fp32 weights at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocab,
    )
    return LlamaForCausalLM(config)
