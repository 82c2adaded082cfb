"""The effect of settings on real data: accuracy and forgetting against learning rate, scaling, rank and method.

The data are the demo's: its 4,000 training sentences for one epoch. Accuracy is taken on the 3,530 film reviews that
the demo neither trains on nor tests on, so that no setting is chosen by the demo's test sentences. Forgetting is
measured on the base model's own task, similarity of sentences: the share of each sentence's ten nearest, among 1,000
sentences about Python, that are still among its ten nearest after training.
"""

import csv
import os
import pydoc_data.topics
import random
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional

from randlora.errors import RandLoraError
from randlora.report.statistics import wilson_interval
from randlora.train.demo import DemoSize, model_folder, train_in_own_process, write_sentences
from randlora.train.settings import TrainSettings
from randlora.train.trained import load_trained

from . import choosing
from .record import RESULTS

ALL = DemoSize(train=7530, test=1000)  # every sentence there is
TRAIN = 4000
NEAREST = 10

RANDLORA: dict[str, Any] = {"method": "randlora", "r": 32, "scale": 20.0}
PAPER: dict[str, Any] = {**RANDLORA, "scaling": "paper", "scale": 2.0}
LORA: dict[str, Any] = {"method": "lora", "r": 5, "scale": 2.0}
CASES: tuple[dict[str, Any], ...] = (
    *({**RANDLORA, "learning_rate": rate} for rate in (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    *({**RANDLORA, "learning_rate": 3e-4, "scale": scale} for scale in (2.0, 6.0, 60.0)),
    *({**PAPER, "learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    *({**RANDLORA, "learning_rate": 3e-4, "r": r} for r in (8, 16, 64, 128, 384)),
    *({**RANDLORA, "learning_rate": 3e-4, kind: True} for kind in ("sparse", "very_sparse")),
    *({**LORA, "learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3, 1e-2)),
    *({**LORA, "learning_rate": 1e-3, "r": r} for r in (1, 16, 64)),
    *({"method": "full", "learning_rate": rate} for rate in (3e-5, 1e-4, 3e-4)),
    *({"method": "head", "learning_rate": rate} for rate in (3e-3, 1e-2)),
)
QUICK = (CASES[2], CASES[-1])
COLUMNS = (
    "method",
    "bases",
    "scaling",
    "r",
    "alpha/r",
    "learning rate",
    "trainable",
    "accuracy %",
    "from %",
    "to %",
    "neighbours kept %",
)


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows; two runs of one thread each at a time, since no run is timed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        train, evaluation = split(Path(folder), quick)
        texts = foreign_sentences(100 if quick else 1000)
        before = neighbours(model_folder(), texts)

        def one(numbered: tuple[int, dict[str, Any]]) -> dict[str, Any]:
            number, case = numbered
            settings = settings_of(case, train, evaluation, str(Path(folder) / str(number)))
            return {**described(case, settings), **outcome(settings, texts, before)}

        rows = []
        for row in pool.map(one, enumerate(QUICK if quick else CASES)):
            rows.append(row)
            yield row
    choosing.draw(RESULTS / "sweep-quick.png" if quick else choosing.PICTURE, rows)


def split(folder: Path, quick: bool) -> tuple[Path, Path]:
    """Return files of the demo's training sentences and of the sentences that the demo does not use."""
    file, _ = write_sentences(folder, ALL, seed=0)  # its first 4,000 are the demo's
    rows = read_rows(file)
    parts = {"train": rows[: 64 if quick else TRAIN], "evaluation": rows[TRAIN:][: 200 if quick else None]}
    for name, part in parts.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as target:
            csv.writer(target).writerows([("text", "label"), *part])
    return folder / "train.csv", folder / "evaluation.csv"


def read_rows(file: Path) -> list[list[str]]:
    with file.open(encoding="utf-8", newline="") as source:
        return list(csv.reader(source))[1:]


def settings_of(case: dict[str, Any], train: Path, evaluation: Path, output: str) -> TrainSettings:
    chosen = {key: value for key, value in case.items() if key != "scale"}
    if "scale" in case:
        chosen["alpha"] = case["scale"] * case["r"]
    return TrainSettings(
        model=str(model_folder()),
        data=str(train),
        eval_data=str(evaluation),
        max_length=64,
        modules_to_save=["pooler"],
        output_dir=output,
        **chosen,
    )


def described(case: dict[str, Any], settings: TrainSettings) -> dict[str, Any]:
    kinds = [kind for kind in ("sparse", "very_sparse") if case.get(kind)]
    adapter, randlora = "r" in case, settings.method == "randlora"
    return {
        "method": settings.method,
        "bases": (kinds or ["dense"])[0].replace("_", " ") if randlora else "",
        "scaling": settings.scaling if randlora else "",
        "r": settings.r if adapter else None,
        "alpha/r": case.get("scale"),
        "learning rate": f"{settings.peak_learning_rate:g}",
    }


def outcome(settings: TrainSettings, texts: list[str], before: torch.Tensor) -> dict[str, Any]:
    """Return the figures of a run, all ``None`` if it ended with a loss that is not a number."""
    result: dict[str, Any] = dict.fromkeys(COLUMNS[6:])
    try:
        metrics = train_in_own_process(settings)
    except RandLoraError:
        return result
    accuracy, count = metrics["metrics"]["eval_accuracy"], len(read_rows(Path(str(settings.eval_data))))
    low, high = wilson_interval(round(accuracy * count), count)
    result |= {"trainable": metrics["trainable_parameters"], "accuracy %": 100 * accuracy}
    result |= {"from %": 100 * low, "to %": 100 * high, "neighbours kept %": 100.0}
    if settings.method != "head":  # a head alone changes no sentence's vector
        result["neighbours kept %"] = 100 * kept(before, neighbours(Path(settings.output_dir), texts))
    return result


def foreign_sentences(count: int) -> list[str]:
    """Return a fixed sample of sentences from Python's reference manual, which comes with Python."""
    text = " ".join(topic.replace("\n", " ") for topic in pydoc_data.topics.topics.values())
    sentences = sorted({" ".join(one.split()) for one in re.findall(r"(?<=\.) +[A-Z][^.]{40,200}\.(?=\s)", text)})
    return random.Random(0).sample(sentences, count)


@torch.no_grad()
def neighbours(folder: Path, texts: list[str]) -> torch.Tensor:
    """Return each text's nearest ones (texts, NEAREST) by cosine; vectors are means of the last hidden states."""
    trained = load_trained(folder, task="sequence-classification")
    vectors = []
    for start in range(0, len(texts), 100):
        batch = trained.processor(texts[start : start + 100], padding=True, truncation=True, return_tensors="pt")
        states = trained.model(**batch, output_hidden_states=True).hidden_states[-1]
        mask = batch["attention_mask"][..., None]
        vectors.append(functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    unit = torch.cat(vectors)
    return (unit @ unit.T).fill_diagonal_(-1).topk(NEAREST).indices


def kept(before: torch.Tensor, after: torch.Tensor) -> float:
    return fmean(len(set(old) & set(new)) / NEAREST for old, new in zip(before.tolist(), after.tolist(), strict=True))
