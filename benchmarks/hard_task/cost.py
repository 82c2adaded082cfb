"""The cost of a step and of a file for each method, with methods in turn, as in `comparison`, on one core."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..comparison import Step
from ..methods import FROZEN
from ..rounds import interleave, ratio, typical
from . import data
from .methods import METHODS
from .model import pretrained
from .runs import adapted
from .settings import Task

Costs = dict[tuple[str, int], dict[str, Any]]


def costs(task: Task, folder: Path, rounds: int, cells: list[tuple[str, int]]) -> Costs:
    """Return seconds, multiples of the frozen model's step, and bytes of the file, by method and budget."""
    torch.set_num_threads(1)
    batch = data.draw(data.source().train, task.batch, task.base.context, torch.Generator().manual_seed(0))
    inputs = {"input_ids": batch, "labels": batch}
    models = {str((name, r)): adapted(METHODS[name], task, r, 0, folder) for name, r in cells}
    steps: dict[str, Step] = {name: Step(model) for name, model in models.items()}
    steps[FROZEN] = Step(pretrained(task.base, folder))
    for step in steps.values():
        step.model.enable_input_require_grads()
    _, *history = interleave({name: partial(step, inputs) for name, step in steps.items()}, 1 + rounds)
    return {
        cell: {
            "seconds": typical(history, str(cell)),
            "× frozen": ratio(history, str(cell), FROZEN),
            "file": saved_bytes(models[str(cell)]),
        }
        for cell in cells
    }


def saved_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
