"""Advice from measurements, for settings that a user left to the defaults."""

from __future__ import annotations

from randlora.ops.bases import CHOICES
from randlora.train.settings import TrainSettings

SCALING = (
    "advice: --scaling paper learnt more than the default, and at a wider range of learning rates (docs/hard_task.md)"
)
STRUCTURED = "advice: --structured makes a step cheaper, at a little less accuracy (docs/structured.md)"


def advice(settings: TrainSettings) -> list[str]:
    """Return a line of advice for each unset choice for which measurements favour another value than the default."""
    if settings.method != "randlora" or settings.resume is not None:
        return []
    given = settings.model_fields_set
    lines = [] if given & {"scaling", "alpha", "learning_rate"} else [SCALING]
    return lines if given & set(CHOICES) else [*lines, STRUCTURED]
