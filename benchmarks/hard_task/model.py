"""The language model on bytes, with its construction, training, evaluation and storage."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel

from randlora.tuner.files.atomic import write_atomically

from . import data
from .settings import Pretraining, name_of

FOLDER = Path(__file__).parents[2] / "build" / "hard_task"
WARM_UP = 0.1  # of the steps


def pretrained(settings: Pretraining, folder: Path = FOLDER) -> GPT2LMHeadModel:
    """Return the model that has read English, from the folder or, the first time, by training it."""
    model, path = build(settings), folder / f"base-{name_of(settings)}.safetensors"
    if not path.exists():
        parameters = [{"params": list(model.parameters()), "lr": settings.learning_rate}]
        train(model, parameters, reading(data.english().train, settings, settings.steps, settings.batch, seed=0))
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}  # tied ones once
        write_atomically(path, lambda temporary: save_file(weights, temporary))
    model.load_state_dict(load_file(path), strict=False)
    return model.requires_grad_(False)


def build(settings: Pretraining) -> GPT2LMHeadModel:
    """Return new weights, the same at each call."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=settings.context,
        n_embd=settings.hidden,
        n_layer=settings.layers,
        n_head=settings.heads,
        n_inner=settings.inner,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def reading(text: Tensor, settings: Pretraining, steps: int, batch: int, seed: int) -> list[Tensor]:
    """Return the batches of a training run, which depend only on the seed."""
    generator = torch.Generator().manual_seed(seed)
    return [data.draw(text, batch, settings.context, generator) for _ in range(steps)]


Groups = list[dict[str, Any]]
"""Parameters with their learning rates, in the form of optimisers' groups."""


def train(model: nn.Module, groups: Groups, batches: list[Tensor], tick: Callable[[], object] = int) -> bool:
    """Train the groups of parameters by AdamW, warmed up and let down linearly; ``tick`` is called after each step.

    Returns:
        Whether the loss remained a number.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda step: factor(step, len(batches)))
    parameters = [parameter for group in groups for parameter in group["params"]]
    model.train()
    for batch in batches:
        loss = mean_loss(model, batch)
        if not loss.isfinite():
            return False
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tick()
    return True


def factor(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step."""
    warm = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def mean_loss(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor) -> float:
    """Return the mean over all bytes of the windows except each first byte, which has no context."""
    model.eval()
    losses: Iterable[Tensor] = (mean_loss(model, part) * len(part) for part in windows.split(32))
    return float(sum(losses)) / len(windows) / math.log(2)
