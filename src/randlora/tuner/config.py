"""The config of a RandLoRA adapter: the fields of its ``adapter_config.json``."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft import PeftConfig, PeftType
from peft.utils.other import get_pattern_key

from randlora.errors import ConfigError
from randlora.ops.bases import CHOICES, KINDS, BasisFields, BasisKind, Dense, choices_of, num_bases
from randlora.tuner.field_types import type_faults
from randlora.tuner.files.atomic import write_json

MAX_RANK = 2**16
"""No weight that is adapted has so large a smaller dimension; beyond it a config asks for memory only."""

_KIND_OF_TYPE = {kind.file_type: kind for kind in KINDS.values() if kind.file_type is not None}

FILE_TYPES: tuple[str, ...] = (PeftType.RANDLORA, *_KIND_OF_TYPE)
"""The types of adapters of this package in their files: PEFT's, and those that PEFT's own RandLora must refuse."""


@dataclass
class _FieldsOfPeft(PeftConfig):
    """The fields of PEFT's own RandLora, in its order and with its defaults."""

    r: int = field(default=32, metadata={"help": "Rank of each random basis; smaller means more parameters"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt"})
    projection_prng_key: int = field(default=0, metadata={"help": "Seed of the bases"})
    save_projection: bool = field(default=True, metadata={"help": "Whether the adapter file holds the bases"})
    sparse: bool = field(default=False, metadata={"help": "Ternary bases with a third of non-zeros"})
    very_sparse: bool = field(default=False, metadata={"help": "Ternary bases with 1/√D of non-zeros"})
    randlora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base layers store (in, out) weights"})
    randlora_alpha: float = field(default=640, metadata={"help": "Scaling numerator"})
    bias: Literal["none", "all", "randlora_only"] = field(default="none", metadata={"help": "Biases to train"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full and saved"})
    init_weights: bool = field(default=True, metadata={"help": "Whether the update starts at zero"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers"})


@dataclass
class RandLoraConfig(BasisFields, _FieldsOfPeft):
    """Configuration of a RandLoRA adapter (Albert et al., ICLR 2025, arXiv 2502.00987).

    Every field of PEFT's own RandLora is here with the same default; files of either load in the other.

    Args:
        r: Rank of each random basis. A layer has n = ceil(min(out, in) / r) of them, so that a *smaller* r means
            *more* trainable parameters: n·(r + min(out, in)) per layer.
        target_modules: Names (list), a regular expression (str) or ``"all-linear"``. ``None`` takes the usual
            attention projections of the architectures that Transformers knows. Names that experts and routers had as
            linear layers (``"w1"``, ``"gate_proj"``, ``"gate"``) mean ``target_parameters``, as for PEFT's LoRA.
        projection_prng_key: Seed of the bases; the lowest 32 bits count.
        save_projection: Whether the adapter file holds the bases. It need not: they are regenerated bit for bit on
            any machine and compared with ``basis_fingerprint``. Structured bases are never in it.
        sparse: Ternary bases, P(-1) = P(+1) = 1/6.
        very_sparse: Ternary bases, P(-1) = P(+1) = 1/(2√D), D the smaller dimension of the largest adapted shape.
            (PEFT's docstring says 1/√D; its code, and this one, follow Li, Hastie & Church 2006.)
        sparsity: Ternary bases of any other density, P(-1) = P(+1) = 1/(2·sparsity).
        structured: Structured bases (``docs/structured.md``), an extension of the paper: a full-rank update for an
            eighth of the arithmetic. PEFT's own RandLora refuses such an adapter.
        groups: How many groups structured bases have, a power of two: more are cheaper. Those that do not divide a
            rank are fewer for it.
        randlora_dropout: Dropout probability on the adapter's input.
        randlora_alpha: Scaling numerator, see ``randlora_scaling``.
        randlora_scaling: ``"peft"`` scales the update by alpha/r, 20 by default. ``"paper"`` scales it by
            alpha/(r·√n); the paper and its authors' code use it with alpha = 2·r. In the adapter file 1/√n is
            folded into γ, so that readers which know only alpha/r compute the same update.
        fan_in_fan_out: Whether the base layer stores its weight as (in, out). Known without being told for
            ``nn.Linear`` and Transformers' ``Conv1D``.
        bias: Which biases train: ``"none"``, ``"all"`` or ``"randlora_only"``.
        modules_to_save: Further modules that are trained in full and saved.
        init_weights: Whether the update starts at zero (λ = 0). ``False`` starts at a random one, for tests.
        layers_to_transform: Indices of the layers to adapt; only with a list of ``target_modules``.
        layers_pattern: Name of the list of layers that ``layers_to_transform`` counts in.
        exclude_modules: Names or a regular expression of modules to leave alone.
        target_parameters: Names of parameters to adapt that no layer of their own holds, such as the experts of a
            mixture: stacks (experts, out, in), where each expert gets its own λ and γ. Matrices (out, in) too.
        rank_pattern: Ranks that differ from ``r``, by module name or regular expression.
        alpha_pattern: Alphas that differ from ``randlora_alpha``, likewise.
        trainable_token_indices: Rows of the input embeddings to train beside the updates; or, as a dictionary, rows of
            the embeddings that it names.
        ensure_weight_tying: Whether embeddings that are one weight stay one when ``modules_to_save`` or
            ``trainable_token_indices`` train them. (An update of tied embeddings is refused with it: adapt neither.)
        basis_fingerprint: SHA-256 of the adapter's bases. Recorded when the adapter is created; on loading, bases
            that differ are an error.

    Raises:
        ConfigError: naming every value that cannot mean anything.
    """

    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone"})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters to adapt, such as experts"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks by module name"})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Alphas by module name"})
    randlora_scaling: Literal["peft", "paper"] = field(
        default="peft", metadata={"help": "alpha/r, or the paper's alpha/(r·√n)"}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embeddings to train"}
    )
    ensure_weight_tying: bool = field(default=False, metadata={"help": "Whether tied embeddings train as one"})
    basis_fingerprint: str | None = field(default=None, metadata={"help": "SHA-256 of the adapter's bases"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.read_from_file = self.peft_type is not None  # a file names its type, whoever writes code does not
        self.settled = self.read_from_file  # whether the targets are those of a model that was adapted
        self.recorded = False  # whether the fingerprint is that of a model that was saved
        of_type, self.peft_type = self.peft_type, PeftType.RANDLORA
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        faults = type_faults(self) or [*self._number_faults(), *self._choice_faults(), *self._expression_faults()]
        of_file = _KIND_OF_TYPE.get(str(of_type))
        if of_file is not None and of_file is not self.basis_class:
            faults.append(f"peft_type={of_type!r} says that the bases are {of_file.name}, {of_file.flags[0]}=False not")
        if faults:
            raise ConfigError("RandLoraConfig: " + "; ".join(faults))
        if not self.basis_class.file_itemsize:
            self.save_projection = False
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT's own convention
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    @classmethod
    def adopt(cls, config: PeftConfig) -> RandLoraConfig:
        """Return ``config`` itself, or a config of this class with the values of PEFT's own RandLora config.

        One config may serve several models: a fingerprint that was recorded for another one is forgotten.
        """
        if isinstance(config, cls):
            if config.recorded:
                config.basis_fingerprint, config.recorded = None, False
            return config
        known = {f.name for f in fields(cls) if f.init}
        adopted = cls(**{name: value for name, value in vars(config).items() if name in known})
        adopted.read_from_file = adopted.settled = config.inference_mode
        for name in ("auto_mapping", "peft_version"):
            if hasattr(config, name):
                setattr(adopted, name, getattr(config, name))
        return adopted

    def record(self, fingerprint: str) -> None:
        """Record the fingerprint of the bases of a model that is being saved."""
        self.recorded = self.recorded or self.basis_fingerprint is None
        self.basis_fingerprint = fingerprint

    def basis_kind(self, min_dim: int) -> BasisKind:
        """Return the kind of the adapter's bases with its options; ``min_dim`` is m as drawn."""
        return self.basis_class.asked(self, min_dim)

    @property
    def basis_class(self) -> type[BasisKind]:
        """The kind of the adapter's bases, without its options."""
        return next((CHOICES[name] for name in choices_of(vars(self))), Dense)

    @property
    def peft_draws_bases(self) -> bool:
        """Whether PEFT's own RandLora draws these bases from the file of this config."""
        return not _EXTENSIONS.intersection(choices_of(vars(self)))

    def scaling(self, rank: int, alpha: float, num_bases: int) -> float:
        """Return the factor of the update of a layer: alpha/r, or the paper's alpha/(r·√n)."""
        return alpha / rank if self.randlora_scaling == "peft" else alpha / (rank * math.sqrt(num_bases))

    def rank_and_scaling(self, module: str, min_dim: int) -> tuple[int, float]:
        """Return rank and scaling of the update of the module of that path, whose smaller dimension is ``min_dim``."""
        rank = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module), self.r)
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), module), self.randlora_alpha)
        return rank, self.scaling(rank, alpha, num_bases(rank, min_dim))

    def to_dict(self) -> dict[str, Any]:
        """Return the file's content: fields unknown to PEFT only where they differ from their default, lists sorted."""
        content: dict[str, Any] = super().to_dict()
        plain = type(self)()
        for name in _EXTENSIONS:
            if content[name] == getattr(plain, name):
                del content[name]
        kind = self.basis_class
        content |= {name: getattr(self, name) for name in kind.options}
        if kind.file_type is not None:
            content["peft_type"] = kind.file_type
        return {name: sorted(value) if isinstance(value, set) else value for name, value in content.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` into ``save_directory``, whole or not at all."""
        content = self.to_dict()
        if kwargs.get("auto_mapping_dict") is not None:
            content["auto_mapping"] = kwargs["auto_mapping_dict"]
        write_json(content, save_directory, "adapter_config.json")

    def _number_faults(self) -> list[str]:
        faults = [f"r={self.r!r} must be an integer from 1 to {MAX_RANK}"] if not _is_rank(self.r) else []
        faults += [
            f"rank_pattern[{name!r}]={rank!r} must be an integer from 1 to {MAX_RANK}"
            for name, rank in self.rank_pattern.items()
            if not _is_rank(rank)
        ]
        if not _is_positive(self.randlora_alpha):
            faults.append(f"randlora_alpha={self.randlora_alpha!r} must be a finite number above 0")
        faults += [
            f"alpha_pattern[{name!r}]={alpha!r} must be a finite number above 0"
            for name, alpha in self.alpha_pattern.items()
            if not _is_positive(alpha)
        ]
        if not _is_finite(self.randlora_dropout) or not 0 <= self.randlora_dropout < 1:
            faults.append(f"randlora_dropout={self.randlora_dropout!r} must be a number from 0 to below 1")
        return faults + [fault for kind in KINDS.values() for fault in kind.faults(self)]

    def _choice_faults(self) -> list[str]:
        faults = []
        if self.bias not in ("none", "all", "randlora_only"):
            faults.append(f"bias={self.bias!r} must be 'none', 'all' or 'randlora_only'")
        if self.randlora_scaling not in ("peft", "paper"):
            faults.append(f"randlora_scaling={self.randlora_scaling!r} must be 'peft' or 'paper'")
        chosen = choices_of(vars(self))
        if len(chosen) > 1:
            faults.append(f"{' and '.join(chosen)} contradict each other: give one of them")
        for kind in KINDS.values():
            for name in kind.options:
                value = getattr(self, name)
                if value != getattr(type(self), name) and not set(kind.flags) & set(chosen):
                    faults.append(f"{name}={value!r} means nothing without {kind.flags[0]}=True")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            faults.append(
                f"layers_to_transform={self.layers_to_transform!r} needs target_modules as a list of names, "
                f"not the expression {self.target_modules!r}"
            )
        if self.target_parameters and self.randlora_dropout:
            faults.append(
                f"randlora_dropout={self.randlora_dropout!r} cannot be applied to "
                f"target_parameters={self.target_parameters!r}, whose update sees no input: set it to 0, or give the "
                "parameters an adapter of their own"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            faults.append(f"layers_pattern={self.layers_pattern!r} means nothing without layers_to_transform")
        return faults

    def _expression_faults(self) -> list[str]:
        """Return a fault for each value that PEFT would compile as a regular expression, and cannot."""
        single = {name: getattr(self, name) for name in ("target_modules", "exclude_modules", "layers_pattern")}
        given = [(name, value) for name, value in single.items() if isinstance(value, str)]
        given += [("rank_pattern", key) for key in self.rank_pattern]
        given += [("alpha_pattern", key) for key in self.alpha_pattern]
        if isinstance(self.layers_pattern, list):
            given += [("layers_pattern", value) for value in self.layers_pattern]
        faults = []
        for name, expression in given:
            try:
                re.compile(expression)
            except (re.error, OverflowError, RecursionError) as error:
                faults.append(f"{name}: {expression!r:.80} is no regular expression: {error}")
        return faults


_EXTENSIONS = {f.name for f in fields(RandLoraConfig)} - {f.name for f in fields(_FieldsOfPeft)}
"""Fields that PEFT's own RandLora does not know; they stand in the file only where they say something."""


def _is_rank(value: int) -> bool:
    return 1 <= value <= MAX_RANK


def _is_finite(value: float) -> bool:
    return abs(value) <= sys.float_info.max  # math.isfinite raises for whole numbers beyond it


def _is_positive(value: float) -> bool:
    return _is_finite(value) and value > 0
