"""Upload of an adapter to the hub, with a model card made from its run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from randlora.errors import CheckpointError, ConfigError, RandLoraError
from randlora.train.tasks import TASKS
from randlora.tuner.base_model import AUTO_CLASSES, base_path_of
from randlora.tuner.files.adapter_folder import CONFIG, head_size, problem_type, read_config
from randlora.tuner.files.atomic import write_text

_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "IMAGE_CLS": "image-classification",
}
_SHOWN = (
    *("eval_accuracy", "eval_micro_f1", "eval_macro_f1", "eval_exact_match", "eval_f1", "eval_perplexity"),
    *("eval_rmse", "eval_r2", "eval_pearson", "eval_spearman", "eval_rewards/accuracies", "eval_rewards/margins"),
    *("eval_loss", "train_loss"),
)
_NOT_UPLOADED = ["checkpoint*", "*.bin", "optimizer*", ".*"]


@dataclass(frozen=True)
class Published:
    """An upload, done or only planned.

    Attributes:
        repo_id: the repository.
        url: address of the commit; empty where nothing was uploaded.
        files: names of the files.
        nbytes: total size of the files.
        card: the model card.
    """

    repo_id: str
    url: str
    files: tuple[str, ...]
    nbytes: int
    card: str


def publish(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    licence: str | None = None,
    message: str = "Upload RandLoRA adapter",
    upload: bool = True,
) -> Published:
    """Upload a run's adapter, or an adapter folder.

    A README.md of the user stays unchanged; else a model card is written into the folder.

    Args:
        path: folder of a run or of an adapter.
        repo_id: ``user/name``; created if it does not exist.
        private: whether a new repository is private.
        licence: licence on the card, such as "apache-2.0".
        message: message of the commit.
        upload: whether to upload; if false, only the card is made, and no file is written.

    Raises:
        CheckpointError: if there is no adapter.
        ConfigError: for a malformed ``repo_id``, or without a token.
        RandLoraError: if the hub refuses or is out of reach.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"repo_id={repo_id!r}: {str(error).splitlines()[0]}") from None
    if repo_id.count("/") != 1:
        raise ConfigError(f"repo_id={repo_id!r} must be user/name")
    folder, run = _folders(Path(path))
    card = _own_card(folder) or model_card(folder, run, repo_id, licence)
    files = tuple(sorted(f.name for f in folder.iterdir() if f.is_file() and not f.name.startswith(".")))
    nbytes = sum((folder / name).stat().st_size for name in files)
    names = tuple(sorted({*files, "README.md"}))
    if not upload:
        return Published(repo_id, "", names, nbytes, card)
    write_text(folder / "README.md", card)
    url = _tried(repo_id, lambda: _upload(folder, repo_id, private, message))
    return Published(repo_id, url, names, nbytes, card)


def model_card(folder: Path, run: Path | None, repo_id: str, licence: str | None = None) -> str:
    """Return the model card of an adapter: its base model, its use, its training and its results."""
    config = read_config(folder)
    base = base_path_of(config)
    here = Path(base).exists()  # a folder of this machine means nothing to others
    if here:
        warnings.warn(
            f"the adapter's config names its base model by a folder of this machine, {base}: whoever loads it needs to "
            "know which model that is. Put its name on the hub into adapter_config.json (base_model_name_or_path).",
            stacklevel=2,
        )
        base = Path(base).name
    metrics, settings = (yaml.safe_load(_text(run, name)) or {} for name in ("metrics.json", "resolved.yaml"))
    known = TASKS[settings["task"]].model_type if settings else config.task_type  # PEFT has no name for some
    task = str(getattr(known, "value", known))
    data = ModelCardData(
        base_model=None if here else base,
        library_name="peft",
        license=licence,
        pipeline_tag=_PIPELINES.get(task),
        tags=["randlora", "peft", "base_model:adapter"],
    )
    parts = [
        f"# {repo_id.split('/')[1]}",
        f"A [RandLoRA](https://arxiv.org/abs/2502.00987) adapter of `{base}`: a full-rank update of its "
        f"weights, {_trained(metrics)}made with [randlora](https://pypi.org/project/randlora/).",
        _usage(repo_id, base, task, head_size(folder), problem_type(folder)),
        _pairs(settings),
        _metrics(metrics),
        _settings(settings),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _folders(path: Path) -> tuple[Path, Path | None]:
    """Return the folder of the adapter, and the folder of its run if there is one."""
    if (path / "adapter" / CONFIG).is_file():
        return path / "adapter", path
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{os.fspath(path)!r} is neither an adapter nor a run with one: it has no {CONFIG}")
    return path, path.parent if (path.parent / "metrics.json").is_file() else None


def _text(run: Path | None, name: str) -> str:
    """Return the content of a run's file, JSON or YAML; empty where there is none."""
    return (run / name).read_text(encoding="utf-8") if run is not None and (run / name).is_file() else ""


def _own_card(folder: Path) -> str:
    """Return the README of the user; empty for an earlier card, and for the empty form that PEFT saves."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    return "" if "[More Information Needed]" in text or "made with [randlora]" in text else text


def _trained(metrics: dict[str, Any]) -> str:
    return f"{metrics['trainable_parameters']:,} trained parameters, " if "trainable_parameters" in metrics else ""


def _usage(repo_id: str, base: str, task: str, labels: int | None, problem: str | None) -> str:
    auto = AUTO_CLASSES.get(task, "AutoModel")
    arguments = f'"{base}"' + ("" if labels is None else f", num_labels={labels}")
    if problem not in (None, "single_label_classification"):
        arguments += f', problem_type="{problem}"'
    lines = [
        "```python",
        f"from transformers import {auto}",
        "",
        "from randlora import PeftModel",
        "",
        f"base = {auto}.from_pretrained({arguments})",
        f'model = PeftModel.from_pretrained(base, "{repo_id}")',
        "```",
    ]
    return "\n".join(["## Use", "", *lines])


def _pairs(settings: dict[str, Any]) -> str:
    columns = settings.get("input_column")
    if not isinstance(columns, list) or settings["task"] == "chat":
        return ""
    first, second = columns
    return f"It reads pairs of texts, `{first}` and `{second}`: `tokenizer({first}, {second}, truncation=True)`."


def _metrics(metrics: dict[str, Any]) -> str:
    found = metrics.get("metrics", {})
    shown = {name: found[name] for name in _SHOWN if name in found}
    if not shown:
        return ""
    rows = [f"| {name.replace('_', ' ')} | {value:.4f} |" for name, value in shown.items()]
    return "\n".join(["## Results", "", "| metric | value |", "|---|---:|", *rows])


def _settings(settings: dict[str, Any]) -> str:
    """Return the settings of a run for the card, without paths of the machine."""
    private = ("model", "data", "eval_data", "output_dir", "resume")
    shown = {name: value for name, value in settings.items() if name not in private and value not in (None, [], False)}
    return f"## Training\n\n```yaml\n{yaml.safe_dump(shown, sort_keys=False).strip()}\n```" if shown else ""


def _upload(folder: Path, repo_id: str, private: bool, message: str) -> str:
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    done = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=_NOT_UPLOADED)
    return str(done.commit_url)


def _tried(repo_id: str, action: Callable[[], str]) -> str:
    try:
        return action()
    except LocalTokenNotFoundError as error:
        raise ConfigError("there is no token of the hub here: run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        if code in (401, 403):
            raise ConfigError(f"the hub does not let you write to {repo_id!r} ({code}): run `hf auth login`") from error
        raise RandLoraError(f"the hub refused the upload to {repo_id!r}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise RandLoraError(f"the hub is out of reach: {error}. Nothing is lost; run the command again") from error
