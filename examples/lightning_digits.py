"""Fine-tunes a small network with RandLoRA in PyTorch Lightning; only the adapter is saved.

The data are scikit-learn's 1,797 handwritten digits, so no network is needed. A few seconds on two cores:

    pip install lightning scikit-learn
    python examples/lightning_digits.py runs/lightning
"""

import sys
from pathlib import Path

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from randlora import PeftModel, RandLoraConfig, get_peft_model


def network() -> nn.Sequential:
    """The "pretrained" model: the same random numbers each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


class Digits(lightning.LightningModule):
    """Any module of yours: the adapted model is a submodule, and the optimiser gets what trains."""

    def __init__(self) -> None:
        super().__init__()
        config = RandLoraConfig(r=8, randlora_alpha=16, target_modules=["0", "2"], modules_to_save=["4"])
        self.model = get_peft_model(network(), config)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy of a batch."""
        images, digits = batch
        return nn.functional.cross_entropy(self.model(images), digits)

    def validation_step(self, batch: list[Tensor]) -> None:
        """Accuracy on a batch."""
        images, digits = batch
        self.log("accuracy", (self.model(images).argmax(-1) == digits).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of λ, γ and the head."""
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=2e-3)


def main(output: Path, epochs: int = 5) -> None:
    """Trains, saves the adapter in ``output`` and loads it again."""
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train, test = torch.utils.data.random_split(data, [1500, 297], torch.Generator().manual_seed(0))
    module = Digits()
    module.model.print_trainable_parameters()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", **quiet)
    trainer.fit(module, DataLoader(train, 32, shuffle=True), DataLoader(test, 297))
    print(f"{trainer.callback_metrics['accuracy']:.1%} right after {epochs} epochs")

    module.model.save_pretrained(output)
    again = PeftModel.from_pretrained(network(), output).eval()
    images = next(iter(DataLoader(test, 8)))[0]
    difference = (again(images) - module.model.eval()(images)).abs().max().item()
    print(f"saved, loaded: largest difference {difference:.1e}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/lightning_digits.py OUTPUT_FOLDER")
    main(Path(sys.argv[1]))
