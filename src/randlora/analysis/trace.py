"""One training step of a model without weights: the products that it computes, and its peak of bytes.

The step runs on fake tensors, which have shapes and dtypes and no memory. So nothing is estimated that PyTorch itself
decides: which tensors autograd keeps, when each is let go, which products there are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from randlora.tuner.shapes import bind_empty_bases

_VIEWS_AND_PRODUCTS = ("view", "mm", "transpose", "expand", "slice", "detach", "attention", "alias", "select", "empty")


@dataclass(frozen=True)
class Trace:
    """A training step.

    Attributes:
        products: multiply-adds of all matrix products, attention included.
        elements: elements that all other operations of forward and backward write.
        peak_bytes: most bytes of tensors at one moment: weights, adapters, bases, activations, gradients and the
            optimiser's state.
        trainable: number of values that train.
    """

    products: float
    elements: float
    peak_bytes: int
    trainable: int


def trace_step(build: Callable[[], nn.Module], batch: Callable[[], dict[str, Tensor]]) -> Trace:
    """Return the trace of the second of two steps with AdamW, run on shapes alone; the first makes its state.

    Args:
        build: makes the model, ready to train, on the meta device.
        batch: makes its inputs and labels; called where all tensors are fake.
    """
    built = build().train()
    with FakeTensorMode():
        live = LiveBytes()
        model = cast("Any", _on_cpu(built))
        inputs = batch()
        for tensor in (*model.parameters(), *model.buffers(), *inputs.values(), *bind_empty_bases(model)):
            live.hold(tensor)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable) if trainable else None
        counter = FlopCounterMode(display=False, custom_mapping=_FLOPS)
        with live, counter:  # which keeps tensors alive: no measure of memory
            _backward(model, inputs)
        products, elements = counter.get_total_flops() / 2, live.elements
        with live:
            _update(optimizer)
            live.forget_peak()
            _backward(model, inputs)
            _update(optimizer)
        return Trace(products, elements, live.peak, sum(p.numel() for p in trainable))


def _on_cpu(model: nn.Module) -> nn.Module:
    """Return the model with fake tensors of the CPU for parameters and buffers; tied tensors stay tied."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return made[id(tensor)]

    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                known = parameters.get(id(parameter))
                module._parameters[name] = parameters[id(parameter)] = (
                    nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad) if known is None else known
                )
        module._buffers.update({name: fake(b) for name, b in module._buffers.items() if b is not None})
    return model


def _backward(model: Any, inputs: dict[str, Tensor]) -> None:
    loss = model(**inputs).loss
    if loss.requires_grad:
        loss.backward()


def _update(optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


class LiveBytes(TorchDispatchMode):
    """The sum of the storages that operations make, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.elements = self._now = 0
        self._known = WeakIdKeyDictionary()

    def hold(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` from now on, once."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        nbytes = storage.nbytes()
        self._known[storage] = weakref.finalize(storage, self._release, nbytes)
        self._now += nbytes
        self.peak = max(self.peak, self._now)

    def forget_peak(self) -> None:
        """Begin a new peak, at the bytes that are held now."""
        self.peak = self._now

    def _release(self, nbytes: int) -> None:
        self._now -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        counts = not any(part in name for part in _VIEWS_AND_PRODUCTS)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.hold(tensor)
                self.elements += tensor.numel() if counts else 0
        return result


def _split_flops(a: tuple[int, ...], b: tuple[int, ...], *_rest: Any, **_kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _attention_flops(query: tuple[int, ...], key: tuple[int, ...], *_rest: Any, **_kwargs: Any) -> int:
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def _attention_backward_flops(_grad: Any, query: tuple[int, ...], key: tuple[int, ...], *_r: Any, **_k: Any) -> int:
    return _attention_flops(query, key) // 2 * 5


_FLOPS = {
    torch.ops.randlora.split_mm: _split_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""What PyTorch's counter does not know."""
