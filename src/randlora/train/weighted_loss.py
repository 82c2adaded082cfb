"""The loss of a classifier in which all labels count the same, however rare they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def balanced_loss(labels: Sequence[int], count: int) -> Callable[..., Tensor]:
    """A loss as the Trainer takes one: a label that n of N examples have, of K labels, counts N / (K·n).

    Evaluations are not weighted, so that their losses compare with those of other runs.

    Args:
        labels: of the training data.
        count: K.
    """
    found = torch.bincount(torch.as_tensor(labels), minlength=count)
    weights = len(labels) / (found.count_nonzero() * found.clamp(min=1)).float()

    def loss(outputs: Any, targets: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"].float()
        each = functional.cross_entropy(logits, targets, reduction="none")
        if torch.is_grad_enabled():
            each = each * weights.to(each.device)[targets]
        # the items of all forward passes that make one step
        return each.mean() if num_items_in_batch is None else each.sum() / num_items_in_batch

    return loss
