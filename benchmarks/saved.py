"""Bytes that a forward keeps for its backward."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Return the bytes of the storages that autograd keeps after ``forward``, each counted once.

    Storages that existed before do not count: parameters, frozen bases and weights, the batch.
    """
    before = {_address(thing) for thing in gc.get_objects() if _is_tensor(thing)}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _address(tensor) not in before:
            sizes[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # holds the graph, so that no address is used twice
    del result
    return sum(sizes.values())


def _is_tensor(thing: object) -> bool:
    """Return whether an object is a tensor with its own memory: neither sparse nor a compiler's stand-in."""
    return type(thing) in (Tensor, torch.nn.Parameter) and thing.layout == torch.strided  # type: ignore[attr-defined]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
