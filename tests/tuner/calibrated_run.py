"""Quantises a tiny model by GPTQ or AWQ and adapts it: ``calibrated_run.py <method> <model> <output folder>``."""

import json
import sys
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

from randlora import MergeError, PeftModel, RandLoraConfig, RandLoraLayer, get_peft_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def quantise(method, source, folder):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 100, (64,), generator=generator).tolist() for _ in range(32)]
    config = {"gptq": {}, "awq": {"quant_method": "awq", "format": "gemm"}}[method]
    model = GPTQModel.load(source, QuantizeConfig(bits=4, group_size=32, **config), device="cpu")
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=4)
    model.save(str(folder))


def load(method, folder):
    """With the layers that train on any CPU; on one with AVX512-BF16 others would be taken, which refuse to."""
    configs = {"gptq": (GPTQConfig, "gptq_torch_aten"), "awq": (AwqConfig, "torch_awq")}
    kind, backend = configs[method]
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=torch.float16, quantization_config=kind(bits=4, backend=backend)
    )


def tokens():
    return torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(2))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits.float()


def train(model):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(8):
        loss = model.train()(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def worst_layer(model):
    """By how much, at worst, a layer misses base layer plus update, relative to the output's norm."""
    errors = []
    for layer in (module for module in model.modules() if isinstance(module, RandLoraLayer)):
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(3)).half()
        expected = layer.base_layer(x).float() + x.float() @ layer.get_delta_weight("default").T
        errors.append(((layer(x).float() - expected).norm() / expected.norm()).item())
    return max(errors)


def refusal(model):
    try:
        model.merge_adapter()
    except MergeError as error:
        return str(error)
    return None


def main(method, source, folder):
    quantised = folder / "quantised"
    quantise(method, source, quantised)
    base = load(method, quantised)
    before = logits(base)
    model = get_peft_model(base, RandLoraConfig(r=8, randlora_alpha=8, target_modules=TARGETS))
    kinds = sorted({type(m).__name__ for m in model.modules() if isinstance(m, RandLoraLayer)})
    start = (logits(model) - before).abs().max().item()
    losses = train(model)
    after = logits(model)
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(load(method, quantised), folder / "adapter")
    report = {
        "kinds": kinds,
        "base": type(next(m for m in model.modules() if isinstance(m, RandLoraLayer)).base_layer).__name__,
        "start": start,
        "losses": losses,
        "layers": worst_layer(model),
        "learned": (after - before).abs().max().item(),
        "reloaded": (logits(again) - after).abs().max().item(),
        "refusal": refusal(again),
        "unloaded": (logits(again.unload()) - before).abs().max().item(),
    }
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
