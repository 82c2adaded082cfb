"""Fine-tunes a vision transformer of timm with RandLoRA: attention and MLP adapted, the head trained in full.

The images are scikit-learn's handwritten digits. With ``--pretrained`` the weights come from the hub, which a real run
wants; without, they are random and no network is needed. Half a minute on two cores:

    pip install timm scikit-learn
    python examples/timm_vit.py runs/vit --pretrained
"""

import argparse
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

from randlora import PeftModel, RandLoraConfig, get_peft_model

IMAGE = 32


def vit(pretrained: bool, depth: int = 12) -> nn.Module:
    """A ViT-Ti for small grey images and ten classes; random weights are the same each time."""
    torch.manual_seed(0)
    sizes = {"img_size": IMAGE, "patch_size": 8, "in_chans": 1, "num_classes": 10, "depth": depth}
    return timm.create_model("vit_tiny_patch16_224", pretrained=pretrained, **sizes)


def main(output: Path, pretrained: bool = False, steps: int = 60, depth: int = 12) -> None:
    """Trains, saves the adapter in ``output``, loads it and merges it."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images, labels = nn.functional.interpolate(images, IMAGE), torch.tensor(digits.target)

    config = RandLoraConfig(r=32, target_modules=["qkv", "proj", "fc1", "fc2"], modules_to_save=["head"])
    model = get_peft_model(vit(pretrained, depth), config)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    batches = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(1500, (64,), generator=batches)
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, steps - 1):
            print(f"step {step + 1}: loss {loss.item():.2f}")

    model.eval().save_pretrained(output)
    merged = PeftModel.from_pretrained(vit(pretrained, depth), output).merge_and_unload().eval()
    with torch.no_grad():
        found, expected = merged(images[1500:]), model(images[1500:])
    accuracy = (found.argmax(-1) == labels[1500:]).float().mean()
    print(f"{accuracy:.1%} right; saved, loaded, merged: largest difference {(found - expected).abs().max():.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--pretrained", action="store_true", help="weights from the hub")
    arguments = parser.parse_args()
    main(arguments.output, arguments.pretrained)
