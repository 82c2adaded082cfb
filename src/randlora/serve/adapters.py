"""The adapters of one base model, by the names that requests use."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from peft import PeftModel

from randlora.errors import CheckpointError, ConfigError, UnknownModelError
from randlora.train.tasks import TASKS
from randlora.train.trained import Place, Trained, load_language_model, load_processor, locate, task_of
from randlora.tuner.adapters.mixed_batch import one_adapter_per_sample
from randlora.tuner.base_model import base_path_of
from randlora.tuner.files.adapter_folder import CONFIG, read_adapter
from randlora.tuner.files.loading import named_errors
from randlora.tuner.layers.base import adapted
from randlora.tuner.layers.rows import BASE

_OF_TOKENIZERS = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "additional_chat", "vocab", "merges")
_SHOWN = 20
"""The most names in a message, so that it stays readable beside a thousand adapters."""


@dataclass(frozen=True)
class Served:
    """An adapter, or the base model, that a request can name.

    Attributes:
        name: name in requests.
        key: name of the adapter in the model, never used twice; ``"__base__"`` for the base model.
        trained: folder, tokenizer and settings; ``trained.model`` is the base model, shared by all adapters.
        since: time of loading, in seconds since the epoch.
    """

    name: str
    key: str
    trained: Trained
    since: int = field(default_factory=lambda: int(time.time()))


class Adapters:
    """A base model with adapters that are loaded and unloaded by name.

    Only one thread may load, unload and call :meth:`rows`. Any thread may look up names.

    Attributes:
        base: the base model, as returned by :func:`load_language_model`.
    """

    def __init__(self, base: Trained, same_bases: Sequence[str] = ()) -> None:
        """Serve a base model, at first without adapters.

        Args:
            base: the base model.
            same_bases: other names of the base model in the configs of adapters.
        """
        self.base = base
        self._served = {base.base: Served(base.base, BASE, base)}
        self._bases = (base.base, *same_bases)
        self._keys = (f"served_{number}" for number in count())
        self._peft: Any = None  # PEFT's model around the base, from the first adapter on
        self._tokenizers: dict[str, Any] = {}

    @classmethod
    def for_paths(cls, paths: Sequence[Path], model: str | None = None) -> Adapters:
        """Load the base model of adapters and return it, without the adapters.

        Args:
            paths: folders of the adapters or of their runs.
            model: the base model, if it is not where the adapters' configs say.

        Raises:
            ConfigError: if the base model cannot be loaded, or neither an adapter nor ``model`` names one.
            CheckpointError: if the first path is not an adapter.
        """
        if not paths:
            if model is None:
                raise ConfigError("there is nothing to serve: name an adapter, or a base model by --model")
            return cls(load_language_model(model, None, model))
        places = [locate(path) for path in paths]
        first = places[0]
        _require_adapter(first)
        base = base_path_of(first.config, model)  # type: ignore[arg-type]
        named = [] if model is None else [place.config.base_model_name_or_path for place in places if place.config]
        return cls(load_language_model(base, first.run, os.fspath(first.folder)), [name for name in named if name])

    @property
    def served(self) -> list[Served]:
        """The base model and the adapters, in the order in which they were loaded."""
        return list(self._served.values())

    def named(self, name: str) -> Served:
        """Return the adapter or the base model of this name.

        Raises:
            UnknownModelError: if nothing has the name; the message lists the known names.
        """
        found = self._served.get(name)
        if found is not None:
            return found
        shown = ", ".join(map(repr, islice(list(self._served), _SHOWN)))
        more = f" and {len(self._served) - _SHOWN:,} more" if len(self._served) > _SHOWN else ""
        raise UnknownModelError(f"there is no model {name!r} here; there are {shown}{more}")

    def load(self, name: str, path: Path) -> Served:
        """Load an adapter and serve it by a name from now on.

        Raises:
            ConfigError: if the name is taken or not printable, the adapter is for another task or base model, or the
                adapter cannot be served beside others.
            CheckpointError: if the folder has no adapter, or a damaged one.
        """
        if not name or not name.isprintable():
            raise ConfigError(f"the name {name!r} cannot be an adapter's: take one of printable characters")
        if name in self._served:
            raise ConfigError(f"there is a model {name!r} already: unload it first, or take another name")
        place = locate(path)
        self._require_servable(place)
        trained = replace(self.base, path=place.folder, processor=self._tokenizer(place.folder), run=place.run)
        key = next(self._keys)
        self._put(place.folder, key)
        self._served[name] = Served(name, key, trained)
        return self._served[name]

    def withdraw(self, name: str) -> Served:
        """Remove an adapter's name and return the adapter. Its weights stay in memory until :meth:`forget`.

        Raises:
            ConfigError: if the name is the base model's.
            UnknownModelError: if nothing has the name.
        """
        served = self.named(name)
        if served.key == BASE:
            raise ConfigError(f"{name!r} is the base model, which stays: only adapters can be unloaded")
        del self._served[name]
        return served

    def forget(self, served: Served) -> None:
        """Free the memory of a withdrawn adapter."""
        self._peft.delete_adapter(served.key)

    @contextmanager
    def rows(self, keys: Sequence[str]) -> Iterator[Any]:
        """Yield the model; within the context it computes row i of a batch with the adapter ``keys[i]``."""
        with one_adapter_per_sample(self.base.model, keys, 1):
            yield self.base.model

    def _require_servable(self, place: Place) -> None:
        _require_adapter(place)
        task = task_of(place, self.base.base)
        if TASKS[task].model_type != "CAUSAL_LM":
            raise ConfigError(f"serve is for language models, and the adapter in {place.folder} is for {task}")
        wanted = getattr(place.config, "base_model_name_or_path", None)
        if wanted is not None and not any(_same(wanted, base) for base in self._bases):
            raise ConfigError(
                f"the adapter in {place.folder} is for the base model {wanted!r}, and {self.base.base!r} is served"
            )
        codes, here = (run.quantization if run else "none" for run in (place.run, self.base.run))
        if place.run is not None and codes != here:
            raise ConfigError(
                f"the adapter in {place.folder} was trained on a base model with quantization={codes!r}, and it is "
                f"served with {here!r}: serve it by another process"
            )
        others = read_adapter(place.folder).others
        if others:
            raise ConfigError(
                f"the adapter in {place.folder} brings {len(others)} tensors beside λ and γ, such as "
                f"{next(iter(others))!r}, which other adapters would share: merge it (`randlora merge`) and serve the "
                "model"
            )

    def _put(self, folder: Path, key: str) -> None:
        """Load the adapter's weights into the model, all or none."""
        with named_errors(self.base.model, folder):
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self.base.model, os.fspath(folder), adapter_name=key)
            else:
                self._peft.load_adapter(os.fspath(folder), adapter_name=key)
        self._peft.base_model.set_adapter([])  # each row of a batch names its adapter
        self.base.model.eval()
        shared = [path for path, layer in adapted(self.base.model, key).items() if not layer.computes_rows]
        if shared:
            self._peft.delete_adapter(key)
            raise ConfigError(
                f"the adapter in {folder} cannot be served beside others, because it adapts {shared[0]!r}, whose one "
                "weight is that of all rows of a batch: merge it (`randlora merge`) and serve the model"
            )

    def _tokenizer(self, folder: Path) -> Any:
        """Return the tokenizer in the folder, or the base model's; folders with the same files share one object."""
        files = sorted(file for file in folder.iterdir() if file.is_file() and _is_of_tokenizer(file.name))
        if not files:
            return self.base.processor
        content = hashlib.sha256()
        for file in files:
            content.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            content.update(file.read_bytes())
        key = content.hexdigest()
        if key not in self._tokenizers:
            self._tokenizers[key] = load_processor((os.fspath(folder), self.base.base), TASKS["causal-lm"])
        return self._tokenizers[key]


def _require_adapter(place: Place) -> None:
    if place.config is None:
        raise CheckpointError(f"{os.fspath(place.folder)!r} is no adapter: it has no {CONFIG}")


def _is_of_tokenizer(name: str) -> bool:
    return name.startswith(_OF_TOKENIZERS) or name.endswith((".model", ".tiktoken"))


def _same(one: str, other: str) -> bool:
    """Return whether two names mean the same base model; a folder may have several paths."""
    return one == other or (os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other))
