"""Trains a tiny model in one or two processes, through torchrun: ``distributed_run.py <mode> <kind> <folder>``."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from peft import get_peft_model_state_dict
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from randlora import RandLoraConfig, get_peft_model

STEPS, ROWS = 5, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(kind="dense"):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    bases = {"structured": True, "groups": 4} if kind == "structured" else {}
    return get_peft_model(model, RandLoraConfig(r=4, randlora_alpha=80, target_modules=TARGETS, **bases))


def tokens():
    return torch.randint(0, 50, (ROWS, 9), generator=torch.Generator().manual_seed(1))


def sharded(model):
    """FSDP2 as torch has it: Accelerate offers it on accelerators only."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def flattened(model):
    """FSDP1, likewise."""
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def partitioned():
    """DeepSpeed ZeRO-3, with every parameter in shares however small it is."""
    import deepspeed  # installed aside, so here only

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # is compiled for a minute, and gloo does as well
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
    }
    return DeepSpeedPlugin(hf_ds_config=config)


def summed(value):
    dist.all_reduce(value)
    return value


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def prepared(mode, kind, accelerator):
    """Model and optimiser of one process."""
    if mode == "zero3":
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = (
            ROWS // dist.get_world_size()
        )
        model = build(kind)
        return accelerator.prepare(model, adam(model))
    model = {"fsdp1": flattened, "fsdp2": sharded}.get(mode, accelerator.prepare)(build(kind))
    return model, adam(model)


def main(mode, kind, folder):
    torch.set_num_threads(1)
    accelerator = Accelerator(deepspeed_plugin=partitioned()) if mode == "zero3" else Accelerator(cpu=True)
    model, optimizer = prepared(mode, kind, accelerator)
    rank, processes = dist.get_rank(), dist.get_world_size()
    mine = tokens().chunk(processes)[rank]
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=mine, labels=mine).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(summed(loss.detach()).item() / processes)

    with torch.no_grad():
        final = model(input_ids=tokens(), labels=tokens()).loss.item()

    held = sum(getattr(p, "ds_numel", p.numel()) for group in optimizer.param_groups for p in group["params"])
    if mode == "fsdp1":  # each process counts its own share
        held = summed(torch.tensor(held)).item()
    names = [name for name, _ in (*model.named_buffers(), *model.named_parameters())]
    if mode == "zero3":
        whole = accelerator.get_state_dict(model)
    else:
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    plain = model.module if mode == "fsdp1" else accelerator.unwrap_model(model)
    if rank == 0:
        content = get_peft_model_state_dict(plain, state_dict=whole)
        report = {
            "losses": losses,
            "final": final,
            "processes": processes,
            "kind": type(model).__name__,
            "optimized": held,
            "bases": [name for name in names if "randlora_A" in name or "randlora_B" in name],
            "saved": {name: list(value.shape) for name, value in content.items()},
        }
        plain.save_pretrained(folder / "adapter", state_dict=whole, is_main_process=True)
        (folder / "report.json").write_text(json.dumps(report))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:3], Path(sys.argv[3]))
