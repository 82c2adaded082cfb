"""Mixed batches, in which each row has an adapter of its own.

During such a call, ``calls`` has the names of the rows for each adapted layer and each module of ``modules_to_save``,
by calling thread. The model does not change, so that threads can share it. PEFT's LoRA passes the names by hooks
instead. Threads that add and remove hooks of one module disturb each other (torch may give two hooks one id, or lose
the way to call a hook), and a compiled module does not see hooks that are added later.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from randlora.errors import AdapterNamesError

BASE = "__base__"
"""The name for no adapter in ``adapter_names``."""


class Calls:
    """The calls with ``adapter_names`` that run now, of all models.

    Attributes:
        running: whether any call runs; a plain value, on which compiled code is guarded.
        adapters: the ``adapter_names`` of the calls, by thread; plain values too, for reads of weights.
    """

    def __init__(self) -> None:
        self.running = False
        self.adapters: dict[int, Sequence[str]] = {}
        self._of_thread: dict[int, dict[nn.Module, tuple[list[str], int]]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def run(self, adapter_names: Sequence[str], names: dict[nn.Module, list[str]], copies: int) -> Iterator[None]:
        """Give modules the names of their rows, within the context and in this thread only.

        Args:
            adapter_names: names of the call, one for each sample.
            names: names for each module, one for each sample.
            copies: as in :func:`one_adapter_per_sample`.
        """
        thread = threading.get_ident()
        outer, outer_names = self._of_thread.get(thread, {}), self.adapters.get(thread)
        inner = outer | {module: (of_module, copies) for module, of_module in names.items()}
        self._set(thread, inner, adapter_names)
        try:
            yield
        finally:
            self._set(thread, outer, outer_names)

    def names(self, module: nn.Module, rows: int) -> list[str] | None:
        """Return one name for each row of the input of ``module``, or ``None`` outside of calls of this thread."""
        known = self._of_thread.get(threading.get_ident(), {}).get(module)
        if known is None:
            return None
        names, copies = known
        return [name for name in names for _ in range(copies)] if rows == len(names) * copies else names

    def _set(
        self, thread: int, names: dict[nn.Module, tuple[list[str], int]], adapter_names: Sequence[str] | None
    ) -> None:
        with self._lock:
            if adapter_names is None:
                self._of_thread.pop(thread, None)
                self.adapters.pop(thread, None)
            else:
                self._of_thread[thread], self.adapters[thread] = names, adapter_names
            self.running = bool(self._of_thread)


calls = Calls()


@torch.compiler.disable  # names differ between the threads of a compiled model
def mixed_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the output of an adapted layer for rows that belong to different adapters.

    Each adapter's rows pass through the layer as if it were the only active adapter, by the same computation.

    Args:
        layer: the adapted layer.
        x: input (batch, ...).
        *args: passed on to the layer.
        **kwargs: likewise.

    Returns:
        The output (batch, ...), or ``None`` if the call in this thread, if any, names no adapters for the layer.

    Raises:
        AdapterNamesError: if the numbers of names and rows differ, or adapters are merged.
    """
    adapter_names = calls.names(layer, len(x))
    if adapter_names is None:
        return None
    if len(adapter_names) != len(x):
        raise AdapterNamesError(
            f"adapter_names has {len(adapter_names)} names for {len(x)} inputs of a layer: give one name for each "
            f"sample, {BASE!r} for none. (A layer whose input is not one row or sequence for each sample cannot be "
            "used so.)"
        )
    if layer.merged:
        raise AdapterNamesError(
            f"adapter_names cannot be used while {', '.join(layer.merged_adapters)} is merged: call "
            "`unmerge_adapter()` first"
        )
    result: Tensor | None = None
    for name in dict.fromkeys(adapter_names):
        rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
        part = layer.forward_with([] if name == BASE else [name], x.index_select(0, rows), *args, **kwargs)
        if result is None:
            result = part.new_empty(len(x), *part.shape[1:])
        result = result.index_copy(0, rows, part)
    return layer.base_layer(x, *args, **kwargs) if result is None else result
