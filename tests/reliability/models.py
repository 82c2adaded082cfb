"""Small models of random parts, and random adapters for them."""

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from randlora import RandLoraConfig

IDS, CLASSES = 13, 3
KINDS = ("linear", "conv1d", "conv2d", "experts", "attention", "shared")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
KEY = 10**6  # no other test has bases of this key or the next: they can be seen to be freed


class Experts(nn.Module):
    """Two matrices, both of which see every input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, width, width) * width**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,eoi->...o", x, self.weight)


class Mixed(nn.Module):
    """An embedding, parts of the given kinds, a head tied to the embedding, and a classifier.

    A part that is ``shared`` has a second place, ``again``.
    """

    def __init__(self, parts: list[tuple[str, int]], width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(IDS, width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.names = [f"{kind}{number}" for number, (kind, _) in enumerate(parts)]
        now = width
        for name, (kind, wanted) in zip(self.names, parts, strict=True):
            out = wanted if kind in ("linear", "conv1d") else now
            self.add_module(name, _part(kind, now, out))
            now = out
        self.again = next((getattr(self, name) for name in self.names if "shared" in name), None)
        self.back = nn.Linear(now, width)
        self.head = nn.Linear(width, IDS, bias=False)
        self.head.weight = self.embedding.weight
        self.classifier = nn.Linear(IDS, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for name in self.names:
            part = getattr(self, name)
            if "conv2d" in name:
                x = torch.tanh(x + part(x.unsqueeze(1)).mean(1))
            elif "attention" in name:
                x = x + part(x, x, x, need_weights=False)[0]
            elif "shared" in name:
                x = torch.tanh(self.again(torch.tanh(part(x))))
            else:
                x = torch.tanh(part(x))
        return self.classifier(torch.tanh(self.head(torch.tanh(self.back(x)))))


def _part(kind: str, width: int, out: int) -> nn.Module:
    if kind == "conv1d":
        layer = Conv1D(out, width)
        nn.init.normal_(layer.weight, std=width**-0.5)
        return layer
    if kind == "conv2d":
        return nn.Conv2d(1, 5, (1, 3), padding=(0, 1))
    if kind == "experts":
        return Experts(width)
    if kind == "attention":
        return nn.MultiheadAttention(width, 1, batch_first=True)
    return nn.Linear(width, out)


def ids() -> torch.Tensor:
    return torch.randint(0, IDS, (4, 5), generator=torch.Generator().manual_seed(5))


class Recipe(NamedTuple):
    """A model before it is made: Hypothesis holds what it has drawn, and a model is to be freed."""

    parts: list[tuple[str, int]]  # kind and width
    width: int
    dtype: torch.dtype
    seed: int

    def model(self) -> Mixed:
        torch.manual_seed(self.seed)
        return Mixed(self.parts, self.width).to(self.dtype).eval()


RECIPES = st.builds(
    Recipe,
    st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([4, 7, 9])), min_size=1, max_size=4).filter(
        lambda parts: sum(kind == "shared" for kind, _ in parts) < 2
    ),
    st.sampled_from([5, 8]),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)


@st.composite
def configs(draw: st.DrawFn, model: Mixed, bias: bool = False) -> RandLoraConfig:
    """An adapter for ``model``, of ``KEY`` or the next; with ``bias`` it may train biases, as one of a model may."""
    modules, parameters = _targets(model)
    whole = bool(parameters) and draw(st.booleans())
    # never the inside of an attention alone: where its in_proj_weight is adapted, PEFT would find no target
    chosen = draw(
        st.lists(st.sampled_from(modules), min_size=1, unique=True).filter(lambda names: names != ["out_proj"])
    )
    rank = draw(st.sampled_from([1, 2, 3, 5]))
    inputs_can_be_dropped = not whole and "out_proj" not in chosen
    values: dict[str, Any] = {
        "r": rank,
        "randlora_alpha": rank * draw(st.sampled_from([0.5, 2, 7])),
        "projection_prng_key": KEY + draw(st.integers(0, 1)),
        "randlora_dropout": draw(st.sampled_from([0.0, 0.3])) if inputs_can_be_dropped else 0.0,
        "target_modules": chosen,
        "target_parameters": parameters if whole else None,
        "bias": draw(st.sampled_from(["none", "all", "randlora_only"])) if bias else "none",
        "modules_to_save": draw(st.sampled_from([None, ["classifier"]])),
        "save_projection": draw(st.booleans()),
        "randlora_scaling": draw(st.sampled_from(["peft", "paper"])),
        "rank_pattern": draw(st.sampled_from([{}, {chosen[0]: 4}])),
        "alpha_pattern": draw(st.sampled_from([{}, {chosen[-1]: 3}])),
    }
    kinds = [{}, {"sparse": True}, {"very_sparse": True}, {"sparsity": 2.5}, {"structured": True, "groups": 4}]
    return RandLoraConfig(**values, **draw(st.sampled_from(kinds)))


def _targets(model: Mixed) -> tuple[list[str], list[str]]:
    """Modules and parameters that can be adapted."""
    modules, parameters = ["embedding", "back", "head"], []
    for name in model.names:
        if "experts" in name:
            parameters.append(f"{name}.weight")
        elif "attention" in name:
            modules.append("out_proj")
            parameters.append(f"{name}.in_proj_weight")
        else:
            modules.append(name)
    return list(dict.fromkeys(modules)), parameters
