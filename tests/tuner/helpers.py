"""Tiny models, and the two implementations side by side."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.randlora import RandLoraConfig as TheirConfig
from peft.tuners.randlora import RandLoraModel as TheirModel
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from randlora import PeftModel, RandLoraConfig, RandLoraLayer, RandLoraModel, get_peft_model
from randlora.tuner.register import register

STACK_TARGETS = ["tall", "wide", "square"]
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Stack(nn.Module):
    """A tall, a wide and a square layer and a head; no dimension is a multiple of another."""

    def __init__(self, kind: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.tall, self.wide, self.square = kind(10, 17), kind(17, 9), kind(9, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.tall, self.wide, self.square):
            x = torch.tanh(layer(x))
        return self.head(x)


def conv1d(in_features: int, out_features: int) -> Conv1D:
    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.weight, std=in_features**-0.5)
    nn.init.normal_(layer.bias)
    return layer


def stack() -> Stack:
    torch.manual_seed(1)
    return Stack()


def conv_stack() -> Stack:
    torch.manual_seed(1)
    return Stack(conv1d)


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))


def bert(**changes) -> BertForSequenceClassification:
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 26, "num_hidden_layers": 2}
    rest = {"num_attention_heads": 2, "max_position_embeddings": 32, "num_labels": 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**{**sizes, **rest, **dropout, **changes}))


def gpt2(**changes) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **dropout, **special, **changes}))


MODELS = {
    "stack": (stack, STACK_TARGETS),
    "conv1d": (conv_stack, STACK_TARGETS),
    "llama": (llama, LLAMA_TARGETS),
    "bert": (bert, ["query", "key", "value", "dense"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
}
"""Every tiny model, with all its layers as targets."""


def adapted(
    build: Callable[[], nn.Module] = stack,
    targets: list[str] | str | None = None,
    name: str = "default",
    seed: int = 3,
    **config,
) -> PeftModel:
    """A model with a trained adapter, in evaluation mode; by default of all layers, r=4 and α=8."""
    targets = dict(MODELS.values()).get(build) if targets is None else targets
    values = {"r": 4, "randlora_alpha": 8, "target_modules": targets, **config}
    return randomise(get_peft_model(build(), RandLoraConfig(**values), adapter_name=name), name, seed).eval()


def saved(folder: Path, build: Callable[[], nn.Module] = stack, **config) -> PeftModel:
    """``adapted``, and saved in ``folder``."""
    model = adapted(build, **config)
    model.save_pretrained(folder)
    return model


def tokens(count: int = 8, batch: int = 3) -> torch.Tensor:
    return torch.randint(0, 50, (batch, count), generator=torch.Generator().manual_seed(5))


def features(dtype: torch.dtype = torch.float32, batch: tuple[int, ...] = (6,)) -> torch.Tensor:
    return torch.randn(*batch, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def output(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the model makes of a fixed input."""
    if any(isinstance(module, Stack) for module in model.modules()):
        return model(features(dtype))
    return model(input_ids=tokens()).logits


def randomise(model: nn.Module, adapter: str = "default", seed: int = 3, scale: float = 0.3) -> nn.Module:
    """λ and γ as of a trained adapter: nothing zero, nothing constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((f"randlora_lambda.{adapter}", f"randlora_gamma.{adapter}")):
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(values * (scale if "lambda" in name else 0.1))
    return model


def layers_of(model: nn.Module) -> dict[str, RandLoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RandLoraLayer)}


def ours(model: nn.Module, adapter: str = "default", **config) -> RandLoraModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is larger than the smaller dimension")
        return RandLoraModel(model, RandLoraConfig(**config), adapter)


def theirs(model: nn.Module, adapter: str = "default", **config) -> TheirModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        return TheirModel(model, TheirConfig(**config), adapter)


def side_by_side(
    build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, **config
) -> tuple[TheirModel, RandLoraModel]:
    """PEFT's model and ours with the same base weights, λ and γ; each has drawn its own bases.

    The updates are moderate: large ones saturate softmax and tanh, and then any rounding is magnified.
    """
    their_model = randomise(theirs(build(), **config), scale=0.1).to(dtype)
    our_model = ours(build(), **config).to(dtype)
    copy_adapter(their_model, our_model)
    return their_model, our_model


def copy_adapter(source: nn.Module, target: nn.Module) -> None:
    parameters = dict(source.named_parameters())
    names = [name for name, _ in target.named_parameters() if "randlora_" in name]
    assert names
    assert names == [name for name in parameters if "randlora_" in name]
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "randlora_" in name:
                parameter.copy_(parameters[name])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str = "") -> None:
    """Relative error of the whole tensor."""
    assert found.shape == expected.shape, name
    assert found.isfinite().all(), name
    error = (found.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm(), f"{name}: {error / expected.double().norm():.2e}"


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy({name: value.detach() for name, value in model.state_dict().items()})


@contextmanager
def peft_itself() -> Iterator[None]:
    """PEFT's own classes in PEFT's registries, as if randlora had never been imported."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] = TheirConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = TheirModel
    try:
        yield
    finally:
        register()
