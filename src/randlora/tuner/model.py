"""RandLoRA as a PEFT tuner: the model class that finds, adapts and replaces modules."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from randlora.errors import ConfigError
from randlora.ops.bases import AwaitedBasis, Basis, num_bases
from randlora.tuner.adapter_name import require_usable_name
from randlora.tuner.adapters import weighted_sum
from randlora.tuner.adapters.alone import alone
from randlora.tuner.adapters.mixed_batch import copies_per_sample, one_adapter_per_sample
from randlora.tuner.adapters.reference import fill_reference, is_reference
from randlora.tuner.adapters.switch import switch
from randlora.tuner.adapters.unused import name_unused_layers
from randlora.tuner.adapters.withdraw import delete_copies, withdraw_adapter
from randlora.tuner.bases import bind_defined_bases, fingerprint
from randlora.tuner.config import RandLoraConfig
from randlora.tuner.experts import warn_of_experts_left_out, with_experts
from randlora.tuner.files import checkpoint
from randlora.tuner.files.checks import require_own_tensors, require_sound_values
from randlora.tuner.files.format import HOST, PREFIX
from randlora.tuner.files.key_names import names_alone, names_in, without_biases_of_others
from randlora.tuner.files.loading import keep_base_tensors, reads_a_file
from randlora.tuner.layers.base import ProjectionView, RandLoraLayer, adapted
from randlora.tuner.layers.kinds import kind_of
from randlora.tuner.layers.parameter import parts_of_wrapped
from randlora.tuner.layers.quantized import one_rounding_warning
from randlora.tuner.layers.read_weight import reads_weight_of
from randlora.tuner.unmatched import instead_of_peft_warnings, warn_of_unmatched
from randlora.tuner.wrappers import (
    is_wrapped,
    names_in_tree,
    names_to_load,
    plain_names,
    plain_view,
    put,
    renew,
    step_into,
    without_steps,
)


class RandLoraModel(BaseTuner):
    """A model with RandLoRA adapters.

    Args:
        model: the model to adapt.
        peft_config: a :class:`RandLoraConfig`, or PEFT's own, or several by adapter name.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create λ and γ on the meta device, to be filled by a file.
        state_dict: adapt the modules that its keys name instead of those that the config targets.

    Raises:
        UnsupportedLayerError: if a targeted module is of a kind that cannot be adapted.
        BasisMismatchError: if the config records other bases than this model defines.
    """

    prefix: str = "randlora_"
    tuner_layer_cls = RandLoraLayer
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        # PeftModel hands over a dict, and reads the bases of a file; direct injection a config, and does not
        if isinstance(peft_config, PeftConfig):
            config = cast("RandLoraConfig", self.peft_config[adapter_name])
            checkpoint.warn_of_unread_bases(config)
            if config.read_from_file and is_wrapped(model):
                _warn_of_unknown_names()

    @property
    def randlora_A(self) -> Mapping[str, Tensor]:
        """For each adapter, a copy of the basis A of shape (r, 1, m) that all its layers of rank ``config.r`` share."""
        return ProjectionView(self._bases, 0)

    @property
    def randlora_B(self) -> Mapping[str, Tensor]:
        """For each adapter, a copy of the basis B of shape (M, n, r) that all its layers of rank ``config.r`` share."""
        return ProjectionView(self._bases, 1)

    def _bases(self) -> dict[str, Basis | AwaitedBasis]:
        return {
            name: basis
            for layer in adapted(self.model).values()
            for name, basis in layer.bases.items()
            if layer.r[name] == cast("RandLoraConfig", self.peft_config[name]).r
        }

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add the adapter's layers, then their bases; on failure the model is as it was."""
        config = self.peft_config[adapter_name] = RandLoraConfig.adopt(self.peft_config[adapter_name])
        there = adapted(model).values()
        disabled = bool(there) and all(layer.disable_adapters for layer in there)
        try:
            with alone(model, adapter_name):
                require_usable_name(model, adapter_name)
                asked, plain = copy.copy(config), plain_view(model)
                if state_dict is None:
                    config = self.peft_config[adapter_name] = with_experts(config, plain)
                    warn_of_experts_left_out(config, plain)
                _maybe_include_all_linear_layers(config, plain)
                named = None if state_dict is None else names_in_tree(model, state_dict)
                with instead_of_peft_warnings(config):
                    super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, named)
                if state_dict is None:
                    self._adapt_what_peft_passes_over(model, adapter_name)
                    warn_of_unmatched(asked, plain_view(model), adapter_name)
            if adapter_name not in self.active_adapters:
                _freeze_copies(model, adapter_name)
            layers = list(adapted(model, adapter_name).values())
            if layers:
                self._bind_bases(layers, config, adapter_name)
            if is_reference(self.peft_config, adapter_name):
                fill_reference(model)
            if disabled:  # modules that are new to the model are not
                self._enable_adapter_layers(False)
            if not config.inference_mode:
                name_unused_layers(model)
        except Exception:
            withdraw_adapter(model, adapter_name)
            raise

    def _adapt_what_peft_passes_over(self, model: nn.Module, adapter_name: str) -> None:
        """Adapt targets within modules a parameter of which is wrapped already: PEFT does not look into layers."""
        config = self.peft_config[adapter_name]
        for path, part in parts_of_wrapped(model):
            done = isinstance(part, RandLoraLayer) and adapter_name in part.randlora_lambda
            plain = path.replace(".base_layer", "")
            if not done and self._check_target_module_exists(config, plain):
                parent, _, name = path.rpartition(".")
                trainable = [(parameter, parameter.requires_grad) for parameter in part.parameters()]
                self._create_and_replace(config, adapter_name, part, name, model.get_submodule(parent), plain)
                for parameter, requires_grad in trainable:
                    parameter.requires_grad_(requires_grad)
                layer = cast("RandLoraLayer", model.get_submodule(path))
                layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _bind_bases(self, layers: list[RandLoraLayer], config: RandLoraConfig, adapter_name: str) -> None:
        bind_defined_bases(layers, config, adapter_name)
        _warn_of_single_bases(layers, adapter_name)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        """Return whether the config targets a module; a wrapper has the name of its inner module."""
        return BaseTuner._check_target_module_exists(peft_config, without_steps(key))

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        """Refuse other ``target_parameters`` than earlier adapters: names in files tell how wrappers are nested."""
        super()._check_new_adapter_config(config)
        wanted = set(getattr(config, "target_parameters", None) or ())
        for name, other in self.peft_config.items():
            there = set(getattr(other, "target_parameters", None) or ())
            if wanted and there and wanted != there:
                raise ConfigError(
                    f"target_parameters={sorted(wanted)} differ from those of the adapter {name!r}, {sorted(there)}: "
                    "all adapters of a model that target parameters must target the same ones"
                )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, and let them train.

        Args:
            adapter_name: name of the adapter, or several.
            inference_mode: let none train.
        """
        switch(self.model, adapter_name, inference_mode)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the only active one, the first of the others becomes active in all layers.

        (Left to themselves, layers that carry different adapters would choose different ones.)
        """
        active = [name for name in self.active_adapters if name != adapter_name]
        was_active = adapter_name in self.active_adapters
        layers = adapted(self.model, adapter_name).values()
        if not any(adapter_name in layer.merged_adapters for layer in layers):  # else PEFT refuses
            delete_copies(self.model, adapter_name)
        super().delete_adapter(adapter_name)
        following = active or sorted(self.peft_config)[:1]
        if was_active and following:
            self.set_adapter(following)

    def withdraw_adapter(self, adapter_name: str) -> None:
        """Take an adapter back as if it had never been added; modules that it alone has adapted are unwrapped."""
        withdraw_adapter(self.model, adapter_name)
        self.peft_config.pop(adapter_name, None)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if step_into(target) is not None:
            return  # its inner module is a target too
        config, current_key = cast("RandLoraConfig", peft_config), without_steps(current_key)
        kind = kind_of(target, current_key, self.model, config, parameter_name)
        rank, scaling = config.rank_and_scaling(current_key, min(kind.shape))
        # A config that was saved announces a file, in which γ holds the scaling's share. PEFT's way of loading takes
        # it out again; others, Transformers' among them, put the file's values into γ as they are.
        folded = config.basis_fingerprint is not None and config.randlora_scaling == "paper"
        gamma_factor = 1 / math.sqrt(num_bases(rank, min(kind.shape))) if folded else 1.0
        adapter: dict[str, Any] = {
            "r": rank,
            "scaling": scaling / gamma_factor,
            "gamma_factor": gamma_factor,
            "randlora_dropout": config.randlora_dropout,
            "init_weights": config.init_weights,
            "inference_mode": config.inference_mode,
        }
        if isinstance(target, RandLoraLayer) and parameter_name in (None, target.parameter_name):
            target.update_layer(adapter_name, **adapter)
            return
        layer: Any = kind.create(target, adapter_name, **adapter)
        layer.path = current_key
        if reads_weight_of(parent, target_name):
            layer.read_by_parent = True
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not active, hence not trained
        self._replace_module(parent, target_name, layer, target)

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Train the input embeddings, and let the modules tied to them be the same module."""
        inputs = self.model.get_input_embeddings()
        embeddings = next(name for name, module in self.model.named_modules() if module is inputs)
        others = [
            name
            for name in peft_config.modules_to_save
            if not any(re.match(rf"(^|.*\.){name}($|\..*)", key) for key in [*tied_weight_keys, embeddings])
        ]
        peft_config.modules_to_save = [embeddings, *others]
        peft_config.modules_to_tie = set(tied_weight_keys)

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Refuse tied targets: PEFT calls this where ``target_modules`` names an embedding, or a layer tied to it.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"ensure_weight_tying=True with target_modules={peft_config.target_modules!r}: "
            f"{', '.join(tied_weight_keys)} and the input embeddings are one weight, and RandLoRA has no update for "
            "both. Name the embeddings in `modules_to_save` or `trainable_token_indices`, or set "
            "ensure_weight_tying=False; `save_merged` then saves them untied."
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put ``new_module`` in the place of ``child``.

        PEFT moves the adapter to the weight's device, which for an offloaded weight is none, and hands the weight of
        what it unwraps to what was inside, which has it already; it stumbles over ``modules_to_save`` that have no
        weight of their own, such as BERT's pooler. Layers place their adapters themselves.
        """
        put(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast λ and γ to float32, or without ``autocast_adapter_dtype`` to the dtype of their base layer."""
        for layer in adapted(self.model, adapter_name).values():
            dtype = torch.float32
            if not autocast_adapter_dtype:
                _, base_dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
                dtype = base_dtype if base_dtype is not None and base_dtype.is_floating_point else dtype
            for parameters in (layer.randlora_lambda, layer.randlora_gamma):
                parameters[adapter_name].data = parameters[adapter_name].data.to(dtype)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)  # modules_to_save

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Run PEFT's ``forward`` or ``generate`` with ``adapter_names``, one for each sample.

        Raises:
            AdapterNamesError: in training mode, or for a name that no layer knows.
        """
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        with one_adapter_per_sample(self, names, copies_per_sample(kwargs, self.model)):
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Literal["linear", "nearest"] = "linear",
    ) -> dict[str, float]:
        """Add an adapter that is a weighted sum of others.

        Their updates are added, modules of ``modules_to_save`` as updates of the original. The sum is a RandLoRA
        adapter only where its terms have the same bases and share λ or γ, up to a factor for each basis; one adapter
        alone always is. ``docs/adapters.md`` says more.

        Args:
            adapters: names of the adapters.
            weights: one for each.
            adapter_name: name of the new one, which is not made active.
            combination_type: ``"linear"`` refuses a sum that is not a RandLoRA adapter; ``"nearest"`` takes the adapter
                whose coefficients λ[:, b] ⊗ γ[b, :] are nearest, and warns of its error. The update need not be.

        Returns:
            By how much the new update of each layer misses the sum, relative to it.

        Raises:
            CombinationError: if the adapters cannot be combined so; the model is as it was.
        """
        return weighted_sum.add_weighted_adapter(self, adapters, weights, adapter_name, combination_type)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights of all layers, or of none if one is refused.

        Raises:
            MergeError: for a layer that cannot be merged into (:meth:`RandLoraLayer.require_mergeable`); with
                ``safe_merge``, if a merged weight would not be finite.
        """
        self._require_mergeable(adapter_names, safe_merge)
        with one_rounding_warning():
            super().merge_adapter(adapter_names=adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._require_mergeable(adapter_names, safe_merge)
        with one_rounding_warning():
            unloaded: Any = super()._unload_and_optionally_merge(merge, progressbar, adapter_names=adapter_names)
        for module in unloaded.modules():  # PEFT itself unwraps modules that are trained in full
            renew(module)
        return unloaded

    def _require_mergeable(self, adapter_names: list[str] | None, require_finite: bool) -> None:
        """Refuse to merge if any layer cannot be merged, before any is changed."""
        for layer in adapted(self.model).values():
            wanted = layer.active_adapters if adapter_names is None else adapter_names
            names = [n for n in wanted if n in layer.randlora_lambda and n not in layer.merged_adapters]
            if names:
                layer.require_mergeable()
            if names and require_finite:
                with onload_layer(layer):
                    layer.merged_weight(names, require_finite=True)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Return the content of the adapter's file: λ and γ (the scaling's share folded in), and the bases once."""
        model, state_dict = plain_view(model), plain_names(model, state_dict)
        content = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if getattr(config, "bias", "none") == "randlora_only":
            content = without_biases_of_others(content, model, adapter_name)
        content = names_alone(content, model, adapter_name)
        layers = list(adapted(model, adapter_name).values())
        if not layers or not isinstance(config, RandLoraConfig):
            return content
        config.record(fingerprint(layers, adapter_name))
        content = checkpoint.fold_scaling(content, layers, config, adapter_name)
        prefix = HOST if any(key.startswith(PREFIX) for key in content) else ""
        projections = checkpoint.projections_to_save(layers, config, adapter_name)
        return content | {f"{prefix}{name}.{adapter_name}": value for name, value in projections.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Bind the bases and return the parameters; a file must hold exactly the adapter's tensors."""
        if not isinstance(config, RandLoraConfig):
            return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        require_sound_values(state_dict)
        wrapped, model, state_dict = model, plain_view(model), plain_names(model, state_dict)
        layers = list(adapted(model, adapter_name).values())
        content = checkpoint.take_projections(state_dict, model, config, adapter_name)
        content = checkpoint.unfold_scaling(content, layers, config, adapter_name)
        content = names_in(model, content, adapter_name)
        content = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, content)
        if reads_a_file():
            keep_base_tensors(model, require_own_tensors(content, model, config, adapter_name))
        return names_to_load(wrapped, content)


def _warn_of_unknown_names() -> None:
    """Warn of a saved adapter whose file is read past PEFT, as ``model.load_adapter`` of Transformers does."""
    warnings.warn(
        "something wraps modules of the model (torch.compile, activation checkpointing, FSDP). Where the adapter's "
        "file is read past PEFT, as `model.load_adapter` of Transformers does, its tensors do not find the modules "
        "inside, and the adapter has no effect. `PeftModel.from_pretrained` finds them; or load before you wrap.",
        stacklevel=4,
    )


def _freeze_copies(model: nn.Module, adapter_name: str) -> None:
    """Freeze an adapter's copies of modules that it trains in full: PEFT copies that the original's bias trains."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            module.modules_to_save[adapter_name].requires_grad_(False)


def _warn_of_single_bases(layers: list[RandLoraLayer], adapter_name: str) -> None:
    """Warn of ranks above a layer's smaller dimension."""
    small = [layer for layer in layers if layer.r[adapter_name] > layer.min_dim]
    if small:
        layer = min(small, key=lambda layer: layer.min_dim)
        warnings.warn(
            f"r={layer.r[adapter_name]} is larger than the smaller dimension of {len(small)} of {len(layers)} adapted "
            f"layers, {layer.min_dim} for one of shape {layer.out_features}×{layer.in_features}: such a layer gets a "
            "single basis and r + min(out, in) parameters. Its update is full-rank all the same; a smaller r gives it "
            "more parameters.",
            stacklevel=2,
        )
