"""The settings of a training run: the keys of its YAML file and the flags of ``randlora train``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from randlora.errors import ConfigError

Method = Literal["randlora", "lora", "vera", "full", "head"]
TaskName = Literal[
    "sequence-classification",
    "regression",
    "multi-label-classification",
    "token-classification",
    "causal-lm",
    "chat",
    "dpo",
    "kto",
    "orpo",
    "image-classification",
]
PREFERENCES = ("dpo", "kto", "orpo")
Quantization = Literal["none", "4bit", "8bit"]

LEARNING_RATES: dict[str, float] = {"randlora": 3e-4, "lora": 1e-3, "vera": 1e-2, "full": 1e-4, "head": 3e-3}
"""Default learning rates, measured on the demo's data (``docs/choosing.md``); VeRA's is that of its paper."""
_LOWER = 20
"""Divisor of the default rate for preference tasks: TRL's default for DPO is a twentieth of that for SFT."""
ALPHAS = {"randlora": 20, "lora": 2}
"""Default alphas divided by r. Other methods have no alpha."""
PAPER_LEARNING_RATE, PAPER_ALPHA = 3e-3, 2
"""Default learning rate, and alpha divided by r, for RandLoRA with the paper's scaling."""

_SEVERAL_LABELS = ("sequence-classification", "multi-label-classification")
_WEIGHTED = (*_SEVERAL_LABELS, "image-classification", "kto")
_PAIRED = ("sequence-classification", "regression", "multi-label-classification", "chat")


class TrainSettings(BaseModel):
    """The settings of one training run.

    Raises:
        ConfigError: from :func:`load_settings`, naming every unknown key and every bad value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Model to fine-tune: a local folder or a name on the hub.")
    data: str | list[str] = Field(
        description="Training data: a .csv, .tsv, .jsonl, .json, .parquet or .txt file, compressed too, a folder of "
        "images or one written by datasets' save_to_disk, or a dataset on the hub; several times for several."
    )
    eval_data: str | list[str] | None = Field(
        None, description="Evaluation data, likewise. By default a part of the training data."
    )
    data_config: str | None = Field(None, description="Configuration of a dataset on the hub, such as a language.")
    split: str | None = Field(None, description="Split of the data to train on; by default train, where it has splits.")
    eval_split: str | None = Field(None, description="Split to evaluate on; by default validation, or else test.")
    encoding: str | None = Field(None, description="Of files of text, such as cp1252; by default UTF-8.")
    streaming: bool = Field(
        False, description="Read the training data while training, and keep none of it; needs max_steps."
    )
    max_samples: int | None = Field(None, ge=1, description="At most so many training examples, drawn by the seed.")
    max_eval_samples: int | None = Field(
        None, ge=1, description="At most so many evaluation examples, likewise; with streaming 1000 by default."
    )
    eval_fraction: float = Field(0.1, gt=0, lt=1, description="Part of the training data held out for evaluation.")
    task: TaskName = Field(
        "sequence-classification",
        description="sequence-classification, regression, multi-label-classification, token-classification, "
        "causal-lm, chat, dpo, kto, orpo or image-classification. The first becomes one of the next two where the "
        "labels ask for it.",
    )
    input_column: str | list[str] | None = Field(
        None,
        description="Column of the input; by default text, tokens, messages or image, as the task has it. Twice for "
        "pairs of texts; chat: of the prompt, twice for an instruction and its input.",
    )
    label_column: str | list[str] | None = Field(
        None,
        description="Column of the labels, words or numbers; by default label, or tags for token-classification. "
        "Several times for one column of 0 and 1 for each label; chat: of the completion.",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: an example of a rare label counts for more, so that all labels count the same."
    )
    max_length: int = Field(256, ge=2, description="Longest input in tokens; length of a packed chunk.")
    packing: bool | None = Field(
        None,
        description="Join texts and cut them into chunks of max_length, so that nothing is padded; "
        "by default for causal-lm, not for chat.",
    )
    chat_template: str | None = Field(
        None, description="chat, dpo, kto, orpo: a file with a Jinja template, in place of the tokenizer's own."
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="dpo, kto: how strongly the model is held near its reference; orpo: how much the preference counts "
        "beside the likelihood. By default 0.1.",
    )

    method: Method = Field(
        "randlora", description="randlora, lora, vera, full (all weights) or head (the new head alone)."
    )
    r: int = Field(32, ge=1, description="Rank. RandLoRA: a smaller r means more trainable parameters.")
    alpha: float | None = Field(
        None,
        gt=0,
        description="Scaling numerator; by default 20·r for randlora, 2·r for lora and the paper's scaling.",
    )
    scaling: Literal["peft", "paper"] = Field("peft", description="RandLoRA: alpha/r, or the paper's alpha/(r·√n).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field(
        "all-linear", description="Modules to adapt: all-linear, names separated by commas, or a regular expression."
    )
    modules_to_save: list[str] = Field(
        [],
        description="Modules trained in full, besides a new head, in every method: "
        "names, separated by commas on the command line.",
    )
    sparse: bool = Field(False, description="RandLoRA: ternary bases, a third of them not zero.")
    very_sparse: bool = Field(False, description="RandLoRA: ternary bases, 1/√D of them not zero.")
    structured: bool = Field(False, description="RandLoRA: structured bases, an eighth of the arithmetic.")
    groups: int = Field(8, ge=1, description="RandLoRA: groups of structured bases, a power of two.")
    save_projection: bool = Field(False, description="RandLoRA: write the bases into the adapter file.")

    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        None,
        description="Peak learning rate; by default one for the method. auto finds one by short runs on a part of the "
        "training data, before the run.",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Course of the learning rate.")
    warmup_fraction: float = Field(0.06, ge=0, lt=1, description="Part of the steps in which the rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training data.")
    max_steps: int | None = Field(None, ge=1, description="Stop after so many optimizer steps, whatever the epochs.")
    batch_size: int = Field(32, ge=1, description="Examples per device and forward pass.")
    gradient_accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    bf16: bool = Field(False, description="Compute in bfloat16 by autocast.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward to save memory.")
    quantization: Quantization = Field(
        "none", description="Hold the pretrained weights in 4bit or 8bit codes of bitsandbytes, beneath an adapter."
    )
    seed: int = Field(0, ge=0, description="Seed of the split, the order of the data, the head and dropout.")

    output_dir: str = Field("runs/train", description="Folder for everything that the run writes.")
    save_steps: int | None = Field(
        None, ge=1, description="Checkpoint every so many steps; by default as often as evaluated, or each epoch."
    )
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="Evaluate every so many steps; by default at the end, or each epoch if best is asked for.",
    )
    early_stopping: int | None = Field(
        None, ge=1, description="End after so many evaluations without a better one; keeps the best."
    )
    best: str | None = Field(
        None, description="Keep the checkpoint that is best by this metric of the evaluation: loss, accuracy, f1, ..."
    )
    report_to: list[str] | None = Field(
        None,
        description="Trackers of Transformers, such as tensorboard, wandb, none; by default tensorboard if installed.",
    )
    resume: str | None = Field(
        None,
        description="auto: go on from the run's last complete checkpoint, if it has one; or the path of a checkpoint.",
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model or dataset.")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate given, or the method's.

        Raises:
            ConfigError: if a search has to find the learning rate first.
        """
        if self.learning_rate == "auto":
            raise ConfigError(
                "learning_rate='auto' is found by `randlora.train.search.with_found_rate`, before the run"
            )
        return self.default_rate if self.learning_rate is None else self.learning_rate

    @property
    def default_rate(self) -> float:
        """The peak learning rate where none is given."""
        rate = PAPER_LEARNING_RATE if self.as_in_the_paper else LEARNING_RATES[self.method]
        return rate / (_LOWER if self.task in PREFERENCES else 1)

    @property
    def as_in_the_paper(self) -> bool:
        """Whether the method is RandLoRA with the paper's scaling, which asks for another alpha and another rate."""
        return self.method == "randlora" and self.scaling == "paper"

    @property
    def preference_beta(self) -> float | None:
        """The β given, or that of the papers; ``None`` where the task has none."""
        return 0.1 if self.beta is None and self.task in PREFERENCES else self.beta

    @property
    def scaling_alpha(self) -> float | None:
        """The alpha given, or the method's; ``None`` where the method has none."""
        if self.alpha is not None or self.method not in ALPHAS:
            return self.alpha
        return (PAPER_ALPHA if self.as_in_the_paper else ALPHAS[self.method]) * self.r

    def resolved(self) -> dict[str, Any]:
        """Return every setting by name; learning rate, alpha and beta are the numbers that the run uses."""
        rate = "auto" if self.learning_rate == "auto" else self.peak_learning_rate
        return self.model_dump() | {"learning_rate": rate, "alpha": self.scaling_alpha, "beta": self.preference_beta}

    @property
    def best_metric(self) -> str | None:
        """The metric that decides which checkpoint is kept; ``None`` keeps the last."""
        return self.best or (None if self.early_stopping is None else "loss")

    @field_validator("modules_to_save", "report_to", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return _names(value) if isinstance(value, str) else value

    @field_validator("data", "eval_data", "input_column", "label_column")
    @classmethod
    def _one_alone(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and not value:
            raise ValueError("names nothing")
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    @field_validator("target_modules")
    @classmethod
    def _compiles(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"is no regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> TrainSettings:
        if self.quantization != "none" and self.method in ("full", "head"):
            raise ValueError(
                f"quantization={self.quantization!r}: method={self.method!r} has no adapter to train on it"
            )
        if self.method == "vera" and self.alpha is not None:
            raise ValueError(f"alpha={self.alpha}: VeRA has none; leave it out")
        if self.class_weights != "none" and self.task not in _WEIGHTED:
            raise ValueError(
                f"class_weights={self.class_weights!r} is for one label or several of an example, not {self.task!r}"
            )
        if self.chat_template is not None and self.task not in ("chat", *PREFERENCES):
            raise ValueError(f"chat_template={self.chat_template!r} is for chat, dpo, kto and orpo, not {self.task!r}")
        self._require_preference()
        if self.packing is not None and self.task not in ("causal-lm", "chat"):
            raise ValueError(f"packing={self.packing} is for causal-lm and chat, not {self.task!r}")
        if self.best_metric and self.save_steps and self.eval_steps and self.save_steps % self.eval_steps:
            raise ValueError(
                f"save_steps={self.save_steps}: the best checkpoint is only known where it was evaluated; take a "
                f"multiple of eval_steps={self.eval_steps}"
            )
        if self.best_metric and self.save_steps and not self.eval_steps:
            raise ValueError(f"save_steps={self.save_steps} with best={self.best_metric!r} needs eval_steps")
        return self

    def _require_preference(self) -> None:
        """Raise for settings that preference tasks cannot have, or that only they can have."""
        if self.task not in PREFERENCES:
            if self.beta is not None:
                raise ValueError(f"beta={self.beta} is for dpo, kto and orpo, not {self.task!r}")
            return
        if self.dropout:
            raise ValueError(
                f"dropout={self.dropout}: {self.task} trains without any, so that differences are the adapter's; "
                "leave it out"
            )
        if self.task == "kto" and self.batch_size < 2:
            raise ValueError("batch_size=1: kto compares answers of one batch; take at least 2")

    @model_validator(mode="after")
    def _several_columns(self) -> TrainSettings:
        given, labels = self.input_column, self.label_column
        if isinstance(given, list) and (len(given) != 2 or given[0] == given[1] or self.task not in _PAIRED):
            raise ValueError(f"input_column={given}: two columns, for {', '.join(_PAIRED)}")
        if isinstance(labels, list) and (len(set(labels)) < len(labels) or self.task not in _SEVERAL_LABELS):
            raise ValueError(f"label_column={labels}: different columns of 0 and 1, for {_SEVERAL_LABELS[-1]}")
        return self

    @model_validator(mode="after")
    def _can_stream(self) -> TrainSettings:
        if not self.streaming:
            return self
        if self.max_steps is None:
            raise ValueError("streaming=True needs max_steps: how long a pass over a stream is, is not known")
        if self.task in PREFERENCES:
            raise ValueError(
                f"streaming=True: {self.task} computes what the reference says of all data first; leave it out"
            )
        if self.class_weights != "none":
            raise ValueError("streaming=True: class_weights count the labels of all training data; leave them out")
        if self.learning_rate == "auto":
            raise ValueError("streaming=True: learning_rate='auto' needs data that is kept; name a number")
        if self.eval_fraction != TrainSettings.model_fields["eval_fraction"].default:
            raise ValueError(
                f"eval_fraction={self.eval_fraction} of a stream is not known: limit the part that evaluates by "
                "max_eval_samples"
            )
        if self.best_metric and not self.eval_steps:
            raise ValueError(f"streaming=True with best={self.best_metric!r} needs eval_steps: it has no epochs")
        return self

    @property
    def targets(self) -> str | list[str]:
        """Modules to adapt, in PEFT's form."""
        given = self.target_modules
        return _names(given) if isinstance(given, str) and (given.isidentifier() or "," in given) else given


Settings = TypeVar("Settings", bound=TrainSettings)


def load_settings(config: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> TrainSettings:
    """Return the settings of a YAML file; ``overrides`` (flags) take precedence over the file.

    Raises:
        ConfigError: if the file cannot be read; or naming every unknown key and every bad value.
    """
    return read_settings(TrainSettings, config, overrides)


def read_settings(
    kind: type[Settings], config: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Return settings of the class ``kind``, read as :func:`load_settings` does."""
    values = {} if config is None else _read_yaml(Path(config))
    values.update(overrides or {})
    try:
        return kind(**values)
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault, kind)}" for fault in error.errors())
        raise ConfigError(f"the settings{f' of {config}' if config else ''} cannot be used:\n{faults}") from None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is no YAML file: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{str(path)!r} must hold `key: value` lines, but holds a {type(content).__name__}")
    return content


def _explain(fault: Any, kind: type[TrainSettings]) -> str:
    name = ".".join(str(part) for part in fault["loc"][:1])  # later parts name members of a union of types
    if not name:  # an error of our own validators: settings that exclude each other
        return str(fault["ctx"]["error"])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, kind.model_fields, n=1)
        return f"{name}: there is no such setting" + (f"; did you mean {near[0]!r}?" if near else "")
    if fault["type"] == "missing":
        return f"{name}: missing; {kind.model_fields[name].description}"
    reason = fault["msg"].removeprefix("Value error, ")
    return f"{name}={fault['input']!r}: {reason[0].lower()}{reason[1:]}"
