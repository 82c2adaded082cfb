"""Writes the corpus with the PEFT that is installed: ``python make.py FOLDER``. See README.md beside this file.

Neither randlora nor anything random is used, so that a version of PEFT gives the same files each time.
"""

import sys
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

CASES = {
    "dense": {},
    "sparse": {"sparse": True},
    "very_sparse": {"very_sparse": True},
    "without_bases": {"save_projection": False},
    "biases": {"bias": "all"},  # of which versions before 0.21 wrote none
    "parts": {
        "modules_to_save": ["head"],
        "projection_prng_key": 12345,
        "randlora_alpha": 7,
        "target_modules": ["tall", "wide"],
    },
}


def filled(shape: torch.Size, phase: float) -> torch.Tensor:
    """Numbers between -1 and 1 that look like nothing in particular."""
    return torch.sin(torch.arange(shape.numel(), dtype=torch.float64) * 0.7 + phase).reshape(shape).float()


class Model(nn.Module):
    """A tall, a wide and a transposed layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tall, self.wide = nn.Linear(10, 17), nn.Linear(17, 9)
        self.transposed, self.head = Conv1D(11, 9), nn.Linear(11, 3)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(0.4 * filled(parameter.shape, number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.tall, self.wide, self.transposed):
            x = torch.tanh(layer(x))
        return self.head(x)


def inputs() -> torch.Tensor:
    return filled(torch.Size([6, 10]), 0.3)


def trained(model: nn.Module) -> nn.Module:
    """With λ, γ and whatever else trains as if it had been."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_((0.05 if "randlora_" in name else 0.3) * filled(parameter.shape, 0.5 * number))
    return model.eval()


def main(folder: Path) -> None:
    for name, changes in CASES.items():
        config = {"r": 4, "randlora_alpha": 8, "target_modules": ["tall", "wide", "transposed"], **changes}
        model = trained(peft.get_peft_model(Model(), peft.RandLoraConfig(**config)))
        target = folder / f"{peft.__version__}-{name}"
        model.save_pretrained(str(target))
        (target / "README.md").unlink()  # PEFT's empty model card
        with torch.no_grad():
            save_file({"output": model(inputs())}, target / "output.safetensors")
        for file in target.iterdir():
            file.chmod(0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
