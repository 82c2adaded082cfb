"""Loading of adapters: a load that fails gives the reason, and leaves the model as it was.

PEFT first puts a new adapter into the model and then reads its file; where the file is refused, it leaves the adapter
there, untrained; and where one of its tensors is refused, those before it are in place already.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from torch import Tensor, nn

from randlora.errors import BasisMismatchError, CheckpointError, RandLoraError
from randlora.tuner.adapters.alone import alone
from randlora.tuner.adapters.withdraw import withdraw_adapter
from randlora.tuner.bases import fingerprint
from randlora.tuner.config import RandLoraConfig
from randlora.tuner.files.adapter_folder import require_loadable
from randlora.tuner.layers.base import adapted

_Kept = list[tuple[nn.Module, str, Tensor, Tensor]]  # module, attribute, tensor, a copy of its values
_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextmanager
def taken_back_on_failure(model: nn.Module, adapter: str) -> Iterator[None]:
    """Take back ``adapter`` if it was added to ``model`` within the context, and the context ends with an error.

    Within the context the model holds no other adapter's λ and γ.
    """
    was_there, had_config = _has(model, adapter), hasattr(model, "peft_config")
    try:
        with alone(model, adapter):
            trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
            yield
    except Exception:
        if not was_there:
            if _has(model, adapter):  # else the injected layers have been withdrawn
                withdraw_adapter(model, adapter)
                getattr(model, "peft_config", {}).pop(adapter, None)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
        if not had_config and not getattr(model, "peft_config", True):
            del model.peft_config
        raise


@contextmanager
def put_back_on_failure(model: nn.Module, adapter: str) -> Iterator[None]:
    """Restore values and bases of ``adapter``, which ``model`` has, if the context ends with an error."""
    values = [(p, p.detach().clone()) for name, p in model.named_parameters() if adapter in name.split(".")]
    layers = [layer for layer in adapted(model).values() if adapter in layer.bases]
    bases = [layer.bases[adapter] for layer in layers]
    numbers = [(held, held[adapter]) for x in layers for held in (x.scaling, x.initial_scaling, x.gamma_factor)]
    try:
        yield
    except Exception:
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)
        for layer, basis in zip(layers, bases, strict=True):
            layer.bind_basis(adapter, basis)
        for held, number in numbers:
            held[adapter] = number
        raise


def reads_a_file() -> bool:
    """Return whether an adapter's file is being loaded, rather than tensors that a program hands over."""
    return _kept.get() is not None


def keep_base_tensors(model: nn.Module, names: Iterable[str]) -> None:
    """Keep tensors of the base model before a file writes into them: trained biases, resized embeddings."""
    kept = _kept.get()
    assert kept is not None
    for name in names:
        parent, _, attribute = name.rpartition(".")
        module = model.get_submodule(parent)
        tensor = getattr(module, attribute)
        kept.append((module, attribute, tensor, tensor.detach().clone()))


@contextmanager
def base_put_back_on_failure() -> Iterator[None]:
    """Restore the tensors that ``keep_base_tensors`` has kept if the context ends with an error."""
    kept: _Kept = []
    token = _kept.set(kept)
    try:
        yield
    except Exception:
        with torch.no_grad():
            for module, attribute, tensor, values in kept:
                tensor.copy_(values)
                setattr(module, attribute, tensor)  # a load that assigns has put another one there
        raise
    finally:
        _kept.reset(token)


@contextmanager
def named_errors(model: nn.Module, path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise errors of PEFT, safetensors and torch about a bad RandLoRA adapter as errors of this package.

    Raises:
        CheckpointError: with the other error as its cause.
    """
    try:
        yield
    except (RandLoraError, OSError, torch.OutOfMemoryError):
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError, re.error) as error:
        reason = " ".join(str(error).split())[:500]
        raise CheckpointError(
            f"the adapter in {os.fspath(path)!r} cannot be loaded onto {type(model).__name__}: "
            f"{type(error).__name__}: {reason}"
        ) from error


def from_pretrained_or_nothing(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``PeftModel.from_pretrained`` (the function), made to leave nothing behind when it fails."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def from_pretrained(cls: type, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(cls, model, *args, **kwargs).arguments
        with ExitStack() as undo:
            if _config_of(bound):
                undo.enter_context(named_errors(model, bound["model_id"]))
            undo.enter_context(taken_back_on_failure(model, bound.get("adapter_name", "default")))
            return load(cls, model, *args, **kwargs)

    return from_pretrained


def load_adapter_or_nothing(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``PeftModel.load_adapter``, made to leave the model as it was when it fails."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_adapter(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(model, *args, **kwargs).arguments
        adapter = bound["adapter_name"]
        with ExitStack() as undo:
            if config := _config_of(bound):
                undo.enter_context(named_errors(model, bound["model_id"]))
            undo.enter_context(taken_back_on_failure(model, adapter))
            undo.enter_context(base_put_back_on_failure())
            if not _has(model, adapter):
                return load(model, *args, **kwargs)
            undo.enter_context(put_back_on_failure(model, adapter))
            result = load(model, *args, **kwargs)
            if config:
                _require_bases_of(config, bound["model_id"], model, adapter)
            return result

    return load_adapter


def _require_bases_of(config: RandLoraConfig, path: str | os.PathLike[str], model: nn.Module, adapter: str) -> None:
    """Require that a file loaded into an existing adapter, whose config PEFT keeps, has the adapter's bases.

    Raises:
        BasisMismatchError: if it was trained with other bases.
    """
    expected, found = config.basis_fingerprint, fingerprint(list(adapted(model, adapter).values()), adapter)
    if expected not in (None, found):
        raise BasisMismatchError(
            f"the adapter in {os.fspath(path)!r} was trained with bases of fingerprint {expected}, {adapter!r} has "
            f"those of {found}: load it under another name, or call hotswap_adapter, which takes over its config"
        )


def _config_of(arguments: dict[str, Any]) -> RandLoraConfig | None:
    """Return the config of the adapter of RandLoRA that PEFT is to load; refuse a bad folder at once."""
    given: PeftConfig | None = arguments.get("config")
    return require_loadable(arguments["model_id"], arguments.get("kwargs", {}).get("subfolder"), given)


def _has(model: nn.Module, adapter: str) -> bool:
    """Return whether a layer has the adapter, or a part of it."""
    layers = adapted(model).values()
    return any(adapter in getattr(x, name) for x in layers for name in x.adapter_layer_names + x.other_param_names)
