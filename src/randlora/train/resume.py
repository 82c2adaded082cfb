"""Which checkpoint a run goes on from, and whether it is a checkpoint of that very run."""

from __future__ import annotations

import json
from pathlib import Path

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings, load_settings

_STATE = "trainer_state.json"  # the Trainer writes it last, so that a checkpoint which has all of it is complete

# Settings that say where and how often a run writes, not what it computes.
_MAY_DIFFER = {"output_dir", "resume", "save_steps", "eval_steps"}


def checkpoint_to_resume(settings: TrainSettings) -> Path | None:
    """The checkpoint to go on from, ``None`` to start at the beginning.

    Raises:
        ConfigError: if the checkpoint is incomplete or another run's, or if a run that does not resume would mix its
            checkpoints with those of an earlier one.
    """
    found = (Path(settings.output_dir) / "checkpoints").glob("checkpoint-*")
    complete = [folder for folder in found if _is_complete(folder)]
    if settings.resume is None:
        if complete:
            raise ConfigError(
                f"output_dir={settings.output_dir!r} holds checkpoints of an earlier run: go on from them with "
                f"resume=auto, choose another output_dir, or remove {str(complete[0].parent)!r}"
            )
        return None
    if settings.resume == "auto":
        if not complete:
            return None
        checkpoint = max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]))
    else:
        checkpoint = Path(settings.resume)
        if not _is_complete(checkpoint):
            raise ConfigError(f"resume={settings.resume!r} is not the folder of a complete checkpoint")
    _require_same_run(settings, checkpoint)
    return checkpoint


def _is_complete(checkpoint: Path) -> bool:
    """Whether its state is there to the end: a run that was killed while it wrote left a part."""
    try:
        return isinstance(json.loads((checkpoint / _STATE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def is_finished(checkpoint: Path) -> bool:
    """Whether the run had taken its last step when it wrote ``checkpoint``."""
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    return bool(state["global_step"] >= state["max_steps"])


def _require_same_run(settings: TrainSettings, checkpoint: Path) -> None:
    """Optimizer state only fits the parameters, data order and schedule that it came from."""
    resolved = checkpoint.parent.parent / "resolved.yaml"
    if not resolved.is_file():
        raise ConfigError(f"checkpoint {str(checkpoint)!r} is of no randlora run: there is no {str(resolved)!r}")
    then, now = load_settings(resolved).resolved(), settings.resolved()
    differences = [
        f"  {name}: {then[name]!r} there, {now[name]!r} here"
        for name in now
        if name not in _MAY_DIFFER and then[name] != now[name]
    ]
    if differences:
        raise ConfigError(
            f"checkpoint {str(checkpoint)!r} is of a run with other settings:\n"
            + "\n".join(differences)
            + "\nGo on with the settings there, or start anew in another output_dir."
        )
