"""Losses of classifiers in which rare and frequent labels have the same weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def balanced_loss(labels: Sequence[int], count: int) -> Callable[..., Tensor]:
    """Return a loss for the Trainer in which a label of n of N examples, of K labels, has the weight N / (K·n).

    Evaluations are not weighted, so that their losses can be compared with those of other runs.

    Args:
        labels: labels of the training data, as numbers.
        count: number of labels, K.
    """
    found = torch.bincount(torch.as_tensor(labels), minlength=count)
    weights = len(labels) / (found.count_nonzero() * found.clamp(min=1)).float()

    def loss(outputs: Any, targets: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"].float()
        each = functional.cross_entropy(logits, targets, reduction="none")
        if torch.is_grad_enabled():
            each = each * weights.to(each.device)[targets]
        # num_items_in_batch counts the items of all forward passes of a step
        return each.mean() if num_items_in_batch is None else each.sum() / num_items_in_batch

    return loss


def balanced_decisions(labels: Sequence[Sequence[int]], count: int) -> Callable[..., Tensor]:
    """Return a loss for the Trainer where an example has any number of labels, and each label is a decision.

    Having a label of n of N examples has the weight (N - n) / n, PyTorch's ``pos_weight``, so that examples with the
    label and examples without it have the same total weight. A label of no example has the weight 1.

    Args:
        labels: labels of each example of the training data, as numbers.
        count: number of labels.
    """
    flat = torch.tensor([label for given in labels for label in given], dtype=torch.long)
    found = torch.bincount(flat, minlength=count)
    weights = torch.where(found > 0, (len(labels) - found) / found.clamp(min=1), torch.ones(count))

    def loss(outputs: Any, targets: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"].float()
        weight = weights.to(logits.device) if torch.is_grad_enabled() else None
        each = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none").mean(1)
        return each.mean() if num_items_in_batch is None else each.sum() / num_items_in_batch

    return loss
