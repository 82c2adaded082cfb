"""The r for a budget of parameters, and its cost beside LoRA and full fine-tuning, before any training.

A model's config is enough; no weights are loaded. Counts are exact. Memory and cost come from one training step on
tensors without memory (``trace.py``); the cost of RandLoRA's products comes from the planner's own table
(``ops/plan.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from randlora.analysis.counts import count_lora, count_trainable, lora_rank_of
from randlora.analysis.trace import Trace, trace_step
from randlora.errors import ConfigError
from randlora.ops.bases import CHOICES, KINDS, BasisKind, BasisSpec, Dense, Structured, num_bases
from randlora.ops.linear import fuses
from randlora.ops.operands import Sizes
from randlora.ops.plan import Problem, step_cost
from randlora.tuner.base_model import empty_base, model_config
from randlora.tuner.bases import define_bases
from randlora.tuner.config import MAX_RANK, RandLoraConfig
from randlora.tuner.layers.base import RandLoraLayer
from randlora.tuner.shapes import adapted_layers, unbound_model

Task = Literal["causal-lm", "sequence-classification"]
_TASK_TYPES = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
_HEADS = ("classifier", "score")  # modules that PEFT trains in full beside the adapter of a classifier

ELEMENT = 40.0
"""Multiply-adds that writing one element costs outside of products; as ``Rates.element``."""
OPTIMIZER = 1000.0
"""Multiply-adds that one trainable value costs in AdamW, on a server CPU (``benchmarks/results/step.json``)."""


@dataclass(frozen=True)
class Budget:
    """The number of parameters to train; exactly one of these is given.

    Attributes:
        params: at most so many.
        percent: at most this share of the model's.
        match_lora: as near as possible to LoRA of this rank on the same layers.
        r: no budget, but this r.
    """

    params: int | None = None
    percent: float | None = None
    match_lora: int | None = None
    r: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ConfigError(
                f"{given or 'no budget'}: give one of params, percent, match_lora and r, and only one, such as "
                "--params 10M or --match-lora 16"
            )
        name, value = next(iter(given.items()))
        if value <= 0 or (name == "percent" and value > 100):
            raise ConfigError(f"{name}={value} must be above 0{' and at most 100' if name == 'percent' else ''}")


@dataclass(frozen=True)
class Setup:
    """The training to plan, apart from r.

    Attributes:
        model: folder or name on the hub; only its config is read.
        task: decides the class of the model, and whether a head trains.
        targets: as ``target_modules`` of ``RandLoraConfig``.
        kind: of the bases: "dense", or the field of a config that asks for another, such as "structured".
        groups: of structured bases.
        batch_size: sequences in a step.
        length: tokens in a sequence.
        dtype: of the model's weights.
        num_labels: of a classifier.
    """

    model: str
    task: Task = "causal-lm"
    targets: str | list[str] = "all-linear"
    kind: str = "dense"
    groups: int = 8
    batch_size: int = 8
    length: int = 256
    dtype: torch.dtype = torch.float32
    num_labels: int = 2


@dataclass(frozen=True)
class Option:
    """One way to train.

    Attributes:
        method: "RandLoRA", "LoRA" or "full".
        r: its rank; ``None`` for full fine-tuning.
        bases: n of the widest layer; 0 where there are none.
        trainable: number of values that train, a classifier's head included. Exact.
        percent: the same as a share of the model's.
        bases_bytes: of the frozen bases in memory.
        file_bytes: of the saved result, without bases.
        file_bytes_with_bases: of the adapter file that holds them (``save_projection=True``).
        peak_bytes: most bytes of tensors at one moment of training; ``None`` if the model cannot be traced.
        cost: of a training step, as a multiple of the frozen model's forward and backward; ``None`` likewise.
    """

    method: Literal["RandLoRA", "LoRA", "full"]
    r: int | None
    bases: int
    trainable: int
    percent: float
    bases_bytes: int
    file_bytes: int
    file_bytes_with_bases: int
    peak_bytes: int | None
    cost: float | None


@dataclass(frozen=True)
class TrainingPlan:
    """The r for a budget, and its costs beside those of other r and methods.

    Attributes:
        setup: the training that was asked for.
        parameters: of the base model.
        layers: number of adapted layers.
        targets: last parts of their names.
        chosen: the option within the budget.
        options: RandLoRA for other r, smallest r first; the chosen one among them.
        lora: LoRA of the rank whose count is nearest.
        full: full fine-tuning.
        structured_cost: of the chosen r with structured bases, as ``Option.cost``; ``None`` where these are planned.
        remark: why memory and cost are unknown, if they are.
    """

    setup: Setup
    parameters: int
    layers: int
    targets: tuple[str, ...]
    chosen: Option
    options: tuple[Option, ...]
    lora: Option
    full: Option
    structured_cost: float | None
    remark: str


def plan_training(setup: Setup, budget: Budget) -> TrainingPlan:
    """Return the r of a budget, and the costs of that r, of other r, of LoRA and of full fine-tuning.

    Raises:
        ConfigError: if the model's config is not at hand, the targets do not fit it, or no r fits the budget.
    """
    return _Planner(setup).plan(budget)


def choose_r(count: Callable[[int], int], largest: int, most: float | None = None, near: int | None = None) -> int:
    """Return the r whose count is the largest up to ``most``, or the nearest to ``near``; of several r the smallest.

    Args:
        count: trainable values by r.
        largest: largest r to look at: above the widest layer's smaller dimension a larger r only adds to the count.
        most: a limit.
        near: a wish.

    Raises:
        ConfigError: if even the smallest count is above ``most``.
    """
    counts = {r: count(r) for r in range(1, largest + 1)}
    if near is not None:
        return min(counts, key=lambda r: (abs(counts[r] - near), r))
    fitting = {r: c for r, c in counts.items() if most is not None and c <= most}
    if not fitting:
        least = min(counts, key=lambda r: counts[r])
        raise ConfigError(
            f"no r fits a budget of {most:,.0f} parameters: the fewest are {counts[least]:,}, with r={least}. Raise "
            "the budget, or adapt fewer layers (--target-modules)"
        )
    return max(fitting, key=lambda r: (fitting[r], -r))


class _Planner:
    """The model's shape, read once, and the numbers that follow from it."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        _check(setup)
        base = self._base()
        self.parameters = sum(p.numel() for p in base.parameters())
        self.head = sum(p.numel() for name, p in base.named_parameters() if _in_head(name, setup.task))
        self.layers = adapted_layers(base, self._config(1))
        self.kept = list(self.layers.values())
        self.matrices = [(x.in_features, x.out_features) for x in self.kept for _ in range(x.num_matrices)]

    def plan(self, budget: Budget) -> TrainingPlan:
        r = self._r(budget)
        traces, remark = self._traces(r)
        chosen = self._option(r, r, traces)
        largest = max(layer.min_dim for layer in self.kept)
        if r > largest:
            warnings.warn(
                f"r={r} is above {largest}, the smaller dimension of the widest layer: from there on a larger r only "
                "adds parameters",
                stacklevel=3,
            )
        powers = {2**k for k in range(13) if 2**k <= largest}
        near = sorted(powers, key=lambda p: abs(p.bit_length() - r.bit_length()))[:6]
        return TrainingPlan(
            setup=self.setup,
            parameters=self.parameters,
            layers=len(self.layers),
            targets=tuple(sorted({name.rpartition(".")[2] for name in self.layers})),
            chosen=chosen,
            options=tuple(self._option(other, r, traces) for other in sorted({*near, r})),
            lora=self._lora(chosen, traces),
            full=self._full(traces),
            structured_cost=self._structured_cost(chosen, traces),
            remark=remark,
        )

    def count(self, r: int) -> int:
        """Return the number of values of λ, γ and the head: n·(r + m) for each matrix."""
        return self.head + count_trainable(self.matrices, r)

    def _r(self, budget: Budget) -> int:
        largest = min(MAX_RANK, max(layer.min_dim for layer in self.kept))
        if budget.r is not None:
            return budget.r
        if budget.match_lora is not None:
            return choose_r(self.count, largest, near=self.head + count_lora(self.matrices, budget.match_lora))
        most = budget.params if budget.params is not None else self.parameters * (budget.percent or 0) / 100
        return choose_r(self.count, largest, most=most)

    def _config(self, r: int) -> RandLoraConfig:
        kind: dict[str, Any] = {}
        if self.setup.kind != Dense.name:
            options = CHOICES[self.setup.kind].options
            kind = {self.setup.kind: True} | {name: x for name, x in vars(self.setup).items() if name in options}
        return RandLoraConfig(r=r, target_modules=self.setup.targets, task_type=_TASK_TYPES[self.setup.task], **kind)

    def _base(self) -> nn.Module:
        labels = {"num_labels": self.setup.num_labels} if self.setup.task == "sequence-classification" else {}
        return empty_base(self.setup.model, _TASK_TYPES[self.setup.task], dtype=self.setup.dtype, **labels)

    def _specs(self, r: int) -> list[BasisSpec]:
        for layer in self.kept:
            layer.r["default"] = r
        return list(define_bases(self.kept, self._config(r), "default").values())

    def _option(self, r: int, traced: int, traces: dict[str, Trace]) -> Option:
        count, chosen = self.count(r), self.count(traced)
        spec = self._specs(r)[0]
        peak = cost = None
        if traces:
            # the rest is the same: parameter, gradient and two moments, and the bases, traced in another form
            peak = traces["RandLoRA"].peak_bytes + 16 * (count - chosen)
            peak += spec.nbytes - _traced_bytes(self._specs(traced)[0])
            cost = self._cost(r, count, spec.kind, traces["frozen"])
        return Option(
            method="RandLoRA",
            r=r,
            bases=max(num_bases(r, layer.min_dim) for layer in self.kept),
            trainable=count,
            percent=100 * count / self.parameters,
            bases_bytes=spec.nbytes,
            file_bytes=4 * count,
            file_bytes_with_bases=4 * count + spec.kind.file_itemsize * spec.entries,
            peak_bytes=peak,
            cost=cost,
        )

    def _structured_cost(self, chosen: Option, traces: dict[str, Trace]) -> float | None:
        if not traces or chosen.r is None or self.setup.kind in Structured.flags:
            return None
        return self._cost(chosen.r, chosen.trainable, Structured(Setup.groups), traces["frozen"])

    def _cost(self, r: int, trainable: int, kind: BasisKind, frozen: Trace) -> float:
        extra = sum(
            layer.num_matrices * step_cost(problem_for(layer, r, self._tokens, self.setup.dtype, kind))
            for layer in self.kept
        )
        base = frozen.products + ELEMENT * frozen.elements
        return (base + extra + OPTIMIZER * trainable) / base

    @property
    def _tokens(self) -> int:
        return self.setup.batch_size * self.setup.length

    def _lora(self, chosen: Option, traces: dict[str, Trace]) -> Option:
        r = self._lora_rank(chosen.trainable)
        count = self.head + count_lora(self.matrices, r)
        return self._peer("LoRA", r, count, 4 * count, traces)

    def _lora_rank(self, trainable: int) -> int:
        return lora_rank_of(self.matrices, trainable - self.head)

    def _full(self, traces: dict[str, Trace]) -> Option:
        return self._peer("full", None, self.parameters, self.parameters * self.setup.dtype.itemsize, traces)

    def _peer(
        self, method: Literal["LoRA", "full"], r: int | None, count: int, nbytes: int, traces: dict[str, Trace]
    ) -> Option:
        peak = cost = None
        if traces:
            frozen, trace = traces["frozen"], traces[method]
            base = frozen.products + ELEMENT * frozen.elements
            cost = (trace.products + ELEMENT * trace.elements + OPTIMIZER * trace.trainable) / base
            peak = trace.peak_bytes
        return Option(method, r, 0, count, 100 * count / self.parameters, 0, nbytes, nbytes, peak, cost)

    def _traces(self, r: int) -> tuple[dict[str, Trace], str]:
        builders: dict[str, Callable[[], nn.Module]] = {
            "frozen": lambda: self._base().requires_grad_(False),
            "RandLoRA": lambda: unbound_model(self._base(), self._config(r)),
            "LoRA": partial(self._with_lora, self._lora_rank(self.count(r))),
            "full": self._base,
        }
        try:
            return {name: trace_step(partial(self._prepared, b), self._batch) for name, b in builders.items()}, ""
        except Exception as error:  # whatever a model's code raises where it looks at values
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            return {}, (
                f"memory and cost are unknown: a step of {type(self._base()).__name__} cannot be followed without its "
                f"values ({type(error).__name__}: {reason})"
            )

    def _prepared(self, build: Callable[[], nn.Module]) -> nn.Module:
        """Return the model with a head that trains and inputs that require gradients, as checkpointing needs."""
        model: Any = build()
        for name, parameter in model.named_parameters():
            if _in_head(name, self.setup.task) and "randlora" not in name:
                parameter.requires_grad_(True)
        model.enable_input_require_grads()
        return model

    def _with_lora(self, rank: int) -> nn.Module:
        names = list(self.layers)
        with torch.device("meta"):
            return get_peft_model(cast("Any", self._base()), LoraConfig(r=rank, target_modules=names))

    def _batch(self) -> dict[str, Tensor]:
        ids = torch.zeros(self.setup.batch_size, self.setup.length, dtype=torch.long)
        classify = self.setup.task == "sequence-classification"
        return {"input_ids": ids, "labels": ids[:, 0] if classify else ids}


def problem_for(layer: RandLoraLayer, r: int, tokens: int, dtype: torch.dtype, kind: BasisKind) -> Problem:
    """Return the planner's problem of one layer on this machine's CPU.

    Args:
        layer: a linear layer.
        r: its rank.
        tokens: in a step.
        dtype: of its weight.
        kind: of its bases.
    """
    sizes = Sizes(layer.max_dim, layer.min_dim, num_bases(r, layer.min_dim))
    costs = kind.costs(r, sizes, torch.device("cpu"), dtype, tokens)
    return Problem(tokens, layer.out_features, layer.in_features, costs, fuses(dtype, dtype))


def _traced_bytes(spec: BasisSpec) -> int:
    with torch.device("meta"):
        return sum(tensor.nbytes for tensor in spec.kind.unfilled(spec).numbers())


def _check(setup: Setup) -> None:
    kinds = [Dense.name, *(flag for kind in KINDS.values() for flag in kind.flags)]
    if setup.kind not in kinds:
        raise ConfigError(f"kind={setup.kind!r} must be one of {', '.join(kinds)}")
    for name in ("batch_size", "length"):
        if getattr(setup, name) < 1:
            raise ConfigError(f"{name}={getattr(setup, name)} must be at least 1")
    positions = getattr(model_config(setup.model), "max_position_embeddings", None)
    if positions is not None and setup.length > positions:
        raise ConfigError(f"length={setup.length}: {setup.model!r} takes at most {positions} tokens")


def _in_head(name: str, task: Task) -> bool:
    return task == "sequence-classification" and any(part in _HEADS for part in name.split("."))
