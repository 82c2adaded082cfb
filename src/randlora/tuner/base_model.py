"""The base model of a saved adapter: which class it has, and the model itself, with its weights or without."""

from __future__ import annotations

import os
import re
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn

from randlora.errors import CheckpointError, ConfigError, RandLoraError
from randlora.tuner.files.adapter_folder import head_size, label_names, problem_type

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    "IMAGE_CLS": "AutoModelForImageClassification",  # PEFT has no name for it
}
"""Transformers' class by PEFT's name of the task."""


MAX_MODULES = 10_000
"""Layers, or experts of a layer: no model has so many."""
_COUNTED = re.compile(r"(layers?|experts?|depth)$")


def base_path_of(config: PeftConfig, base_model_path: str | os.PathLike[str] | None = None) -> str:
    """Return the place of an adapter's base model: the given one, or the one in its config.

    Raises:
        ConfigError: if neither says.
    """
    source = base_model_path or config.base_model_name_or_path
    if not source:
        raise ConfigError("the adapter does not say which model it is for: name it by base_model_path (--model)")
    return os.fspath(source)


def model_config(source: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """Return the Transformers config of a model; no weights are read.

    Raises:
        ConfigError: if there is none, or it asks for an impossible model.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(os.fspath(source), trust_remote_code=trust_remote_code)
    except StrictDataclassError as error:
        raise ConfigError(f"the config of {os.fspath(source)!r} is faulty: {' '.join(str(error).split())}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{os.fspath(source)!r} is neither a folder with a Transformers model nor a model of the hub within reach: "
            f"{str(error).strip().splitlines()[0]}"
        ) from None
    _require_possible_counts(config.to_dict(), os.fspath(source))
    return config


def _require_possible_counts(values: dict[str, Any], source: str) -> None:
    """Refuse a config of so many layers that they fill the memory even without weights."""
    for name, value in values.items():
        if isinstance(value, dict):
            _require_possible_counts(value, source)
        elif _COUNTED.search(str(name)) and isinstance(value, int) and value > MAX_MODULES:
            raise ConfigError(f"the config of {source!r} has {name}={value}, more than any model has: it is damaged")


def task_of(config: PeftConfig) -> str | None:
    """Return an adapter's task by PEFT's name; where PEFT has no name, as for images, the class of the model."""
    kind = config.task_type or (getattr(config, "auto_mapping", None) or {}).get("base_model_class")
    return None if kind is None else str(getattr(kind, "value", kind))


def head_arguments(adapter: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the arguments of :func:`load_base` for the classification head in an adapter's file, if there is one.

    The base model's own head may have other labels. Its weights are passed over: the adapter's take their place.
    """
    count = head_size(adapter)
    if count is None:
        return {}
    found: dict[str, Any] = {"num_labels": count, "ignore_mismatched_sizes": True}
    if (problem := problem_type(adapter)) is not None:
        found["problem_type"] = problem
    if (names := label_names(adapter)) is not None:
        found |= {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    return found


def model_class(task_type: Any, config: Any) -> Any:
    """Return the class for a task of :func:`task_of`; without a task, the class with which the model was saved."""
    kind = str(getattr(task_type, "value", task_type))
    name = AUTO_CLASSES.get(kind) or (kind if hasattr(transformers, kind) else None)
    name = name or next(iter(config.architectures or ()), "AutoModel")
    return getattr(transformers, name, transformers.AutoModel)


def load_base(source: str | os.PathLike[str], task_type: Any, **arguments: Any) -> nn.Module:
    """Return the base model with its weights.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    auto_class = model_class(task_type, model_config(source, arguments.get("trust_remote_code", False)))
    try:
        return auto_class.from_pretrained(os.fspath(source), **arguments)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the model {os.fspath(source)!r} cannot be loaded: {str(error).strip()}") from error


def with_adapter(base: nn.Module, path: str | os.PathLike[str]) -> PeftModel:
    """Return ``base`` with a saved adapter of any method in it, in evaluation mode.

    Raises:
        CheckpointError: if the adapter is damaged or does not fit ``base``.
        RandLoraError: as raised by the adapter's own checks.
    """
    try:
        return PeftModel.from_pretrained(cast("Any", base), os.fspath(path))
    except RandLoraError:
        raise
    except (ValueError, RuntimeError, KeyError, OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"the adapter in {os.fspath(path)} cannot be loaded onto {type(base).__name__}: {reason}"
        ) from error


def empty_base(
    source: str | os.PathLike[str], task_type: Any, dtype: torch.dtype | None = None, **changes: Any
) -> nn.Module:
    """Return the base model without weights (on the meta device), from its config alone.

    Args:
        source: a folder, or a name on the hub.
        task_type: of PEFT's.
        dtype: of its weights; by default as the config says.
        **changes: of its config, such as ``num_labels=3``.

    Raises:
        ConfigError: if there is no config, or none of a model for the task.
    """
    config = model_config(source)
    for name, value in changes.items():
        setattr(config, name, value)
    auto_class = model_class(task_type, config)
    build = getattr(auto_class, "from_config", None) or auto_class._from_config
    try:
        with torch.device("meta"):
            return build(config, **({} if dtype is None else {"dtype": dtype}))
    except (RuntimeError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"no model can be made of the config of {os.fspath(source)!r}: {str(error).strip().splitlines()[0]}"
        ) from None
    except ValueError:
        raise ConfigError(
            f"{os.fspath(source)!r} is of type {config.model_type!r}, for which Transformers has no "
            f"{auto_class.__name__}: name another task"
        ) from None
