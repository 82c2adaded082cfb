"""The checkpoint from which a run goes on, and checks that it belongs to the same run."""

from __future__ import annotations

import json
from pathlib import Path

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings, load_settings

_STATE = "trainer_state.json"  # the Trainer writes this file last: if it is whole, so is the checkpoint

# Settings of where and how often a run writes, which do not change its results.
_MAY_DIFFER = {"output_dir", "resume", "save_steps", "eval_steps"}


def checkpoint_to_resume(settings: TrainSettings) -> Path | None:
    """Return the checkpoint to go on from; ``None`` to start at the beginning.

    Raises:
        ConfigError: if the checkpoint is incomplete or of another run, or if a run that does not resume would mix its
            checkpoints with those of an earlier run.
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
    """Return whether the state in a checkpoint is whole: a run killed during the writing leaves a part."""
    try:
        return isinstance(json.loads((checkpoint / _STATE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def is_finished(checkpoint: Path) -> bool:
    """Return whether ``checkpoint`` is of the last step of its run."""
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    return bool(state["global_step"] >= state["max_steps"])


def _require_same_run(settings: TrainSettings, checkpoint: Path) -> None:
    """Raise if the checkpoint has other settings: optimizer state fits only its parameters, data order and schedule."""
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
