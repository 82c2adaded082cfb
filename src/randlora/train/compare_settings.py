"""The settings of a comparison: the keys of its YAML file and the flags of ``randlora compare``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from randlora.train.settings import TrainSettings

DECIDED = (
    "method",
    "r",
    "alpha",
    "learning_rate",
    "save_steps",
    "eval_steps",
    "early_stopping",
    "best",
    "report_to",
    "resume",
)
"""Settings of a run that the comparison decides. Best checkpoints and early stopping would choose by the test data."""

Way = Literal["randlora", "structured", "lora", "full", "head"]


class CompareSettings(TrainSettings):
    """The settings of one comparison: those that its runs share, and its own."""

    minutes: float = Field(60.0, gt=0, description="Time for all of it; what fits is planned and shown first.")
    methods: list[Way] = Field(
        list(get_args(Way)),
        description="Those to compare, separated by commas; by default all that the task allows: "
        "randlora, structured, lora, full, head.",
    )
    ranks: list[Annotated[int, Field(ge=1)]] = Field(
        [8, 32],
        description="RandLoRA's r to try, separated by commas; by default 8,32. Each stands beside a LoRA that trains "
        "about as many values.",
    )
    other_data: str | None = Field(
        None, description="Data of another kind, in the same columns, on which to measure what each method forgets."
    )
    output_dir: str = Field("runs/compare", description="Folder for everything that the comparison writes.")

    @field_validator("methods", "ranks", mode="before")
    @classmethod
    def _split_lists(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _leaves_decisions(self) -> CompareSettings:
        decided = sorted(self.model_fields_set & set(DECIDED))
        if decided:
            raise ValueError(f"{', '.join(decided)}: a comparison decides these itself; leave them out")
        if self.streaming:
            raise ValueError("streaming=True: a comparison keeps its data for all its runs; leave it out")
        if not {"randlora", "structured"} & set(self.methods):
            raise ValueError(f"methods={self.methods}: the question is whether RandLoRA helps; add randlora")
        return self

    def of_run(self, **changes: Any) -> TrainSettings:
        """Return the settings of a run of the comparison, with ``changes``."""
        shared = {name: getattr(self, name) for name in TrainSettings.model_fields if name not in DECIDED}
        return TrainSettings(**shared, **changes)
