"""The tasks that a run can learn, one file for each."""

from randlora.train.tasks.base import Outcome, Task, require_length
from randlora.train.tasks.chat import Chat
from randlora.train.tasks.classification import SequenceClassification
from randlora.train.tasks.image import ImageClassification
from randlora.train.tasks.language import CausalLanguage
from randlora.train.tasks.multi_label import MultiLabel
from randlora.train.tasks.preference import DirectPreference, OddsRatioPreference, Preference, UnpairedPreference
from randlora.train.tasks.regression import Regression
from randlora.train.tasks.token import TokenClassification

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SequenceClassification(),
        Regression(),
        MultiLabel(),
        TokenClassification(),
        CausalLanguage(),
        Chat(),
        DirectPreference(),
        UnpairedPreference(),
        OddsRatioPreference(),
        ImageClassification(),
    )
}

__all__ = ["TASKS", "Outcome", "Preference", "Task", "require_length"]
