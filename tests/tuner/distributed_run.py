"""Trains a tiny model in one or two processes, through torchrun: ``distributed_run.py <one|ddp|fsdp1|fsdp2> <folder>``."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from randlora import RandLoraConfig, get_peft_model

STEPS, ROWS = 5, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    return get_peft_model(model, RandLoraConfig(r=4, randlora_alpha=80, target_modules=TARGETS))


def sharded(model):
    """FSDP2 as torch has it: Accelerate offers it on accelerators only."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def flattened(model):
    """FSDP1, likewise."""
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def main(mode, folder):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    distribute = {"fsdp1": flattened, "fsdp2": sharded}.get(mode, accelerator.prepare)
    model = distribute(build())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(0, 50, (ROWS, 9), generator=torch.Generator().manual_seed(1))
    mine = tokens.chunk(accelerator.num_processes)[accelerator.process_index]
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=mine, labels=mine).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())

    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    if mode == "fsdp1":  # each process counts its own share
        held = int(accelerator.reduce(torch.tensor(held), "sum"))
    names = [name for name, _ in (*model.named_buffers(), *model.named_parameters())]
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    plain = model.module if mode == "fsdp1" else accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        content = get_peft_model_state_dict(plain, state_dict=whole)
        report = {
            "losses": losses,
            "processes": accelerator.num_processes,
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
    main(sys.argv[1], Path(sys.argv[2]))
