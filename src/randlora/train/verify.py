"""A check that a saved adapter predicts the same as the trained model; run in a process of its own.

``python -m randlora.train.verify RUN`` reads a run's folder, loads the adapter onto a fresh base model, predicts,
merges, predicts again, and prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from peft import PeftModel
from transformers.utils import logging

import randlora  # noqa: F401 - registers the method
from randlora.train.data import load_data
from randlora.train.infer import predict
from randlora.train.settings import load_settings
from randlora.train.tasks import TASKS

TOLERANCE = 1e-3
"""Largest accepted difference of a logit; merging rounds W + ΔW once in float32."""


@dataclass(frozen=True)
class Verification:
    """Predictions of the trained, the reloaded and the merged model side by side.

    Attributes:
        examples: number of predictions compared.
        reloaded_difference: largest difference of a logit between trained and reloaded.
        merged_difference: largest difference of a logit between trained and merged.
        same_labels: whether all three predict the same labels throughout.
    """

    examples: int
    reloaded_difference: float
    merged_difference: float
    same_labels: bool

    @property
    def holds(self) -> bool:
        """Whether the three models predict the same, up to ``TOLERANCE``."""
        return self.same_labels and max(self.reloaded_difference, self.merged_difference) <= TOLERANCE


def verify(run: Path) -> Verification:
    """Compare the saved predictions of a classification run with those of its adapter, loaded and merged."""
    settings = load_settings(run / "resolved.yaml")
    data = load_data(settings)
    trained = np.load(run / "predictions.npz")["logits"]
    task = TASKS[settings.task]
    processor = task.load_processor(settings)
    base = task.load_model(settings, data.labels, processor)
    model = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    examples = task.prepare(data.evaluation, processor, settings)
    reloaded, merged = (
        np.asarray(predict(one(), examples, task, processor, 2 * settings.batch_size).predictions)
        for one in (lambda: model, model.merge_and_unload)
    )
    labels = [logits.argmax(-1) for logits in (trained, reloaded, merged)]
    return Verification(
        examples=len(examples),
        reloaded_difference=float(np.abs(trained - reloaded).max()),
        merged_difference=float(np.abs(trained - merged).max()),
        same_labels=all(np.array_equal(labels[0], other) for other in labels[1:]),
    )


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    print(json.dumps(asdict(verify(Path(sys.argv[1])))))
