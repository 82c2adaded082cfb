"""Models wrapped as torch, Accelerate and the Trainer wrap them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import compile_regions
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaRMSNorm

from randlora import RandLoraLayer

Wrap = Callable[[nn.Module], nn.Module]


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def each(kind: type[nn.Module] | tuple[type[nn.Module], ...], wrap: Wrap) -> Wrap:
    """Wraps each module of a kind, in place."""

    def wrap_all(model: nn.Module) -> nn.Module:
        for name, module in reversed(list(model.named_modules())):
            if name and isinstance(module, kind):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, wrap(module))
        return model

    return wrap_all


def checkpointed(model: nn.Module) -> nn.Module:
    """As Accelerate does below FSDP."""
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    return model


def fsdp(model: nn.Module) -> nn.Module:
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


BLOCKS = (LlamaDecoderLayer, LlamaRMSNorm)
WRAPPERS: dict[str, Wrap] = {
    "activation checkpointing": checkpointed,
    "checkpointed layers": each((RandLoraLayer, nn.Linear, LlamaRMSNorm), checkpoint_wrapper),
    "offloaded activations": each(BLOCKS, offload_wrapper),
    "compiled": compiled,
    "compiled base": each(LlamaForCausalLM, compiled),
    "compiled blocks": each(BLOCKS, compiled),
    "compiled layers": each((RandLoraLayer, LlamaRMSNorm), compiled),
    "compiled regions": lambda model: compile_regions(model, backend="eager"),
    "compiled and checkpointed": lambda model: compiled(each(BLOCKS, checkpoint_wrapper)(model)),
    "FSDP": fsdp,
    "FSDP and checkpointed": lambda model: checkpointed(fsdp(model)),
    "DDP": DistributedDataParallel,
    "DataParallel": DataParallel,
    "compiled DDP": lambda model: compiled(DistributedDataParallel(model)),
    "averaged": lambda model: AveragedModel(model, use_buffers=True),
}


@contextmanager
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
