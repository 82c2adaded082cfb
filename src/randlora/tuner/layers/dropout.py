"""Dropout on the input of the adapters of one layer."""

from __future__ import annotations

from collections.abc import Iterator, KeysView
from itertools import count
from typing import cast

from torch import nn


class Dropouts(nn.Module):
    """The dropout of each adapter that has one, with a single module for all adapters of the same probability.

    Else a thousand adapters would add a thousand modules to each layer, and slow down every walk over the model, such
    as a switch of adapters.
    """

    def __init__(self) -> None:
        super().__init__()
        self._by_adapter: dict[str, nn.Dropout] = {}

    def add(self, adapter_name: str, probability: float) -> None:
        """Add the dropout of an adapter."""
        there = cast("list[nn.Dropout]", list(self.children()))
        kind = next((kind for kind in there if kind.p == probability), None)
        if kind is None:
            kind = nn.Dropout(probability).train(self.training)
            self.add_module(next(str(i) for i in count() if str(i) not in self._modules), kind)
        self._by_adapter[adapter_name] = kind

    def __getitem__(self, adapter_name: str) -> nn.Dropout:
        return self._by_adapter[adapter_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_adapter)

    def __contains__(self, adapter_name: str) -> bool:
        return adapter_name in self._by_adapter

    def __delitem__(self, adapter_name: str) -> None:
        kind = self._by_adapter.pop(adapter_name)
        if kind not in self._by_adapter.values():
            del self._modules[next(name for name, module in self._modules.items() if module is kind)]

    def keys(self) -> KeysView[str]:
        """Return the names of the adapters that have dropout."""
        return self._by_adapter.keys()
