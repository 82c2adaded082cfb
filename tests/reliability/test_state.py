"""Random models and adapters, random sequences of all that can be done to them, and a plain model of the outcome.

After every step the model has the output of dense weights, every bit of each adapter and of the base weights that are
not merged, and trains what it should. What was deleted or dropped is gone from memory. Nobody's generator is touched.
"""

import copy
import gc
import pickle
import sys
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn

from process_wide import generators
from randlora import HotswapError, PeftModel, RandLoraLayer, get_peft_model, hotswap_adapter
from tuner.helpers import assert_close, assert_same_tensors, layers_of, randomise, snapshot

from .children import SLOW
from .models import DTYPES, RECIPES, configs, ids
from .reference import TOLERANCE, Part, Reference, weight_of

NAMES = ["u", "v", "w", "x"]
FACTORS = st.sampled_from([0.5, 2.0, -1.0])
PICKS = st.lists(st.integers(0, 11), min_size=1, max_size=3)
counted: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what is imported need not be searched each time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)  # slow, and PEFT's
        yield
    gc.unfreeze()
    print(f"\nsequences of operations: {dict(counted)}")


class States(RuleBasedStateMachine):
    """``model`` is under test, ``reference`` is what it should be."""

    @initialize(data=st.data(), recipe=RECIPES)
    def begin(self, data, recipe):
        self.model, self.pristine = recipe.model(), recipe.model()
        self.reference = Reference(recipe.model())
        config = data.draw(configs(self.pristine, bias=True))
        counted["sequences"] += 1
        with self.step("begin"):
            self.model = get_peft_model(self.model, config, "u").eval()
            self.reference.activate(["u"])
            self.arrived("u", config, seed=1)
            self.reference.adapters["u"].trains = True
        self.first = self.reference.adapters["u"]
        self.add(data, seed=2)

    # Adapters come and go

    @precondition(lambda self: self.free and self.reference.enabled)
    @rule(data=st.data(), seed=st.integers(1, 99))
    def add(self, data, seed):
        config = data.draw(configs(self.pristine))
        with self.step("add"):
            self.model.add_adapter(self.free[0], config)
            self.arrived(self.free[0], config, seed)

    @precondition(lambda self: len(self.reference.adapters) > 1)
    @rule(pick=PICKS)
    def delete(self, pick):
        name = self.picked(pick)[0]
        held = self.held(name)
        with self.step("delete"):
            if self.reference.is_merged(name):
                with pytest.raises(ValueError, match="merged"):
                    self.model.delete_adapter(name)
                return
            self.model.delete_adapter(name)
            self.reference.delete(name)
        self.follow()
        assert_gone(held)

    @precondition(lambda self: self.free and self.reference.enabled)
    @rule(pick=PICKS, weight=FACTORS)
    def add_weighted_adapter(self, pick, weight):
        source, name = self.picked(pick)[0], self.free[0]
        adapter = self.reference.adapters[source]
        expected = {path: weight * self.reference.update(source, path) for path in adapter.parts}
        with self.step("add_weighted_adapter"):
            if adapter.config.bias != "none":
                with pytest.raises(ValueError, match="bias"):
                    self.model.base_model.add_weighted_adapter([source], [weight], name)
                return
            self.model.base_model.add_weighted_adapter([source], [weight], name)
            self.arrived(name, self.model.peft_config[name])
        for path, update in expected.items():
            assert_close(self.reference.update(name, path), update, 1e-5, path)

    @rule(pick=PICKS)
    def save_and_load(self, pick):
        """In a model of its own, and beside itself under another name: it is the same adapter."""
        name = self.picked(pick)[0]
        with self.saved(name) as folder, self.step("load"):
            self.assert_names(name, set(load_file(folder / "adapter_model.safetensors")))
            config = self.reference.adapters[name].config
            plain = self.reference.plain if config.bias == "none" else self.pristine
            alone = PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
            assert not [n for n, p in alone.named_parameters() if p.requires_grad and ".bias" not in n]
            self.assert_computes(alone, self.reference.dense_alone(name), name)
            if self.free and self.reference.enabled and config.bias == "none":
                new = self.free[0]
                self.model.load_adapter(folder, new)
                self.arrived(new, config)
                for path, part in self.reference.adapters[name].parts.items():
                    loaded = self.reference.adapters[new].parts[path]
                    assert_close(loaded.update(1.0), part.update(1.0), self.tolerance, path)

    @rule(pick=PICKS, seed=st.integers(1, 99))
    def hotswap(self, pick, seed):
        name = self.picked(pick)[0]
        with self.saved(name) as folder, self.step("hotswap"):
            if self.reference.is_merged(name):
                with pytest.raises(HotswapError, match="merged"):
                    hotswap_adapter(self.model, str(folder), name)
                return
            randomise(self.model, name, seed)
            hotswap_adapter(self.model, str(folder), name)
        parts = self.reference.adapters[name].parts
        before = {path: part.update(1.0) for path, part in parts.items()}
        self.note_values(name)  # with the paper's scaling, writing and reading γ rounds
        for path, part in parts.items():
            part.scale = part.initial
            assert_close(part.update(1.0), before[path], self.tolerance, path)

    # They are in force, or not

    @rule(pick=PICKS, trains=st.booleans())
    def set_adapter(self, pick, trains):
        names = self.picked(pick)
        with self.step("set"):
            if sum(self.reference.adapters[name].classifier is not None for name in names) > 1:
                with pytest.raises(ValueError, match="Only one adapter"):
                    self.model.base_model.set_adapter(names, inference_mode=not trains)
                return
            self.model.base_model.set_adapter(names, inference_mode=not trains)
            self.reference.activate(names, trains)
        self.follow()

    @rule(enabled=st.booleans())
    def enable(self, enabled):
        tuner = self.model.base_model
        with self.step("enable" if enabled else "disable"):
            tuner.enable_adapter_layers() if enabled else tuner.disable_adapter_layers()
            self.reference.enable(enabled)

    @rule(pick=st.none() | PICKS, safe=st.booleans())
    def merge(self, pick, safe):
        names = pick and self.picked(pick)
        with self.step("merge"):
            self.model.merge_adapter(names, safe_merge=safe)
            self.reference.merge(names or self.reference.active)

    @rule()
    def unmerge(self):
        with self.step("unmerge"):
            self.model.unmerge_adapter()
            self.reference.unmerge()

    @rule(pick=PICKS, factor=FACTORS)
    def set_scale(self, pick, factor):
        name = self.picked(pick)[0]
        with self.step("set_scale"):
            for layer in self.layers.values():
                layer.set_scale(name, factor)
            for part in self.reference.adapters[name].parts.values():
                part.scale = factor * part.initial

    # The model as a whole

    @precondition(lambda self: not self.reference.merged)
    @rule(dtype=st.sampled_from(DTYPES))
    def cast(self, dtype):
        with self.step("cast"):
            self.model.to("cpu", dtype)
            self.reference.cast(dtype)
            self.pristine.to(dtype)

    @rule(pickled=st.booleans(), pick=PICKS)
    def copy(self, pickled, pick):
        """The rest is done to the copy; the original does not change, and is freed."""
        original, before, name = self.model, snapshot(self.model), self.picked(pick)[0]
        with self.step("pickle" if pickled else "deepcopy"):
            self.model = pickle.loads(pickle.dumps(original)) if pickled else copy.deepcopy(original)
            randomise(self.model, name, seed=7)
            assert_same_tensors(original.state_dict(), before)
            self.note_values(name)
        held = [weakref.ref(thing) for thing in (*original.modules(), *original.parameters())]
        del original
        assert_gone(held)

    @precondition(lambda self: not self.reference.merged)
    @rule()
    def train(self):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with self.step("train", draws=True):
            loss = self.model.train()(ids()).double().square().mean()
            self.model.eval()
            if loss.requires_grad:
                loss.backward()
                torch.optim.SGD(trained, lr=1e-3).step()
                self.model.zero_grad()
        self.note_training()

    def teardown(self):
        """The plain model again, with the updates that are in force or without."""
        if sys.exc_info()[0] is not None or not hasattr(self, "first"):  # a step has failed, or there was none
            return
        reference, merges = self.reference, len(self.reference.adapters) % 2 == 0
        held = [thing for name in reference.adapters for thing in self.held(name)]
        with self.step("merge_and_unload" if merges else "unload"):
            self.model.base_model.enable_adapter_layers()
            reference.enable(True)
            self.model.unmerge_adapter()
            reference.unmerge()
            if merges:
                reference.merge(reference.active)
                plain, expected = self.model.merge_and_unload(), reference.dense()
            else:
                reference.wrapped = set()
                plain, expected = self.model.unload(), reference.dense()
        assert [name for name, _ in plain.named_modules()] == [name for name, _ in reference.plain.named_modules()]
        self.assert_computes(plain, expected, "unloaded")
        self.assert_base_weights(plain, but=("classifier.weight", "classifier.bias"))
        del self.model, plain, self.first
        assert_gone(held)

    # What holds after every step

    @invariant()
    def state(self):
        self.assert_computes(self.model, self.reference.dense(), str(self.reference.active))
        self.assert_base_weights(self.model.base_model.model)
        self.assert_adapters()
        wrong = {
            name for name, p in self.model.base_model.model.named_parameters() if p.requires_grad != self.trains(name)
        }
        assert not wrong, wrong

    def assert_computes(self, model, dense, name):
        """What dense weights compute in float64; in bfloat16 as nearly as dense weights do in bfloat16."""
        exact, tolerance = output(dense), self.tolerance
        if self.reference.dtype == torch.bfloat16:  # deep models of large updates lose all digits of it
            rounded = output(dense.bfloat16()).double()
            tolerance += 4 * float((rounded - exact).norm() / exact.norm())
        assert_close(output(model), exact, tolerance, f"{name} {self.reference.dtype}")

    def assert_base_weights(self, model, but=()):
        """Bit for bit, but where they are merged; a module at two places is merged at both."""
        merged = {weight_of(path) for path in self.reference.merged}
        merged |= {"again.weight"} if any("shared" in name for name in merged) else set()
        found = {plain_name(name): value for name, value in model.state_dict().items() if is_of_the_base(name)}
        expected = self.reference.plain.state_dict()
        assert found.keys() == expected.keys()
        same = expected.keys() - merged - set(but)
        assert_same_tensors({name: found[name] for name in same}, {name: expected[name] for name in same})

    def assert_adapters(self):
        reference, layers = self.reference, self.layers
        assert set(self.model.peft_config) == reference.adapters.keys()
        assert self.model.base_model.active_adapters == reference.active
        assert layers.keys() == reference.wrapped
        for path, layer in layers.items():
            assert layer.active_adapters == reference.active
            assert set(layer.merged_adapters) == reference.merged.get(path, {}).keys()
            parts = {name: a.parts[path] for name, a in reference.adapters.items() if path in a.parts}
            for attribute in ("randlora_lambda", "randlora_gamma", "bases", "r", "scaling", "num_bases"):
                assert getattr(layer, attribute).keys() == parts.keys(), attribute
            for name, part in parts.items():
                assert torch.equal(layer.randlora_lambda[name], part.lam), (path, name)
                assert torch.equal(layer.randlora_gamma[name], part.gamma), (path, name)

    def trains(self, name):
        """λ, γ and modules of the active adapters, and the biases that the first adapter has asked for."""
        if ".randlora_" in name:
            return self.reference.adapters[name.rpartition(".")[2]].trains
        if "modules_to_save" in name:
            return self.reference.adapters[name.split(".")[2]].trains
        if not name.endswith(".bias") or ("original_module" in name and self.first.classifier is not None):
            return False
        bias = self.first.config.bias
        return bias == "all" or (bias == "randlora_only" and plain_name(name).removesuffix(".bias") in self.first.parts)

    # How it is done

    @contextmanager
    def step(self, kind: str, draws: bool = False) -> Iterator[None]:
        """Something that leaves all global generators alone; or all but torch's, which dropout draws from."""
        counted["steps"] += 1
        counted[kind] += 1
        compared, before = slice(2 if draws else 3), generators()  # torch's is the last
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        assert generators()[compared] == before[compared]

    @property
    def layers(self) -> dict[str, RandLoraLayer]:
        layers = layers_of(self.model.base_model.model)
        return {name.replace(".base_layer", ""): layer for name, layer in layers.items()}

    @property
    def free(self) -> list[str]:
        return [name for name in NAMES if name not in self.reference.adapters]

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.reference.dtype]

    def picked(self, numbers: list[int]) -> list[str]:
        present = sorted(self.reference.adapters)
        return list(dict.fromkeys(present[number % len(present)] for number in numbers))

    def classifier(self, name: str) -> nn.Module | None:
        wrapper = self.model.base_model.model.classifier
        known = isinstance(wrapper, ModulesToSaveWrapper) and name in wrapper.modules_to_save
        return wrapper.modules_to_save[name] if known else None

    def arrived(self, name, config, seed=None):
        """Has the reference know an adapter that has come; with a seed, as one that was trained."""
        self.model.eval()  # as in PEFT, what is new is in training mode
        if seed is not None:
            randomise(self.model, name, seed)
            if (classifier := self.classifier(name)) is not None:
                classifier.weight.data += 0.25
        self.reference.add(name, config, self.layers, self.classifier(name))

    def follow(self):
        """PeftModel has a note of its own of the active adapter, which is not kept where there are several."""
        self.model.active_adapter = self.reference.active[0]

    def note_values(self, name):
        """Has the reference know new values of λ and γ."""
        adapter, layers = self.reference.adapters[name], self.layers
        for path, part in adapter.parts.items():
            new = Part.of(layers[path], name, path, adapter.config)
            part.lam, part.gamma = new.lam, new.gamma

    def note_training(self):
        """Has the reference know what a step may have changed, and nothing else."""
        for name, adapter in self.reference.adapters.items():
            if adapter.trains:
                self.note_values(name)
                adapter.classifier = copy.deepcopy(self.classifier(name))
        for name, parameter in self.model.base_model.model.named_parameters():
            if is_of_the_base(name) and self.trains(name):
                self.reference.plain.get_parameter(plain_name(name)).data = parameter.detach().clone()

    @contextmanager
    def saved(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            with self.step("save"):
                self.model.save_pretrained(folder, selected_adapters=[name])
            yield Path(folder) / name

    def assert_names(self, name, found):
        """They are PEFT's, of a model in which the adapter is alone."""
        adapter = self.reference.adapters[name]
        # a parameter's wrapper goes around its module after what is inside of that was wrapped
        around = "base_layer." if adapter.config.target_parameters else ""
        paths = [path.replace("out_proj", around + "out_proj") for path in adapter.parts]
        expected = {f"base_model.model.{path}.randlora_{part}" for path in paths for part in ("lambda", "gamma")}
        if adapter.classifier is not None:
            expected |= {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
        assert expected <= found
        rest = found - expected
        bases = {key for key in rest if key.startswith("base_model.randlora_")}
        assert adapter.config.save_projection or not bases
        assert all(adapter.config.bias != "none" and key.endswith(".bias") for key in rest - bases), rest

    def held(self, name: str) -> list[weakref.ref]:
        """What only that adapter has."""
        layers = self.layers.values()
        mine = {layer.bases[name] for layer in layers if name in layer.bases}
        mine -= {basis for layer in layers for other, basis in layer.bases.items() if other != name}
        held = [p for n, p in self.model.named_parameters() if ".randlora_" in n and n.endswith(f".{name}")]
        return [weakref.ref(thing) for thing in (*mine, *held, *filter(None, [self.classifier(name)]))]


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids())


def assert_gone(held: list[weakref.ref]) -> None:
    gc.collect()
    assert not [thing() for thing in held if thing() is not None]


def is_of_the_base(name: str) -> bool:
    return ".randlora_" not in name and "modules_to_save" not in name


def plain_name(name: str) -> str:
    return name.replace(".base_layer", "").replace(".original_module", "")


States.TestCase.settings = settings(
    max_examples=1000 if SLOW else 50, stateful_step_count=30 if SLOW else 20, suppress_health_check=list(HealthCheck)
)
TestStates = States.TestCase
