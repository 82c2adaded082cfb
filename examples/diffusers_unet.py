"""Fine-tunes the denoising network of a diffusion model with RandLoRA, through diffusers' own adapter methods.

``--model`` names a pipeline on the hub, such as "segmind/tiny-sd", whose UNet is taken; without it a tiny UNet with
random weights stands in, and no network is needed. Seconds on two cores:

    pip install diffusers
    python examples/diffusers_unet.py runs/unet
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from randlora import RandLoraConfig

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]  # attention, and the convolutions of the ResNet blocks


def unet(name: str | None) -> UNet2DConditionModel:
    """The frozen network."""
    if name is not None:
        return UNet2DConditionModel.from_pretrained(name, subfolder="unet").requires_grad_(False)
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
    }
    sizes = {"sample_size": 16, "layers_per_block": 1, "cross_attention_dim": 32, "norm_num_groups": 8}
    return UNet2DConditionModel(**blocks, **sizes).requires_grad_(False)


def main(output: Path, name: str | None = None, steps: int = 20) -> None:
    """Trains on one picture and prompt, saves the adapter in ``output`` and loads it into a fresh network."""
    config = RandLoraConfig(r=8, randlora_alpha=16, target_modules=TARGETS, save_projection=False)
    model = unet(name)
    model.add_adapter(config)
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in trained):,} of {model.num_parameters():,} parameters train")

    numbers = torch.Generator().manual_seed(0)
    picture = torch.rand(4, 4, model.config.sample_size, model.config.sample_size, generator=numbers) * 2 - 1
    prompt = torch.randn(4, 8, model.config.cross_attention_dim, generator=numbers)
    scheduler, optimizer = DDPMScheduler(), torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(steps):
        noise = torch.randn(picture.shape, generator=numbers)
        times = torch.randint(scheduler.config.num_train_timesteps, (4,), generator=numbers)
        noised = scheduler.add_noise(picture, noise, times)
        loss = torch.nn.functional.mse_loss(model(noised, times, prompt).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {sum(losses[:5]) / 5:.3f} in the first steps, {sum(losses[-5:]) / 5:.3f} in the last")

    output.mkdir(parents=True, exist_ok=True)
    save_file(get_peft_model_state_dict(model), output / "adapter.safetensors")
    again = unet(name)
    again.add_adapter(config)
    set_peft_model_state_dict(again, load_file(output / "adapter.safetensors"))
    with torch.no_grad():
        adapted, loaded = (m.eval()(picture, 10, prompt).sample for m in (model, again))
        again.disable_adapters()
        base = again(picture, 10, prompt).sample
    print(f"the update changes the output by {(adapted - base).abs().max():.1e}")
    print(f"saved, loaded: largest difference {(adapted - loaded).abs().max():.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="a pipeline on the hub")
    arguments = parser.parse_args()
    main(arguments.output, arguments.model)
