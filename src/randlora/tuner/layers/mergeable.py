"""Checks that a base layer may store W + ΔW: it must store W, and use W as the adapter uses ΔW beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from randlora.errors import MergeError, UnsupportedLayerError


def require_stored(base: nn.Module, parameter_name: str, where: str) -> Tensor:
    """Return the weight, a parameter or buffer of the base layer.

    Args:
        base: the base layer.
        parameter_name: name of the weight.
        where: name of the layer for messages.

    Raises:
        MergeError: if the weight is computed, as by ``weight_norm`` and pruning, or not of a floating dtype.
    """
    weight = (base._buffers | base._parameters).get(parameter_name)
    if weight is None:
        raise MergeError(
            f"{where} computes its {parameter_name!r} from other parameters (parametrization, weight_norm, "
            "spectral_norm, pruning), so that a merged one has no place. Fix the weight before adapting "
            "(`torch.nn.utils.parametrize.remove_parametrizations`, `remove_weight_norm`, `remove_spectral_norm`, "
            "`prune.remove`), or keep the adapter unmerged. No base weight is changed."
        )
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise MergeError(
            f"{where} holds its {parameter_name!r} in {weight.dtype}, in which a merged one cannot be written. Load "
            "the model unquantised, or keep the adapter unmerged. No base weight is changed."
        )
    return weight


def require_exchangeable(base: nn.Module, parameter_name: str, where: str) -> None:
    """Check that the weight can be replaced while the module runs, so that no hook computes it again.

    Raises:
        UnsupportedLayerError: if the weight is computed.
    """
    # below FSDP the weight is not a parameter either, but has no hooks
    hooked = parameter_name not in base._parameters and len(base._forward_pre_hooks) > 0
    if hooked or is_parametrized(base, parameter_name):
        raise UnsupportedLayerError(
            f"{where} computes its {parameter_name!r} from other parameters (parametrization, weight_norm, "
            "spectral_norm, pruning) and cannot run with W + ΔW in its place: fix the weight before adapting "
            "(`torch.nn.utils.parametrize.remove_parametrizations`, `remove_weight_norm`, `remove_spectral_norm`, "
            "`prune.remove`), or leave it out"
        )


def require_linear(
    base: nn.Module, parameter_name: str, x: Tensor, product: Callable[[Tensor], Tensor], where: str
) -> None:
    """Check that a change of the weight changes the output for ``x`` like an update beside the layer.

    The check calls the layer with its own weight and with another one, both in evaluation mode.

    Args:
        base: a base layer with a forward of its own, or with hooks.
        parameter_name: name of the weight.
        x: an input.
        product: function from a change of the weight to the output of that update for ``x``.
        where: name of the layer for messages.

    Raises:
        MergeError: if the outputs differ, or the layer cannot be called in this way.
    """
    weight = require_stored(base, parameter_name, where).detach()
    if weight.is_meta:
        raise MergeError(f"{where} is offloaded and has a forward or hooks of its own: load the model whole to merge")
    change = _change_of(weight)
    try:
        with torch.no_grad(), _evaluating(base):
            found = functional_call(base, {parameter_name: weight + change}, (x,)) - base(x)
            expected = product(change)
    except Exception as error:
        raise MergeError(
            f"{where} has a forward or hooks of its own, and calling it to see what a merged weight would do there "
            f"has failed ({type(error).__name__}: {error}). {_UNMERGED}"
        ) from error
    tolerance = max(8 * torch.finfo(weight.dtype).eps, 2e-3) * expected.abs().max()
    if found.shape != expected.shape or not (found - expected).abs().max() <= tolerance:
        raise MergeError(
            f"{where} has a forward or hooks of its own, which do not use its weight as a plain product: with a merged "
            f"weight it would compute something else than with the adapter. {_UNMERGED}"
        )


def random_input(shape: tuple[int, ...], weight: Tensor) -> Tensor:
    """Return random numbers, the same at each call, in the dtype and on the device of the weight."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)


_UNMERGED = (
    "Keep the adapter unmerged, or train one that leaves the module out (`exclude_modules`). No base weight is changed."
)


def _change_of(weight: Tensor) -> Tensor:
    """Return a random change as large as the weight, since a small one would disappear in rounding."""
    change = torch.empty_like(weight).normal_(generator=torch.Generator(weight.device).manual_seed(0))
    size = weight.float().square().mean().sqrt()
    return change * torch.where(size.isfinite() & (size > 0), size, 1.0).to(weight.dtype)


@contextmanager
def _evaluating(base: nn.Module) -> Iterator[None]:
    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
